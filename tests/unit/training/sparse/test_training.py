"""Whatever trains the chosen entries: all others stay what they are, and they equal the twin's."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_gast import batch_loss
from slow_sparse import bits, chosen, is_matrix, live, mask_of, matrices, slow_train
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.testing import assert_close

from selectune.data import Batch
from selectune.errors import TrainingError
from selectune.training.sparse import SparseModel, sparsify
from selectune.training.sparse.entries import DecayTo, Form
from selectune.training.sparse.routes import Route
from selectune.weights.base import base_weights
from selectune.weights.mask import WeightMask

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
FORMS: tuple[Form, ...] = ("in_place", "compose")
BATCHES = [tiny_batch(3, seed=s) for s in range(8)]


class ThroughData(torch.optim.Optimizer):
    """Steps as optimizers did for years: past the version counters."""

    def __init__(self, params: list[nn.Parameter], weight_decay: float = 0.0) -> None:
        super().__init__(params, {})
        self.decay = weight_decay

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.mul_(1 - 0.01 * self.decay).sub_(p.grad.data, alpha=0.01)


# Steps that divide by the size of a gradient multiply its rounding where it is 0 but for that.
E = {"eps": 1e-3}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw": lambda p, d: torch.optim.AdamW(p, lr=1e-2, weight_decay=d, **E),
    "adamw fused": lambda p, d: torch.optim.AdamW(p, lr=1e-2, weight_decay=d, **E, fused=True),
    "adamw foreach": lambda p, d: torch.optim.AdamW(p, lr=1e-2, weight_decay=d, **E, foreach=True),
    "adam amsgrad": lambda p, d: torch.optim.Adam(p, lr=1e-2, weight_decay=d, **E, amsgrad=True),
    "sgd": lambda p, d: torch.optim.SGD(p, lr=1e-1, weight_decay=d),
    "sgd nesterov": lambda p, d: torch.optim.SGD(
        p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=d
    ),
    "rmsprop": lambda p, d: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, weight_decay=d, **E),
    "adagrad": lambda p, d: torch.optim.Adagrad(p, lr=1e-2, weight_decay=d, **E),
    "nadam": lambda p, d: torch.optim.NAdam(p, lr=1e-2, weight_decay=d, **E),
    "adamax": lambda p, d: torch.optim.Adamax(p, lr=1e-2, weight_decay=d, **E),
    "through data": ThroughData,
}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Batch]],
    *,
    clip: float | None = None,
    skip: frozenset[int] = frozenset(),
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    for number, batches in enumerate(steps):
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            loss = batch_loss(model, batch, "token") / len(batches)
            scaler.scale(loss).backward()
        if number in skip:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        if clip is not None and number not in skip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update(1.0)


def assert_frozen(model: nn.Module, mask: WeightMask, before: dict[str, Tensor]) -> None:
    for name, p in base_weights(model).items():
        outside = ~chosen(mask, name, p.shape)
        assert torch.equal(p.detach()[outside], before[name][outside]), name


def assert_up_to_date(model: SparseModel) -> None:
    if model.sparse.form == "compose":
        return
    for name, entries in model.sparse.entries.items():
        held = base_weights(model)[name].detach().flatten()[entries.index]
        assert torch.equal(held, entries.masters().to(held.dtype)), name


def steps_of(n: int, n_micro: int = 1) -> list[list[Batch]]:
    return [[BATCHES[(k * n_micro + m) % 8] for m in range(n_micro)] for k in range(n)]


@settings(max_examples=40)
@given(
    kind=st.sampled_from(list(OPTIMIZERS)),
    decay=st.sampled_from([0.0, 0.3]),
    clip=st.sampled_from([None, 0.5]),
    n_micro=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    route=st.sampled_from(["gather", "sampled"]),
    decay_to=st.sampled_from(["zero", "base"]),
    density=st.sampled_from([0.02, 0.5]),
    skipped=st.sampled_from([None, 0, 1]),
    resumed=st.booleans(),
    family=st.sampled_from(["llama", "gpt2"]),
    form=st.sampled_from(["in_place", "compose"]),
)
def test_every_entry_outside_of_the_mask_stays_bit_identical(
    kind: str,
    decay: float,
    clip: float | None,
    n_micro: int,
    dtype: torch.dtype,
    route: Route,
    decay_to: DecayTo,
    density: float,
    skipped: int | None,
    resumed: bool,
    family: str,
    form: Form,
) -> None:
    base = tiny_model(family).to(dtype)
    is_chosen = matrices(base) if form == "compose" else bits(base).__contains__
    before, mask = bits(base), mask_of(base, density, only=is_chosen)
    decay_to = "base" if form == "compose" else decay_to
    skip = frozenset({skipped} - {None})
    steps = steps_of(3, n_micro)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sparsify(copy.deepcopy(base), mask, route=route, decay_to=decay_to, form=form)
        # Everything is given to the optimizer, as people do.
        return model, OPTIMIZERS[kind](list(model.parameters()), decay)

    model, optimizer = fresh()
    train(model, optimizer, steps[:2], clip=clip, skip=skip)
    if resumed:
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, optimizer = fresh()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    train(model, optimizer, steps[2:], clip=clip)
    assert_frozen(model, mask if form == "in_place" else WeightMask({}, mask.shapes), before)
    assert_up_to_date(model)
    assert model.sparse.moved() > 0
    if dtype == torch.float32:
        twin = copy.deepcopy(base)
        make: Make = lambda p: OPTIMIZERS[kind](p, decay)  # noqa: E731
        slow_train(twin, mask, steps, make, clip=clip, decay_to=decay_to, skip=skip)
        assert_close(live(model), bits(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["gather", "sampled"])
@pytest.mark.parametrize(
    ("form", "decay_to"), [("in_place", "zero"), ("in_place", "base"), ("compose", "base")]
)
def test_without_decay_it_is_masked_dense_adamw(
    route: Route, form: Form, decay_to: DecayTo
) -> None:
    model, twin = tiny_model("llama"), tiny_model("llama")
    mask = mask_of(model, only=is_matrix)
    make: Make = lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4, weight_decay=0.0)  # noqa: E731
    sparsify(model, mask, route=route, decay_to=decay_to, form=form)
    train(model, make(model.sparse.parameters()), steps_of(5))
    slow_train(twin, mask, steps_of(5), make)
    assert_close(live(model), bits(twin), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt", "qwen3"])
def test_density_one_is_plain_training_decay_included(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    mask = mask_of(model, 1.0)
    assert mask.density == 1
    sparsify(model, mask, route="gather")
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.5)
        train(each, optimizer, steps_of(4), clip=0.5)
    assert_close(bits(model), bits(plain), rtol=1e-5, atol=1e-6)


def test_weights_in_bf16_have_masters_in_fp32() -> None:
    model, twin = (tiny_model("llama").bfloat16() for _ in range(2))
    mask = mask_of(model, only=is_matrix)
    make: Make = lambda p: torch.optim.SGD(p, lr=1e-3)  # noqa: E731
    sparsify(model, mask, route="gather")
    train(model, make(model.sparse.parameters()), steps_of(6))
    slow_train(twin, mask, steps_of(6), make)
    assert {e.values.dtype for e in model.sparse.entries.values()} == {torch.float32}
    assert_close(bits(model), bits(twin), rtol=0, atol=0)


def test_small_steps_add_up_where_bf16_alone_would_round_them_away() -> None:
    model = tiny_model("llama").bfloat16()
    largest = {
        name: p.detach().abs().flatten().float().topk(8).indices.sort().values
        for name, p in base_weights(model).items()
        if is_matrix(name)
    }
    shapes = {name: tuple(base_weights(model)[name].shape) for name in largest}
    mask = WeightMask(largest, shapes)
    alone = copy.deepcopy(model)
    train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-4, weight_decay=0.0), steps_of(20))
    before = bits(model)
    sparsify(model, mask)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0), steps_of(20))
    rounded = sum(
        int((bits(alone)[n].flatten()[i] != before[n].flatten()[i]).sum())
        for n, i in mask.indices.items()
    )
    assert model.sparse.moved() > 2 * rounded


def test_a_step_counts_at_once_for_whoever_reads_the_weight() -> None:
    model = sparsify(tiny_model("gpt2"), mask_of(tiny_model("gpt2")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with torch.no_grad():
        first = batch_loss(model, BATCHES[0], "token")
    train(model, optimizer, steps_of(2))
    assert_up_to_date(model)
    with torch.inference_mode():
        assert batch_loss(model, BATCHES[0], "token") < first


def test_a_loop_without_an_optimizer_is_seen_at_the_next_forward_pass() -> None:
    model, twin = tiny_model("llama"), tiny_model("llama")
    mask = mask_of(model)
    sparsify(model, mask, route="gather")
    for (batch,) in steps_of(3):
        batch_loss(model, batch, "token").backward()
        with torch.no_grad():
            for p in model.sparse.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    model.sparse.sync()
    slow_train(twin, mask, steps_of(3), lambda p: torch.optim.SGD(p, lr=0.1))
    assert_close(bits(model), bits(twin), rtol=1e-5, atol=1e-6)


def test_a_copy_from_a_flat_buffer_after_a_foreign_step_is_found() -> None:
    """As ZeRO does: its optimizer holds a buffer of its own, and copies past the counters."""
    model = sparsify(tiny_model("llama"), mask_of(tiny_model("llama")))
    values = model.sparse.parameters()
    buffer = nn.Parameter(torch.cat([p.detach() for p in values]))
    optimizer = torch.optim.SGD([buffer], lr=0.1)
    batch_loss(model, BATCHES[0], "token").backward()
    buffer.grad = torch.cat([p.grad for p in values])
    optimizer.step()
    for p, part in zip(values, buffer.detach().split([p.numel() for p in values]), strict=True):
        p.data.copy_(part)
    with torch.no_grad():
        batch_loss(model, BATCHES[1], "token")
    assert_up_to_date(model)


def test_a_foreign_step_between_forward_and_backward_does_no_harm() -> None:
    model = sparsify(tiny_model("llama"), mask_of(tiny_model("llama")))
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    loss = batch_loss(model, BATCHES[0], "token")
    torch.optim.SGD([other], lr=0.1).step()
    with torch.no_grad():
        batch_loss(model, BATCHES[1], "token")
    loss.backward()


def test_closures_see_every_trial_of_a_line_search() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    mask = mask_of(model, 1.0, only=is_matrix)
    sparsify(model, mask, route="gather")
    for name, p in plain.named_parameters():
        p.requires_grad_(is_matrix(name))
    for each in (model, plain):
        optimizer = torch.optim.LBFGS([p for p in each.parameters() if p.requires_grad], lr=0.1)

        def closure(each: nn.Module = each) -> Tensor:
            each.zero_grad()
            loss = batch_loss(each, BATCHES[0], "token")
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_close(bits(model), bits(plain), rtol=1e-3, atol=1e-3)
    assert_up_to_date(model)


def test_an_optimizer_from_before_is_told() -> None:
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch_loss(model, BATCHES[0], "token").backward()  # and gradients of everything are about
    before, mask = bits(model), mask_of(model)
    sparsify(model, mask)
    for (batch,) in steps_of(2):
        batch_loss(model, batch, "token").backward()
        optimizer.step()
    with pytest.raises(TrainingError, match="made before `sparsify`"):
        optimizer.step()
    assert_frozen(model, WeightMask({}, mask.shapes), before)


def test_values_without_a_gradient_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = sparsify(tiny_model("llama"), mask_of(tiny_model("llama"), 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.model.layers[0].mlp(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    assert "had no gradient for the chosen entries" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", ["gather", "sampled"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_activation_checkpointing_changes_nothing(
    reentrant: bool, route: Route, form: Form
) -> None:
    found = []
    for checkpoints in (False, True):
        model = tiny_model("llama").train()
        only = is_matrix if form == "compose" else bits(model).__contains__
        sparsify(model, mask_of(model, only=only), route=route, form=form)
        if checkpoints:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps_of(3, 2))
        found.append(live(model))
    assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ["gather", "sampled"])
def test_autocast_trains_as_it_does_plainly(route: Route, form: Form) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    mask = mask_of(model, 1.0, only=is_matrix)
    sparsify(model, mask, route=route, form=form)
    losses = []
    for each in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = batch_loss(each, BATCHES[0], "token")
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for name, entries in model.sparse.entries.items():
        expected = base_weights(plain)[name].grad.flatten()
        assert entries.values.grad.dtype == torch.float32
        if route == "gather":
            assert_close(entries.values.grad, expected, rtol=0.02, atol=1e-4)
        else:
            error = (entries.values.grad - expected).norm()
            assert error < 0.03 * expected.norm(), name
