"""The gates of layers: what they hand over, what they cost, and that they leave no trace."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from slow_gast import batch_loss
from tiny import tiny_batch, tiny_model, tiny_tokens, tiny_trainable
from torch import Tensor, nn

from selectune import GAST
from selectune.errors import CoverageError, SelectionError
from selectune.gradients.kernels import DenseRows, JointRows, LinearRows, Rows, ones
from selectune.training import gate
from selectune.training.gate import Gates
from selectune.training.layers import Layer, trainable_layers

# transformers 5.24 renamed it to `activation_checkpointing_enable`; 5.23 has the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

CHECKPOINTING = ("off", "reentrant", "non-reentrant")


def gast(**options: object) -> GAST:
    return GAST(**{"target": tiny_tokens(2, seed=9), "loss_weighting": "token", **options})


def trainable(kind: str = "lora", checkpointing: str = "off", dropout: float = 0.0) -> nn.Module:
    model = tiny_trainable("llama", kind)
    if checkpointing != "off":
        options = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = dropout
    return model.train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-7)


# What a model is, apart from the numbers in it.


def traces(model: nn.Module) -> list[Any]:
    """Return everything that a method could leave behind in a model."""
    found: list[Any] = []
    for name, module in model.named_modules():
        own = vars(module)
        parameters = [(key, id(p)) for key, p in own["_parameters"].items()]
        hooks = [
            [id(hook) for hook in own[key].values()]
            for key in sorted(own)
            if key.endswith("_hooks") and isinstance(own[key], dict)
        ]
        functions = [(k, id(v)) for k, v in own.items() if callable(v) and not k.startswith("_h")]
        found.append((name, module.training, parameters, hooks, functions))
    flags = [(n, type(p), p.requires_grad, p.is_leaf) for n, p in model.named_parameters()]
    return [*found, *flags]


class PlannedError(Exception):
    pass


def fail(error: type[BaseException]) -> Callable[..., None]:
    def hook(*_: object, **__: object) -> None:
        raise error

    return hook


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("form", ["separate", "two_pass"])
def test_the_model_comes_back_as_it_was(form: str, checkpointing: str) -> None:
    model = trainable("dora", checkpointing)
    before = traces(model)
    with gast(form=form, loss_weighting="auto").attach(model, sgd(model)) as session:
        assert traces(model) != before
        session.expect(tiny_batch().labels)
        batch_loss(model, tiny_batch(), "token").backward()
        session.end_step()
        session.close()
        session.close()
        assert traces(model) == before
    assert traces(model) == before
    model.zero_grad()
    batch_loss(model, tiny_batch(), "token").backward()


PLACES = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn", "model.layers.1", "lm_head"]


@pytest.mark.parametrize(
    ("checkpointing", "error"),
    [
        ("off", PlannedError),
        ("off", KeyboardInterrupt),
        ("reentrant", KeyboardInterrupt),
        ("non-reentrant", PlannedError),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_the_model_comes_back_after_a_forward_pass_that_fails(
    place: str, checkpointing: str, error: type[BaseException]
) -> None:
    model = trainable("full", checkpointing)
    before = traces(model)
    batch = tiny_batch(3)

    def run() -> None:
        with gast(pick="random").attach(model, sgd(model)) as session:
            for forward in (None, fail(error)):  # the first pass checks more than the others
                if forward is not None:
                    model.get_submodule(place).forward = forward
                session.expect(batch.labels)
                batch_loss(model, batch, "token").backward()

    with pytest.raises(error):
        run()
    del model.get_submodule(place).forward
    assert traces(model) == before
    model.zero_grad()
    batch_loss(model, batch, "token").backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("checkpointing", "error"),
    [("off", KeyboardInterrupt), ("reentrant", KeyboardInterrupt), ("non-reentrant", PlannedError)],
)
def test_the_model_comes_back_after_a_backward_pass_that_fails(
    checkpointing: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainable("lora", checkpointing)
    before = traces(model)
    batch = tiny_batch(3)

    def run() -> None:
        with gast().attach(model, sgd(model)) as session:
            session.expect(batch.labels)
            loss = batch_loss(model, batch, "token")
            monkeypatch.setattr(gate, "thin", fail(error))
            loss.backward()

    with pytest.raises(error):
        run()
    assert traces(model) == before


def test_training_goes_on_after_a_forward_pass_that_failed() -> None:
    model, batch = trainable(), tiny_batch(4)
    batch_loss(model, batch, "token").backward()
    plain = gradients(model)
    with gast(pick="all").attach(model, sgd(model)) as session:
        for error in (PlannedError, KeyboardInterrupt):
            model.get_submodule("model.model.layers.1.mlp").forward = fail(error)
            session.expect(batch.labels)
            with pytest.raises(error):
                batch_loss(model, batch, "token")
            del model.get_submodule("model.model.layers.1.mlp").forward
        session.begin_step(0)
        session.expect(batch.labels)
        batch_loss(model, batch, "token").backward()
        assert_close(gradients(model), plain)


def test_a_method_that_cannot_start_leaves_nothing_behind() -> None:
    model = trainable()
    before = traces(model)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(Exception, match="optimizer lacks"), gast().attach(model, optimizer):
        pass
    assert traces(model) == before


@pytest.mark.parametrize(("form", "weighting"), [("separate", "auto"), ("two_pass", "token")])
def test_the_random_numbers_of_training_stay_the_same(form: str, weighting: str) -> None:
    model = trainable(dropout=0.3)
    streams: list[Tensor] = []
    losses: list[float] = []
    method = gast(form=form, loss_weighting=weighting)
    for is_plain in (True, False):
        torch.manual_seed(3)
        started = torch.get_rng_state()
        attached = nothing() if is_plain else method.attach(model, sgd(model))
        with attached as session:
            assert torch.equal(torch.get_rng_state(), started)
            for number in range(2):
                batch = tiny_batch(4, seed=number)
                if session is not None:
                    session.expect(batch.labels)
                loss = batch_loss(model, batch, "token")
                loss.backward()
                losses.append(float(loss.detach()))
                if session is not None:
                    session.end_step()
                    session.begin_step(number + 1)
        streams.append(torch.get_rng_state())
        assert not torch.equal(streams[-1], started)  # dropout has drawn
    assert torch.equal(streams[0], streams[1])
    assert losses[:2] == losses[2:]


@contextmanager
def nothing() -> Iterator[None]:
    yield


# What is held at a time.


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("lora", "off"), ("dora", "reentrant"), ("full", "off"), ("full", "non-reentrant")],
)
def test_rows_of_one_layer_at_most_are_alive(
    kind: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainable(kind, checkpointing)
    alive = most = 0
    by_module: list[int] = []
    thin = gate.thin

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(rows: Rows) -> Rows:
        nonlocal alive, most
        found = thin(rows)
        assert isinstance(found, DenseRows | LinearRows)
        tensors = [found.G] if isinstance(found, DenseRows) else [found.X, found.D]
        for x in tensors:
            alive += x.numel()
            weakref.finalize(x, release, x.numel())
        most = max(most, alive)
        by_module.append(sum(x.numel() for x in tensors))
        return found

    monkeypatch.setattr(gate, "thin", counted)
    batch = tiny_batch(5)
    with gast().attach(model, sgd(model)) as session:
        for _ in range(2):
            session.expect(batch.labels)
            batch_loss(model, batch, "token").backward()
            assert alive == 0
        half = len(by_module) // 4  # two steps of two layers that are alike
        assert session.peak_rows == most == sum(by_module[:half])


def test_a_frozen_layer_costs_nothing() -> None:
    model, batch = trainable(), tiny_batch(4)
    seen: list[int] = []

    def deliver(layer: Layer, now: object, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
        seen.append(layer.index)
        return {name: r.combine(ones(r)) for name, r in rows.items()}

    layers = trainable_layers(model)
    gates = Gates(layers, current=lambda: (None, 4), deliver=deliver)
    for p in layers[0].parameters.values():
        p.requires_grad_(False)
    batch_loss(model, batch, "token").backward()
    assert seen == [1]
    assert all(p.grad is None for p in layers[0].parameters.values())
    for layer, wanted in ((layers[0], True), (layers[1], False)):
        for p in layer.parameters.values():
            p.requires_grad_(wanted)
    batch_loss(model, batch, "token").backward()
    assert seen == [1, 0]
    gates.close()


def test_layers_come_last_to_first_once_per_forward_pass() -> None:
    model, batch = trainable(), tiny_batch(4)
    seen: list[tuple[int, int]] = []
    number = 0

    def deliver(layer: Layer, now: int, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
        assert rows.keys() == layer.parameters.keys()
        assert all(r.n == 4 and r.shape == layer.parameters[n].shape for n, r in rows.items())
        seen.append((layer.index, now))
        return {}

    gates = Gates(trainable_layers(model), current=lambda: (number, 4), deliver=deliver)
    for number in range(2):  # noqa: B007
        batch_loss(model, batch, "token").backward()
    assert seen == [(1, 0), (0, 0), (1, 1), (0, 1)]
    assert all(p.grad is None for p in model.parameters())  # nothing was delivered
    gates.close()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_forward_passes_may_share_one_backward_pass(checkpointing: str) -> None:
    model = trainable("lora", checkpointing)
    batches = [tiny_batch(4, seed=1), tiny_batch(6, seed=2)]
    sum(batch_loss(model, batch, "token") for batch in batches).backward()
    plain = gradients(model)
    with gast(pick="all").attach(model, sgd(model)) as session:
        losses: list[Tensor] = []
        for batch in batches:
            session.expect(batch.labels)
            losses.append(batch_loss(model, batch, "token"))
        sum(losses).backward()
        assert_close(gradients(model), plain)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_evaluation_in_between_disturbs_nothing(checkpointing: str) -> None:
    model, batch = trainable("lora", checkpointing), tiny_batch(4)
    batch_loss(model, batch, "token").backward()
    plain = gradients(model)
    expected = float(batch_loss(model.eval(), tiny_batch(2), "token").detach())
    model.train()
    with gast(pick="all").attach(model, sgd(model)) as session:
        session.expect(batch.labels)
        loss = batch_loss(model, batch, "token")
        with torch.no_grad():
            model.eval()
            assert float(batch_loss(model, tiny_batch(2), "token")) == expected
            model.train()
        loss.backward()
        assert_close(gradients(model), plain)


def test_gradients_add_to_those_that_stand_there() -> None:
    model, batch = trainable(), tiny_batch(4)
    batch_loss(model, batch, "token").backward()
    plain = gradients(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    with gast(pick="all").attach(model, sgd(model)) as session:
        session.expect(batch.labels)
        batch_loss(model, batch, "token").backward()
    assert_close(gradients(model), {n: g + 1 for n, g in plain.items()})


def test_a_target_pass_touches_no_gradient() -> None:
    model = trainable("full")
    with gast().attach(model, sgd(model)):
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_half_precision_gradients_follow_the_plain_ones(kind: str) -> None:
    model, batch = trainable(kind), tiny_batch(6)

    def backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = batch_loss(model, batch, "token")
        loss.backward()

    backward()
    plain = gradients(model)
    with gast(pick="all").attach(model, sgd(model), precision="bfloat16") as session:
        session.expect(batch.labels)
        backward()
        found = gradients(model)
    assert found.keys() == plain.keys()
    largest = max(float(g.norm()) for g in plain.values())
    for name, want in plain.items():
        assert found[name].dtype == want.dtype
        assert (found[name] - want).norm() <= 0.02 * want.norm() + 2e-3 * largest


# Modules that are used in an odd way.


class Extra(nn.Module):
    """One more Linear in a block, and a way to use it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.way, self.linear = way, nn.Linear(16, 16)
        self.bare = nn.Parameter(torch.randn(16, 16) * 0.3) if way == "bare" else None

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "twice":
                return x + self.linear(self.linear(x))
            case "flat":
                return x + self.linear(x.flatten(0, 1)).view_as(x)
            case "mixed":
                flat = self.linear(x.transpose(0, 1).flatten(0, 1))
                return x + flat.view(*x.shape[1::-1], 16).transpose(0, 1)
            case "functional":
                return x + self.linear(x) + nn.functional.linear(x, self.linear.weight)
            case "broadcast":
                return x + self.linear(torch.ones(1, 16))
            case "elsewhere":  # as in cross-attention to something that does not train
                return x + self.linear(torch.ones(*x.shape))
            case "bare":
                return x + self.linear(x) + x @ self.bare
            case _:
                return x + self.linear(x)


