"""SpIEL as users meet it: refusals, trainers, resuming, what a delta says; its optimizers."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_gast import batch_loss
from slow_sparse import bits, chosen, is_matrix, mask_of
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.testing import assert_close

from selectune.errors import (
    ConfigError,
    CorruptFileError,
    IncompatibleRunError,
    SelectionError,
    TrainingError,
)
from selectune.methods.sparse.spiel_ag import SpielAG
from selectune.methods.sparse.spiel_ma import SpielMA
from selectune.training.sparse import SM3, SparseModel, SpielAdamW, sparsify
from selectune.training.sparse.entries import DecayTo
from selectune.training.sparse.reselection import highest
from selectune.training.sparse.schedule import Schedule
from selectune.weights.base import base_weights
from selectune.weights.delta import SparseDelta
from selectune.weights.merging import merge
from user_training import TRAINERS, Run, assert_same_bits, bare, lora, tokenised

# transformers 5.24 renamed `gradient_checkpointing`, which 5.23 and trl 1.16 know alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

BATCH = tiny_batch(3)
WHEN: dict[str, Any] = {"every": 3, "accumulate": 1}
METHODS: dict[str, tuple[Callable[..., SpielAG | SpielMA], type[torch.optim.Optimizer]]] = {
    "ag": (SpielAG, SpielAdamW),
    "ma": (SpielMA, SM3),
}


def sparse(decay_to: DecayTo = "base", dtype: torch.dtype = torch.float32) -> SparseModel:
    model = tiny_model("llama").to(dtype)
    mask = mask_of(model, 0.1, only=is_matrix)
    found = sparsify(model, mask, route="sampled", decay_to=decay_to)
    assert isinstance(found, SparseModel)
    return found


def assert_base_outside(model: SparseModel, before: dict[str, torch.Tensor]) -> None:
    mask = model.sparse.mask
    for name, p in base_weights(model).items():
        outside = ~chosen(mask, name, p.shape)
        assert torch.equal(p.detach()[outside], before[name][outside]), name


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        batch_loss(model, tiny_batch(3, seed=number), "token").backward()
        optimizer.step()


# What an exchange does.


@settings(max_examples=20)
@given(data=st.data(), decay_to=st.sampled_from(["zero", "base"]))
def test_exchanges_keep_what_stays_and_give_the_base_back(
    data: st.DataObject, decay_to: DecayTo
) -> None:
    model = sparse(decay_to, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    before = bits(tiny_model("llama").to(next(model.parameters()).dtype))
    name = data.draw(st.sampled_from(sorted(model.sparse.entries)))
    entries = model.sparse.entries[name]
    with torch.no_grad():
        entries.values.add_(0.5 * torch.randn(entries.values.shape))
    entries.values.grad = torch.randn(entries.values.shape)
    for _ in range(2):
        was = dict(zip(entries.index.tolist(), entries.values.tolist(), strict=True))
        grads = dict(zip(entries.index.tolist(), entries.values.grad.tolist(), strict=True))
        n = data.draw(st.integers(0, len(was)))
        rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        drop = entries.index[torch.randperm(len(was), generator=rng)[:n]].long()
        free = torch.tensor([k for k in range(entries.weight.numel()) if k not in was])
        grow = free[torch.randperm(len(free), generator=rng)[:n]]
        moved = model.sparse.replace(name, drop, grow)
        now = sorted(set(was) - set(drop.tolist()) | set(grow.tolist()))
        assert entries.index.tolist() == model.sparse.mask.indices[name].tolist() == now
        assert entries.index[moved.grown].tolist() == grow.tolist()
        assert not entries.deltas()[moved.grown].any()
        places = zip(now, entries.values.tolist(), entries.values.grad.tolist(), strict=True)
        for k, value, grad in places:
            if k in was:
                assert (value, grad) == (was[k], grads[k])
            else:
                assert grad == 0
        state = moved.carry(torch.tensor(list(was.values())), torch.arange(float(n)))
        expected = [was.get(k) for k in now]
        for place, k in enumerate(grow.tolist()):
            expected[now.index(k)] = float(place)
        assert state.tolist() == expected
        assert_base_outside(model, before)
        held = entries.weight.detach().flatten()[entries.index]
        assert torch.equal(held, entries.masters().to(held.dtype))


def test_what_is_no_exchange_is_refused() -> None:
    model = sparse()
    name, other = sorted(model.sparse.entries)[:2]
    index = model.sparse.entries[name].index
    free = next(k for k in range(index.numel() + 1) if k not in index)
    before = copy.deepcopy(model.state_dict())

    def refused(words: str, drop: list[int], grow: list[int]) -> None:
        with pytest.raises(SelectionError, match=words):
            model.sparse.replace(name, torch.tensor(drop).long(), torch.tensor(grow).long())

    first, second = index[:2].tolist()
    refused("1 are dropped and 0 are grown", [first], [])
    refused("stands twice", [first, first], [free, free + 1])
    refused("that is dropped does not train", [free], [free])
    refused("that is grown trains already", [first], [second])
    refused("no place in a tensor of", [first], [10**6])
    refused("no place in a tensor of", [first], [-1])
    nothing = torch.zeros(0).long()
    with pytest.raises(SelectionError, match=f'did you mean "{other}"'):
        model.sparse.replace(other[:-1], nothing, nothing)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.sparse.is_exchanged


def test_ties_go_to_the_earlier_place() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 1.0])
    found = [highest(scores, k).tolist() for k in range(8)]
    assert found[:5] == [[], [1], [1, 3], [1, 3, 4], [0, 1, 3, 4]]
    assert found[5:] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_the_share_falls_to_nothing() -> None:
    line = Schedule(20, 5, 0.2, "linear", 100)
    assert [t for t in range(1, 101) if line.ends(t)] == [5, 25, 45, 65, 85]
    assert [t for t in range(1, 101) if line.begins(t)] == [19, 39, 59, 79, 99]
    assert [line.count(t, 1000) for t in (5, 25, 45, 65, 85, 100, 120)] == [
        1000, 150, 110, 70, 30, 0, 0,
    ]  # fmt: skip
    bow = Schedule(20, 5, 0.2, "cosine", 100)
    assert bow.count(5, 1000) == 1000
    assert bow.share(25) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert bow.count(100, 1000) == 0


# The optimizers.


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_without_an_exchange_it_is_adamw(decay: float, betas: tuple[float, float]) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": betas, "eps": 1e-6, "weight_decay": decay}
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3, 2))]
    theirs = copy.deepcopy(mine)
    ours, adamw = SpielAdamW(mine, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        ours.step()
        adamw.step()
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    state = copy.deepcopy(ours.state_dict())
    again = SpielAdamW(copy.deepcopy(mine), **options)
    again.load_state_dict(state)
    assert_close(again.state_dict(), state, rtol=0, atol=0)


def test_seeds_are_what_bias_correction_makes_means_of() -> None:
    model = sparse()
    optimizer = SpielAdamW(model.sparse.parameters(), betas=(0.9, 0.99))
    steps(model, optimizer, range(3))
    name, entries = next(iter(model.sparse.entries.items()))
    state = optimizer.state[entries.values]
    kept = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    grow = torch.tensor([k for k in range(30) if k not in entries.index][:2])
    moved = model.sparse.replace(name, entries.index[[3, 1]], grow)
    mean, square = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    optimizer.follow(entries.values, moved, age=2, mean=mean, mean_square=square)
    state, old = optimizer.state[entries.values], moved.came_from >= 0
    assert int(old.sum()) == entries.index.numel() - 2
    assert (state["age"][old] == 3).all()
    assert (state["age"][moved.grown] == 2).all()
    for key, beta, seed in (("exp_avg", 0.9, mean), ("exp_avg_sq", 0.99, square)):
        assert torch.equal(state[key][old], kept[key][moved.came_from[old]])
        assert_close(state[key][moved.grown] / (1 - beta**2), seed)
    steps(model, optimizer, range(3, 5))
    assert (optimizer.state[entries.values]["age"][moved.grown] == 4).all()


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4)])
def test_sm3_of_dense_parameters(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = SM3([p], lr=0.1, eps=1e-4, weight_decay=0.2)
    value, sums = p.detach().double().clone(), [torch.zeros(n) for n in shape or (1,)]
    for _ in range(4):
        p.grad = torch.randn(shape)
        optimizer.step()
        old = [t.clone() for t in sums]
        for place in torch.cartesian_prod(*[torch.arange(n) for n in shape or (1,)]).view(
            -1, max(1, len(shape))
        ):
            at = tuple(place.tolist())
            g = float(p.grad[at] if shape else p.grad)
            u = min(float(t[i]) for t, i in zip(old, at, strict=True)) + g * g
            for total, i in zip(sums, at, strict=True):
                total[i] = max(float(total[i]), u)
            entry = at if shape else ()
            value[entry] = value[entry] * (1 - 0.02) - 0.1 * g / math.sqrt(u + 1e-4)
        assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-6)
    assert_close(optimizer.accumulators(p), sums, rtol=1e-5, atol=1e-6)


def test_sm3_of_all_entries_is_sm3_of_the_matrix() -> None:
    base = tiny_model("gpt2")
    every = mask_of(base, 1.0, only=lambda name: "attn.c_attn" in name)
    model = sparsify(copy.deepcopy(base), every)
    for name, p in base.named_parameters():
        p.requires_grad_(name in every.indices)
    dense = [p for p in base.parameters() if p.requires_grad]
    options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
    steps(base, SM3(dense, **options), range(5))
    steps(model, SM3(model.sparse.parameters(), **options), range(5))
    assert_close(bits(model), bits(base), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [SpielAdamW, SM3])
@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": math.nan}, {"weight_decay": math.inf}])
def test_numbers_out_of_range_are_refused(
    kind: type[torch.optim.Optimizer], wrong: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} cannot be"):
        kind([nn.Parameter(torch.zeros(2))], **wrong)
    with pytest.raises(ConfigError, match="betas cannot hold 1"):
        SpielAdamW([nn.Parameter(torch.zeros(2))], betas=(0.9, 1.0))


# The methods in loops and trainers.


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_loop_is_the_unbroken_one(kind: str, dtype: torch.dtype, stop: int) -> None:
    make, optimizer_class = METHODS[kind]
    method = make(**{**WHEN, "every": 4, "accumulate": 2}, steps=8)

    def fresh() -> tuple[SparseModel, torch.optim.Optimizer]:
        model = sparse(dtype=dtype)
        return model, optimizer_class(model.parameters(), lr=1e-2, weight_decay=1.0)

    whole, optimizer = fresh()
    with method.attach(whole, optimizer):
        steps(whole, optimizer, range(8))
    first, optimizer = fresh()
    with method.attach(first, optimizer) as session:
        steps(first, optimizer, range(stop))
        saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), session.state()))
    again, optimizer = fresh()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with method.attach(again, optimizer, step=stop) as session:
        session.load_state(*saved[2])
        steps(again, optimizer, range(stop, 8))
    assert again.sparse.mask == whole.sparse.mask
    assert again.sparse.about == whole.sparse.about
    assert_close(bits(again), bits(whole), rtol=0, atol=0)
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert_base_outside(again, bits(tiny_model("llama").to(dtype)))
    hooks = [e.values._post_accumulate_grad_hooks for e in again.sparse.entries.values()]
    assert not any(hooks)
    assert all(e.observer is None for e in again.sparse.entries.values())


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_trainer_is_the_unbroken_one(kind: str, trainer: str, tmp_path: Path) -> None:
    make, optimizer_class = METHODS[kind]
    arguments: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
        "max_steps": 5, "weight_decay": 1.0, "gradient_checkpointing": trainer == "trl",
    }  # fmt: skip

    def run(folder: str) -> Run:
        model = sparsify(bare(), mask_of(bare(), 0.05), route="sampled", decay_to="base")
        given = {"optimizer_cls_and_kwargs": (optimizer_class, {"lr": 5e-3})}
        return Run(tmp_path / folder, trainer, make(**WHEN), model=model, given=given, **arguments)

    whole = run("a").train()
    facts = dict(whole.records)
    k = whole.model.sparse.n_chosen
    assert [step for step in facts if facts[step]] == [1, 4]
    first, second = (facts[step]["reselected"] for step in (1, 4))
    assert first == {"share": 1.0, "entries": first["entries"], "of": k}
    assert k >= first["entries"] > 0.5 * k > second["entries"] > 0
    again = run("a").train(tmp_path / "a" / "checkpoint-3")  # in the middle of a phase
    assert_same_bits(whole, again)
    assert again.model.sparse.mask == whole.model.sparse.mask
    assert_close(bits(again.model), bits(whole.model), rtol=0, atol=0)
    assert_base_outside(whole.model, bits(bare()))
    whole.trainer.save_model(str(tmp_path / "delta"))
    live = bits(whole.model)
    delta = SparseDelta.load(tmp_path / "delta")
    assert_close(bits(merge(bare(), delta)), live, rtol=0, atol=0)
    assert delta.about["reselected_by"] == f"spiel_{kind}"
    assert delta.about["n_exchanged"] == sum(
        f["reselected"]["entries"] for f in (facts[1], facts[4])
    )
    other = sparsify(bare(), mask_of(bare(), 0.05), decay_to="base")
    other.sparse.load(delta)
    assert_close(bits(other), live, rtol=0, atol=0)
    assert other.sparse.mask == whole.model.sparse.mask


def test_the_best_model_has_its_own_entries(tmp_path: Path) -> None:
    model = sparsify(bare(), mask_of(bare(), 0.05), route="sampled", decay_to="base")
    run = Run(
        tmp_path, "transformers", SpielMA(**{**WHEN, "accumulate": 1}), model=model,
        given={
            "eval_dataset": tokenised(2),
            "optimizer_cls_and_kwargs": (SM3, {"lr": 5e-3}),
        },
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,  # an early step, on purpose
    ).train()  # fmt: skip
    best = Path(str(run.trainer.state.best_model_checkpoint))
    delta = SparseDelta.load(best)
    assert best.name != "checkpoint-4"
    assert_close(dict(model.sparse.mask.indices), dict(delta.indices), rtol=0, atol=0)
    assert_close(bits(model), bits(merge(bare(), delta)), rtol=0, atol=1e-7)


def test_a_state_before_any_exchange_brings_the_first_entries_back() -> None:
    model = sparse()
    early = copy.deepcopy(model.state_dict())
    name, entries = next(iter(model.sparse.entries.items()))
    free = next(k for k in range(100) if k not in entries.index)
    model.sparse.replace(name, entries.index[:1], torch.tensor([free]))
    late = copy.deepcopy(model.state_dict())
    assert model.sparse.mask != model.sparse.start
    model.load_state_dict(early)
    assert model.sparse.mask == model.sparse.start
    model.load_state_dict(late)
    assert free in model.sparse.mask.indices[name]
    late["_extra_state"] = late["_extra_state"][:-3]
    with pytest.raises(CorruptFileError, match="incomplete"):
        model.load_state_dict(late)


def test_a_delta_of_other_origin_is_still_refused() -> None:
    model = sparse()
    name, entries = next(iter(model.sparse.entries.items()))
    free = next(k for k in range(100) if k not in entries.index)
    model.sparse.replace(name, entries.index[:1], torch.tensor([free]))
    other = tiny_model("llama")
    sparsify(other, mask_of(other, 0.1, seed=1, only=is_matrix), decay_to="base")
    with pytest.raises(IncompatibleRunError, match="of other weights"):
        other.sparse.load(model.sparse.delta())


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    model = sparse()
    optimizer = SpielAdamW(model.sparse.parameters())
    with SpielAG(steps=9).attach(model, optimizer):
        other = copy.deepcopy(model)
        batch_loss(other, BATCH, "token").backward()
        assert model.sparse.route.n_dense == other.sparse.route.n_dense == 0


def test_lora_beside_the_entries_trains_too() -> None:
    model = lora(dropout=0.0)
    sparsify(model, mask_of(bare(), 0.1, only=is_matrix), decay_to="base")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    for make, kind in METHODS.values():
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with make(**WHEN, steps=4).attach(model, optimizer):
            steps(model, optimizer, range(4))
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if "lora" in n)
    assert model.sparse.is_exchanged
    assert_base_outside(model, bits(bare()))


# What is refused.


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="accumulate=19 does not fit into every=20"):
        SpielAG(accumulate=19)
    with pytest.raises(ConfigError, match="every"):
        SpielMA(every=2)
    with pytest.raises(ConfigError, match="fall"):
        SpielMA(fall="steep")


@pytest.mark.parametrize("kind", METHODS)
def test_a_scene_without_what_it_needs_is_refused(kind: str) -> None:
    make, optimizer_class = METHODS[kind]
    model = sparse("zero")

    def refused(words: str, model: nn.Module, optimizer: torch.optim.Optimizer, **o: int) -> None:
        with pytest.raises(ConfigError, match=words), make(**o).attach(model, optimizer):
            pass

    plain = tiny_model("llama")
    refused("of which single weights train", plain, optimizer_class(plain.parameters()), steps=4)
    adamw = torch.optim.AdamW(model.parameters())
    refused(f"needs the optimizer {optimizer_class.__name__}", model, adamw, steps=4)
    few = optimizer_class(model.sparse.parameters()[1:])
    refused("lacks the chosen entries of 1 weights", model, few, steps=4)
    good = optimizer_class(model.parameters())
    refused("how long training is", model, good)
    decaying = optimizer_class(model.parameters(), weight_decay=0.1)
    refused('needs decay_to="base"', model, decaying, steps=4)
    assert not any(e.values._post_accumulate_grad_hooks for e in model.sparse.entries.values())


def test_trainers_say_which_optimizer_to_give(tmp_path: Path) -> None:
    model = sparsify(bare(), mask_of(bare(), 0.05), decay_to="base")
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs"):
        Run(tmp_path, "transformers", SpielAG(), model=model).train()


def test_float16_is_refused_where_gradients_seed_moments() -> None:
    model = sparse()
    optimizer = SpielAdamW(model.parameters())
    with (
        pytest.raises(ConfigError, match="float16"),
        SpielAG(steps=4).attach(model, optimizer, precision="float16"),
    ):
        pass


def test_a_gradient_that_is_no_number_is_named() -> None:
    model = sparse()
    optimizer = SpielAdamW(model.parameters())
    with SpielAG(**WHEN, steps=4).attach(model, optimizer):
        batch_loss(model, BATCH, "token").backward()
        optimizer.zero_grad()
        (batch_loss(model, BATCH, "token") * math.nan).backward()
        with pytest.raises(TrainingError, match=r"gradient of model.layers.0.*is not a number"):
            optimizer.step()


def test_a_state_of_other_options_is_refused() -> None:
    model = sparse()
    optimizer = SM3(model.parameters())
    with SpielMA(**WHEN, steps=4).attach(model, optimizer) as session:
        saved = session.state()
    with (
        SpielMA(steps=4).attach(model, optimizer) as session,
        pytest.raises(IncompatibleRunError, match="other options"),
    ):
        session.load_state(*saved)


def test_a_weight_that_no_gradient_reaches_keeps_its_entries() -> None:
    model = sparse()
    name, entries = next(iter(model.sparse.entries.items()))
    entries.values.requires_grad_(False)
    index = entries.index.clone()
    for make, kind in METHODS.values():
        optimizer = kind(model.parameters())
        with make(**WHEN, steps=4).attach(model, optimizer):
            steps(model, optimizer, range(2))
    assert torch.equal(model.sparse.mask.indices[name], index)
    assert model.sparse.is_exchanged
