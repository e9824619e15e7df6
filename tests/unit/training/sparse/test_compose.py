"""Entries beside their matrices: over quantised weights, and what else the form has of its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import loop_gradients
from peft import LoraConfig, get_peft_model
from quantised_case import BITSANDBYTES, KINDS, SlowBeside, quantised
from slow_gast import batch_loss
from slow_sparse import MakeOptimizer, bits, is_matrix, live, mask_of, matrices
from tiny import tiny_batch, tiny_model, tiny_tokens
from torch import nn
from torch.testing import assert_close

from selectune import SpielAG, SpielMA
from selectune.data import collate
from selectune.errors import ConfigError, CoverageError, IncompatibleRunError, SelectionError
from selectune.gradients.engine import GradientEngine
from selectune.gradients.kernels import Rows, SparseRows
from selectune.training.layers import trainable_layers
from selectune.training.sparse import SM3, SparseModel, SpielAdamW, restore, sparsify
from selectune.training.sparse.refusals import refuse_options
from selectune.training.sparse.routes import Route
from selectune.training.suppression import response_of, turned_down
from selectune.weights.base import base_fingerprint, base_weights, linear_maps
from selectune.weights.delta import SparseDelta
from selectune.weights.eligible import eligible_weights
from selectune.weights.mask import WeightMask
from selectune.weights.merging import merge, unmerge

BATCHES = [tiny_batch(3, seed=s) for s in range(3)]


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, eps=1e-4, weight_decay=0.1)


def beside(model: nn.Module, mask: WeightMask, **options: Any) -> SparseModel:  # noqa: ANN401
    made = sparsify(model, mask, form="compose", **options)
    assert isinstance(made, SparseModel)
    return made


def train(model: nn.Module, make: MakeOptimizer = adamw) -> list[float]:
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    losses = []
    for batch in BATCHES:
        loss = batch_loss(model, batch, "token")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def deltas(model: SparseModel) -> dict[str, torch.Tensor]:
    return {name: e.deltas().clone() for name, e in model.sparse.entries.items()}


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", k) for k in KINDS] + [("gpt2", k) for k in BITSANDBYTES]
)
@pytest.mark.parametrize("route", ["gather", "sampled"])
def test_beside_a_quantised_base_it_is_masked_dense_training(
    family: str, kind: str, route: Route
) -> None:
    plain = tiny_model(family)
    mask = mask_of(plain, only=matrices(plain))
    model, twin = (quantised(plain, kind).train() for _ in range(2))
    before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    beside(model, mask, other_base=True, route=route)
    slow = SlowBeside(twin, mask, adamw, is_input_first=family == "gpt2")
    optimizer = adamw(model.sparse.parameters())
    for batch in BATCHES:
        losses = []
        for each in (model, twin):
            torch.manual_seed(3)  # GPT-2 drops out
            losses.append(batch_loss(each, batch, "token"))
        assert_close(*losses, rtol=1e-5, atol=1e-6)
        for loss in losses:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        slow.step()
    for name, found in deltas(model).items():
        expected = slow.changes[name].detach().flatten()[mask.indices[name].long()]
        assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert model.sparse.moved() > 0.9 * mask.n_chosen
    held = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(held[name], tensor), name


def test_the_first_step_is_that_of_the_form_in_place() -> None:
    """Where nothing is added yet, the two forms are one function in any dtype."""
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        found = []
        for form in ("in_place", "compose"):
            model = tiny_model("llama").to(dtype)
            sparsify(model, mask_of(model, only=is_matrix), route="gather", form=form)
            loss = batch_loss(model, BATCHES[0], "token")
            loss.backward()
            found.append((loss.detach(), torch.cat([p.grad for p in model.sparse.parameters()])))
        (one, expected), (other, grad) = found
        assert torch.equal(one, other)
        assert (grad - expected).norm() <= rtol * expected.norm()


def test_values_beside_half_precision_keep_small_steps() -> None:
    model = tiny_model("llama").bfloat16()
    beside(model, mask_of(model, only=is_matrix))
    train(model, lambda p: torch.optim.SGD(p, lr=1e-6))
    assert {e.values.dtype for e in model.sparse.entries.values()} == {torch.float32}
    assert model.sparse.moved() > 0.9 * model.sparse.n_chosen
    before = [p.detach().clone() for p in model.sparse.parameters()]
    model.to(torch.float32)
    assert_close([p.detach() for p in model.sparse.parameters()], before, rtol=0, atol=0)
    train(model)


def test_gradients_reach_inputs_through_what_is_added() -> None:
    module, mask = nn.Sequential(nn.Linear(5, 3)).double(), {"0.weight": torch.tensor([1, 7, 14])}
    beside(module, WeightMask(mask, {"0.weight": (3, 5)}), route="gather")
    values, x = module.sparse.parameters()[0], torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        values.copy_(torch.randn(3))

    def run(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"0.weight_values": values}, (x,))

    leaves = (x.requires_grad_(), values.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)


def test_lora_beside_entries_beside_a_quantised_base() -> None:
    plain = tiny_model("llama")
    mask = mask_of(plain, only=is_matrix)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(quantised(plain, "bnb 8 bit"), config)
    before = base_fingerprint(model)
    beside(model, mask, other_base=True)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert model.sparse.moved() > 0.9 * mask.n_chosen
    restore(model, to_base=True)
    assert base_fingerprint(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_knows_the_quantised_base_it_was_trained_on(kind: str, tmp_path: Path) -> None:
    plain = tiny_model("llama")
    mask = mask_of(plain, only=is_matrix)
    model = beside(quantised(plain, kind).train(), mask, other_base=True)
    base = base_fingerprint(quantised(plain, kind))
    assert model.sparse.base == base != mask.base
    train(model)
    model.save_pretrained(tmp_path / "delta")
    delta = SparseDelta.load(tmp_path / "delta")
    assert delta.base == base
    assert delta.about["scored_on"] == mask.base
    assert set(delta.dtypes.values()) == {"quantised"}
    assert delta.shapes == {name: mask.shapes[name] for name in mask.indices}
    fresh = quantised(plain, kind).train()
    delta.check(fresh)
    beside(fresh, delta.mask()).sparse.load(delta)  # its own base: nothing has to be said
    assert_close(deltas(fresh), deltas(model), rtol=0, atol=0)
    losses = [batch_loss(each, BATCHES[0], "token") for each in (model, fresh)]
    assert torch.equal(*losses)
    with pytest.raises(CoverageError, match="no delta can be added to quantised weights"):
        merge(quantised(plain, kind), delta)
    with pytest.raises(CoverageError, match="no delta can be added to quantised weights"):
        merge(quantised(plain, kind), delta, other_base=True)
    with pytest.raises(IncompatibleRunError, match="made on quantised weights"):
        merge(tiny_model("llama"), delta)
    merged = merge(tiny_model("llama"), delta, other_base=True)
    weights = bits(plain)
    for name, index in delta.indices.items():
        weights[name].view(-1)[index.long()] += delta.deltas[name]
    assert_close(bits(merged), weights, rtol=0, atol=0)
    assert_close(bits(unmerge(merged)), bits(plain), rtol=0, atol=0)


def test_scales_are_part_of_a_quantised_base() -> None:
    model = quantised(tiny_model("llama"), "buffers")
    before = base_fingerprint(model)
    model.model.layers[0].mlp.up_proj.scale[0] *= 2
    assert base_fingerprint(model) != before
    model = quantised(tiny_model("llama"), "bnb 4 bit")
    before = base_fingerprint(model)
    model.model.layers[0].mlp.up_proj.weight.quant_state.absmax[0] += 1
    assert base_fingerprint(model) != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_another_base_has_to_be_asked_for(kind: str) -> None:
    plain = tiny_model("llama")
    mask = mask_of(plain, only=is_matrix)
    model = quantised(plain, kind)
    with pytest.raises(IncompatibleRunError, match="other_base=True"):
        beside(model, mask)
    with pytest.raises(CoverageError if "bnb" in kind else IncompatibleRunError):
        sparsify(model, mask, other_base=True)
    name = "model.layers.0.mlp.up_proj.weight"
    odd = WeightMask({name: torch.tensor([3])}, {name: (16, 24)})
    with pytest.raises(IncompatibleRunError, match=r"\(16, 24\), the model has \(24, 16\)"):
        beside(model, odd, other_base=True)
    away = WeightMask({"away.weight": torch.tensor([3])}, {"away.weight": (2, 3)})
    with pytest.raises(IncompatibleRunError, match=r"no weight away\.weight"):
        beside(model, away, other_base=True)
    assert not hasattr(model, "sparse")
    assert not any("_values" in n for n, _ in model.named_parameters())


def test_quantised_weights_cannot_be_scored() -> None:
    with pytest.raises(CoverageError, match=r"form=.compose., other_base=True"):
        eligible_weights(quantised(tiny_model("llama"), "bnb 8 bit"), ["*_proj"])


def test_what_is_no_matrix_of_a_linear_map_is_refused() -> None:
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        model = tiny_model("llama")
        with pytest.raises(CoverageError, match=f"no entry can be trained beside {name}"):
            beside(model, mask_of(model, only=name.__eq__))
    convolution = nn.Sequential(nn.Conv1d(2, 3, 1))
    with pytest.raises(CoverageError, match="Conv1d does something else with it"):
        beside(convolution, mask_of(convolution, 0.9))
    model = tiny_model("gemma")
    head = WeightMask({"lm_head.weight": torch.tensor([3])}, {"lm_head.weight": (61, 16)})
    with pytest.raises(CoverageError, match="Embedding, Linear read it"):
        beside(model, head)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(CoverageError, match="Linear, Linear read it"):
        beside(tied, mask_of(tied, 0.9, only="0.weight".__eq__))


def test_options_that_mean_nothing_beside_a_matrix_are_refused() -> None:
    model = tiny_model("llama")
    mask = mask_of(model, only=is_matrix)
    with pytest.raises(ConfigError, match=r'decay_to="zero" does not go with form="compose"'):
        beside(model, mask, decay_to="zero")
    with pytest.raises(ConfigError, match=r'route="columns" does not go with form="compose"'):
        beside(model, mask, route="columns")
    with pytest.raises(ConfigError, match='there is no form "composed"'):
        refuse_options("auto", "base", "composed")


@pytest.mark.parametrize("to_base", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_given_back_with_what_was_beside_it(to_base: bool, dtype: torch.dtype) -> None:
    base = tiny_model("llama").to(dtype)
    model = beside(copy.deepcopy(base), mask_of(base, only=is_matrix))
    train(model)
    expected = bits(merge(copy.deepcopy(base), model.sparse.delta()))
    if dtype == torch.float32:
        assert_close(live(model), expected, rtol=0, atol=0)
    restore(model, to_base=to_base)
    assert type(model) is type(base)
    assert vars(model).keys() == vars(base).keys()
    assert_close(bits(model), bits(base) if to_base else expected, rtol=0, atol=0)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_quantised_weights_are_given_back_only_as_they_were() -> None:
    plain = tiny_model("llama")
    model = quantised(plain, "bnb 8 bit")
    beside(model, mask_of(plain, only=is_matrix), other_base=True)
    with pytest.raises(CoverageError, match="nothing can be added to quantised weights"):
        restore(model)
    restore(model, to_base=True)
    with pytest.raises(SelectionError, match="no chosen entries"):
        restore(model)


def test_copies_and_state_dicts_bring_everything_along() -> None:
    model = beside(tiny_model("llama"), mask_of(tiny_model("llama"), only=is_matrix))
    train(model)
    other = copy.deepcopy(model)
    fresh = beside(tiny_model("llama"), model.sparse.mask)
    result = fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    for each in (other, fresh):
        assert_close(deltas(each), deltas(model), rtol=0, atol=0)
    before = deltas(model)
    train(other)
    assert_close(deltas(model), before, rtol=0, atol=0)
    in_place = sparsify(tiny_model("llama"), model.sparse.mask, decay_to="base")
    with pytest.raises(IncompatibleRunError, match="another form"):
        fresh.load_state_dict(in_place.state_dict())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_what_is_live_is_what_is_saved(stored: str, tmp_path: Path) -> None:
    base = tiny_model("llama").bfloat16()
    model = beside(copy.deepcopy(base), mask_of(base, only=is_matrix))
    train(model)
    model.save_pretrained(tmp_path, dtype=stored)
    fresh = beside(base, model.sparse.mask)
    fresh.sparse.load(SparseDelta.load(tmp_path))
    assert_close(deltas(fresh), deltas(model), rtol=0, atol=0)


def test_every_linear_map_is_found_by_its_bare_name() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    plain = tiny_model("llama")
    names = {n for n in base_weights(plain) if is_matrix(n)} | {"lm_head.weight"}
    for model in (plain, get_peft_model(tiny_model("llama"), config), quantised(plain, "buffers")):
        assert linear_maps(model).keys() == names
    assert {m.input_axis for m in linear_maps(tiny_model("gpt2")).values()} == {0, 1}


@pytest.mark.parametrize(("family", "kind"), [("llama", "bnb 8 bit"), ("gpt2", None)])
def test_gradients_of_examples_are_those_of_the_loop(family: str, kind: str | None) -> None:
    """The engine needs a kernel of ours: none of theirs knows a quantised class."""
    plain, tokens = tiny_model(family).eval(), tiny_tokens(4)
    mask = mask_of(plain, only=matrices(plain))
    model = beside(plain if kind is None else quantised(plain, kind), mask, other_base=True).eval()
    with torch.no_grad():
        for values in model.sparse.parameters():
            values.add_(0.1 * torch.randn(values.shape))
    expected = loop_gradients(model, tokens)
    seen: dict[str, torch.Tensor] = {}

    def ask(name: str, rows: Rows) -> None:
        assert isinstance(rows, SparseRows)
        seen[name] = rows.dense()

    engine = GradientEngine(model)
    engine.run(collate(tokens, pad_id=0), ask)
    assert not engine.looped
    rtol = 1e-3 if kind is None else 0.2  # rounding to 8 bit depends on what else is in the batch
    assert seen.keys() == expected.keys()
    for name, found in seen.items():
        assert (found - expected[name]).norm() <= rtol * expected[name].norm(), name


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_what_is_added_in_a_layer_can_be_turned_down(factor: float) -> None:
    base = tiny_model("llama")
    model = beside(copy.deepcopy(base), mask_of(base, only=is_matrix))
    train(model)
    before = deltas(model)
    with torch.no_grad():
        with turned_down([response_of(trainable_layers(model)[1])], factor):
            found = batch_loss(model, BATCHES[0], "token")
        for name, entries in model.sparse.entries.items():
            entries.values.mul_(factor if "layers.1." in name else 1)
        assert_close(found, batch_loss(model, BATCHES[0], "token"), rtol=1e-6, atol=1e-6)
    assert before.keys() == deltas(model).keys()


@pytest.mark.parametrize(
    ("method", "kind"), [(SpielAG, SpielAdamW), (SpielMA, SM3)], ids=["ag", "ma"]
)
def test_entries_are_exchanged_as_they_are_in_place(
    method: type[SpielAG] | type[SpielMA], kind: type[torch.optim.Optimizer]
) -> None:
    found = []
    for form in ("in_place", "compose"):
        model = tiny_model("llama")
        mask = mask_of(model, 0.1, only=is_matrix)
        sparsify(model, mask, form=form, decay_to="base", route="gather")
        optimizer = kind(model.sparse.parameters(), lr=1e-2, eps=1e-4)
        with method(every=3, accumulate=1, steps=6).attach(model, optimizer):
            for number in range(6):
                batch_loss(model, tiny_batch(3, seed=number), "token").backward()
                optimizer.step()
                optimizer.zero_grad()
        assert model.sparse.is_exchanged
        found.append(model.sparse.delta())
    in_place, composed = found
    assert composed.mask() == in_place.mask()
    for name, delta in composed.deltas.items():
        assert_close(delta, in_place.deltas[name], rtol=1e-3, atol=1e-5)
    fresh = beside(tiny_model("llama"), mask)
    fresh.sparse.load(composed)
    assert_close(deltas(fresh), dict(composed.deltas), rtol=0, atol=0)