def with_extra(way: str) -> nn.Module:
    model = tiny_model("llama").requires_grad_(False).train()
    for layer in model.model.layers:
        layer.extra = Extra(way)
        layer.mlp.register_forward_hook(lambda _, args, output, m=layer.extra: m(output))
    return model


@pytest.mark.parametrize("way", ["plain", "twice", "flat"])
def test_odd_uses_that_are_covered_give_the_plain_gradient(way: str) -> None:
    model = with_extra(way)
    batch = tiny_batch(5)
    batch_loss(model, batch, "token").backward()
    plain = gradients(model)
    assert len(plain) == 4
    with gast(pick="all").attach(model, sgd(model)) as session:
        session.expect(batch.labels)
        batch_loss(model, batch, "token").backward()
        assert_close(gradients(model), plain)


@pytest.mark.parametrize("way", ["mixed", "functional", "broadcast", "elsewhere", "bare"])
def test_odd_uses_that_are_not_covered_are_refused_by_name(way: str) -> None:
    model = with_extra(way)
    batch = tiny_batch(5)
    name = "extra.bare" if way == "bare" else "extra.linear"
    with gast().attach(model, sgd(model)) as session:
        session.expect(batch.labels)
        with pytest.raises(CoverageError, match=name):
            batch_loss(model, batch, "token").backward()
    assert all(p.grad is None for p in model.model.layers[1].parameters())


def test_a_module_of_one_layer_that_another_place_uses_is_refused() -> None:
    model = with_extra("plain")
    model.model.norm.register_forward_hook(
        lambda _, args, output: model.model.layers[0].extra.linear(output)
    )
    batch = tiny_batch(5)
    with gast().attach(model, sgd(model)) as session:
        session.expect(batch.labels)
        with pytest.raises(CoverageError, match="outside of their layer"):
            batch_loss(model, batch, "token").backward()


def test_a_parameter_of_two_layers_is_refused() -> None:
    model = with_extra("plain")
    model.model.layers[1].extra.linear.weight = model.model.layers[0].extra.linear.weight
    with pytest.raises(SelectionError, match="one parameter"), gast().attach(model, sgd(model)):
        pass


def test_uses_of_a_module_add_up_before_picking() -> None:
    model = with_extra("twice")
    batch = tiny_batch(4)
    seen: list[Rows] = []

    def deliver(layer: Layer, now: object, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
        seen.extend(r for n, r in rows.items() if n.endswith("weight"))
        return {}

    gates = Gates(trainable_layers(model), current=lambda: (None, 4), deliver=deliver)
    batch_loss(model, batch, "token").backward()
    assert all(isinstance(rows, JointRows) and len(rows.parts) == 2 for rows in seen)
    gates.close()
