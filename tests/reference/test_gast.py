"""GAST against the one-example loop: gradients, scores, picks, and every form of the same step."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from loops import loop_gradients
from slow_gast import (
    batch_loss,
    flat,
    parts,
    slow_cosines,
    slow_count,
    slow_gram,
    slow_greedy,
    slow_inclusion,
    slow_layers,
    slow_mean,
    slow_odds,
    slow_scores,
    slow_standardise,
    slow_target,
    slow_topk,
    slow_weights,
)
from tiny import FAMILIES, KINDS, tiny_batch, tiny_tokens, tiny_trainable
from torch import Tensor, nn

from selectune import GAST, GREATS
from selectune.data import Batch, Tokens, collate
from selectune.errors import (
    ConfigError,
    CoverageError,
    DataError,
    IncompatibleRunError,
    SelectionError,
)
from selectune.training.aligned import AlignedSession
from selectune.training.layers import trainable_layers
from selectune.training.method import Method, Scene, Session
from selectune.training.sources import TokenSource

# transformers 5.24 renamed it to `activation_checkpointing_enable`; 5.23 has the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

TARGETS = tiny_tokens(4, seed=9)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn shape checks off: each hook is compiled anew with them, ten times the cost of a step.

    The same code runs under them in `unit/training`.
    """
    monkeypatch.setattr(jaxtyping, "jaxtyped", lambda **_: lambda function: function)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@dataclass
class Step:
    """What one step left behind."""

    gradients: dict[str, Tensor]
    facts: dict[str, Any]
    losses: list[float]
    target: dict[str, Tensor]

    def picks(self, layer: int) -> list[int]:
        return parts(self.facts["picks"][str(layer)])


def sgd(model: nn.Module, rate: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)


def step(
    model: nn.Module,
    batches: Sequence[Batch],
    method: GAST | None = None,
    *,
    weighting: str = "token",
    seed: int = 0,
    number: int = 0,
    rate: float = 0.1,
    scale: float = 1.0,
) -> Step:
    """Take the gradients of one step of a plain loop, with the method around it or without."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    losses: list[float] = []

    def forward_and_backward(session: AlignedSession | None) -> None:
        for batch in batches:
            if session is not None:
                session.expect(batch.labels, batch.ids)
            loss = batch_loss(model, batch, weighting) / len(batches)
            (scale * loss).backward()
            losses.append(float(loss.detach()))

    facts: dict[str, Any] = {}
    target: dict[str, Tensor] = {}
    if method is None:
        forward_and_backward(None)
    else:
        with method.attach(model, sgd(model, rate), seed=seed, step=number) as session:
            assert isinstance(session, AlignedSession)
            forward_and_backward(session)
            facts, target = session.end_step(), dict(session.target.gradients)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(gradients, facts, losses, target)


def gast(**options: object) -> GAST:
    return GAST(**{"target": TARGETS, **options})


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative error of a parameter; noise in a tiny one counts less."""
    assert found.keys() == expected.keys()
    largest = max(float(e.norm()) for e in expected.values())
    errors = [
        float((found[n].double() - e).norm()) / max(float(e.norm()), 1e-2 * largest)
        for n, e in expected.items()
    ]
    return max(errors)


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """Set every dropout there is: of adapters, of residuals, of attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if isinstance(module, nn.ModuleDict) and "default" in module:
            module["default"] = (
                nn.Dropout(p) if isinstance(module["default"], nn.Identity) else module["default"]
            )
        if "attention_dropout" in vars(module):
            module.attention_dropout = p
    return model


# 1. Everything picked is training without a method.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_examples_give_the_plain_gradient(family: str, kind: str) -> None:
    model = tiny_trainable(family, kind).train()  # GPT-2 comes with dropout
    for weighting, n_micro, keep, pick in (
        ("token", 1, 0.5, "all"),
        ("token", 2, 1.0, "softmax"),
        ("example", 1, 1.0, "softmax"),
        ("example", 2, 0.5, "all"),
    ):
        batches = [tiny_batch(4, seed=k) for k in range(n_micro)]
        plain = step(model, batches, weighting=weighting)
        found = step(model, batches, gast(keep=keep, pick=pick), weighting=weighting)
        assert worst_error(found.gradients, plain.gradients) <= 1e-6
        assert found.losses == plain.losses
        assert found.facts["picks"] == {"0": "1" * 4 * n_micro, "1": "1" * 4 * n_micro}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("family", "kind", "weighting", "n_micro"),
    [
        ("llama", "lora", "token", 1),
        ("gpt2", "dora", "token", 2),
        ("opt", "full", "example", 2),
    ],
)
def test_all_examples_give_the_plain_gradient_whatever_the_loop(
    family: str, kind: str, weighting: str, n_micro: int,
    checkpointing: str, side: str, dropout: float,
) -> None:  # fmt: skip
    model = with_dropout(tiny_trainable(family, kind), dropout).train()
    checkpoint(model, checkpointing)
    batches = [tiny_batch(4, seed=k, side=side) for k in range(n_micro)]
    plain = step(model, batches, weighting=weighting)
    # Left padding moves the masks of dropout: weights cannot be found out, and must be said.
    method = gast(keep=1.0, pick="all", loss_weighting=weighting)
    found = step(model, batches, method, weighting=weighting)
    assert worst_error(found.gradients, plain.gradients) <= 1e-6
    assert found.losses == plain.losses


def checkpoint(model: nn.Module, kind: str) -> None:
    if kind != "off":
        options = {"use_reentrant": kind == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()


def test_all_examples_give_the_plain_gradient_in_fp64() -> None:
    model = tiny_trainable("gpt2", "full").double().train()
    plain = step(model, [tiny_batch()])
    found = step(model, [tiny_batch()], gast(keep=1.0, pick="all"))
    assert worst_error(found.gradients, plain.gradients) <= 1e-12


@pytest.mark.parametrize("form", ["separate", "two_pass"])
def test_all_examples_give_the_plain_loss_curve(form: str) -> None:
    plain, found = (with_dropout(tiny_trainable("llama", "lora"), 0.1).train() for _ in range(2))
    curves: list[list[float]] = []
    for model in (plain, found):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(5)
        curve: list[float] = []

        def train(session: AlignedSession | None, model=model, optimizer=optimizer, curve=curve):  # noqa: ANN001, ANN202
            for number in range(5):
                batch = tiny_batch(4, seed=number)
                if session is not None:
                    session.expect(batch.labels)
                loss = batch_loss(model, batch, "token")
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                curve.append(float(loss.detach()))

        if model is plain:
            train(None)
        else:
            with gast(keep=1.0, form=form).attach(model, optimizer) as session:
                train(session)
        curves.append(curve)
    assert curves[0][-1] != curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


# 2. The gradient of the picks is that of exactly these examples.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_learns_the_mean_of_exactly_its_picks(family: str, kind: str) -> None:
    model = with_dropout(tiny_trainable(family, kind), 0.0).train()
    items = tiny_tokens(7)
    rows = loop_gradients(model, items)
    for weighting in ("token", "example"):
        weights = slow_weights(items, weighting)
        found = step(model, [collate(items, pad_id=0)], gast(), weighting=weighting)
        expected = slow_mean(
            rows, weights, range(7), sorted(rows)
        )  # outside of layers: all of them
        for layer, names in enumerate(slow_layers(model)):
            picked = found.picks(layer)
            assert len(picked) == slow_count(0.5, 7)
            expected |= slow_mean(rows, weights, picked, names)
        assert worst_error(found.gradients, expected) <= 1e-5


def test_a_layer_learns_the_mean_of_its_picks_in_fp64() -> None:
    model = with_dropout(tiny_trainable("gpt2", "lora"), 0.0).double().train()
    items = tiny_tokens(7)
    rows = loop_gradients(model, items)
    found = step(model, [collate(items, pad_id=0)], gast())
    expected: dict[str, Tensor] = {}
    for layer, names in enumerate(slow_layers(model)):
        expected |= slow_mean(rows, slow_weights(items, "token"), found.picks(layer), names)
    assert worst_error(found.gradients, expected) <= 1e-9


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("weighting", ["token", "example"])
def test_micro_batches_are_picked_from_one_by_one(weighting: str, checkpointing: str) -> None:
    model = tiny_trainable("llama", "lora").train()
    checkpoint(model, checkpointing)
    groups = [tiny_tokens(5, seed=1), tiny_tokens(6, seed=2)]
    batches = [collate(items, pad_id=0) for items in groups]
    found = step(model, batches, gast(), weighting=weighting)
    reference = tiny_trainable("llama", "lora")
    for layer, names in enumerate(slow_layers(reference)):
        line = found.facts["picks"][str(layer)]
        expected: dict[str, Tensor] = {}
        for items, picked in zip(groups, (parts(line[:5]), parts(line[5:])), strict=True):
            assert len(picked) == slow_count(0.5, len(items))
            rows = loop_gradients(reference, items)
            mean = slow_mean(rows, slow_weights(items, weighting), picked, names)
            expected = {n: expected.get(n, 0) + g / 2 for n, g in mean.items()}
        assert worst_error({n: found.gradients[n] for n in names}, expected) <= 1e-5


def test_aggregates_differ_by_the_factor_of_their_picks() -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(8)
    rows = loop_gradients(model, items)
    weights = slow_weights(items, "token")
    shares = [w / sum(weights) for w in weights]
    share = step(model, [collate(items, pad_id=0)], gast(aggregate="share", keep=3))
    for layer, names in enumerate(slow_layers(model)):
        assert len(share.picks(layer)) == 3
        expected = {n: sum(shares[k] * rows[n][k] for k in share.picks(layer)) for n in names}
        assert worst_error({n: share.gradients[n] for n in names}, expected) <= 1e-5


# 3. Scores and picks.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_scores_are_inner_products_with_the_mean_target_gradient(family: str, kind: str) -> None:
    model = with_dropout(tiny_trainable(family, kind), 0.0).train()
    items = tiny_tokens(6)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    found = step(model, [collate(items, pad_id=0)], gast(pick="topk"))
    for layer, names in enumerate(slow_layers(model)):
        torch.testing.assert_close(
            flat(found.target, names), flat(target, names), rtol=1e-4, atol=1e-6
        )
        scores = slow_scores(rows, target, names)
        z = slow_standardise(scores)
        assert found.facts["alignment_mean"][layer] == pytest.approx(np.mean(scores), rel=1e-3)
        assert found.facts["alignment_std"][layer] == pytest.approx(np.std(scores), rel=1e-4)
        assert found.facts["max_z"][layer] == pytest.approx(max(map(abs, z)), rel=1e-3)
        assert found.picks(layer) == slow_topk(scores, 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("weighting", ["token", "example"])
def test_how_the_loss_weighs_examples_does_not_reach_the_scores(weighting: str, side: str) -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(6)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    batch = collate(items, pad_id=0, side=side)
    found = step(model, [batch], gast(pick="topk"), weighting=weighting, scale=3.7)
    for layer, names in enumerate(slow_layers(model)):
        scores = slow_scores(rows, target, names)
        z = slow_standardise(scores)
        assert found.facts["max_z"][layer] == pytest.approx(max(map(abs, z)), rel=1e-3)
        assert found.picks(layer) == slow_topk(scores, 3)


def test_cosine_scores() -> None:
    model = tiny_trainable("llama", "full").train()
    items = tiny_tokens(8)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    found = step(model, [collate(items, pad_id=0)], gast(pick="topk", score="cosine"))
    dots = step(model, [collate(items, pad_id=0)], gast(pick="topk"))
    for layer, names in enumerate(slow_layers(model)):
        scores = slow_cosines(rows, target, names)
        assert found.facts["alignment_mean"][layer] == pytest.approx(np.mean(scores), rel=1e-3)
        assert found.picks(layer) == slow_topk(scores, 4)
    assert found.facts["picks"] != dots.facts["picks"]


def test_modules_pick_by_themselves() -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(8)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    found = step(model, [collate(items, pad_id=0)], gast(pick="topk", granularity="module"))
    expected: dict[str, Tensor] = {}
    picks = set()
    for name in rows:
        picked = slow_topk(slow_scores(rows, target, [name]), 4)
        picks.add(tuple(picked))
        expected |= slow_mean(rows, slow_weights(items, "token"), picked, [name])
    assert len(picks) > 3
    assert worst_error(found.gradients, expected) <= 1e-5


def test_draws_follow_the_twins_odds() -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(6)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    batch = collate(items, pad_id=0)
    n_steps = 100
    counts = np.zeros((2, 6))
    sums: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    layers = slow_layers(model)
    differ = 0
    with gast(temperature=0.7, loss_weighting="example").attach(model, sgd(model)) as session:
        for number in range(n_steps):
            session.begin_step(number)
            session.expect(batch.labels)
            model.zero_grad()
            batch_loss(model, batch, "example").backward()
            picks = session.end_step()["picks"]
            differ += picks["0"] != picks["1"]
            for layer in range(2):
                counts[layer, parts(picks[str(layer)])] += 1
                got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                sums[layer] = sums[layer] + flat(got, layers[layer])
    assert differ > n_steps / 2
    for layer, names in enumerate(layers):
        odds = np.array(slow_inclusion(slow_odds(slow_scores(rows, target, names), 0.7), 3))
        error = np.sqrt(odds * (1 - odds) / n_steps)
        assert (np.abs(counts[layer] / n_steps - odds) < 4 * error + 1e-9).all()
        # The tilt: in the mean the layer moves further towards the target than plain training.
        towards = flat(target, names)
        plain = flat(slow_mean(rows, [1.0] * 6, range(6), names), names)
        mean = sum(
            odds[n] / 3 * flat({name: rows[name][n] for name in names}, names) for n in range(6)
        )
        assert mean @ towards > plain @ towards
        assert sums[layer] / n_steps @ towards > plain @ towards


# 4. The forms of one step.


@pytest.mark.parametrize("weighting", ["token", "example"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_passes_equal_a_separate_target_pass(kind: str, weighting: str) -> None:
    model = tiny_trainable("llama", kind).train()
    batches = [tiny_batch(6, seed=k) for k in (3, 4)]
    steps = [
        step(model, batches, gast(form=form), weighting=weighting)
        for form in ("separate", "two_pass")
    ]
    assert steps[0].facts["picks"] == steps[1].facts["picks"]
    assert worst_error(steps[1].gradients, steps[0].gradients) <= 1e-6
    assert steps[1].facts["max_z"] == pytest.approx(steps[0].facts["max_z"], rel=1e-3)
    for key in ("alignment_mean", "alignment_std"):
        # The training loss is half as large in each of two micro-batches.
        half = [x / 2 for x in steps[1].facts[key]]
        assert half == pytest.approx(steps[0].facts[key], rel=1e-3)


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_targets_in_the_batch_equal_a_separate_target_pass(weighting: str) -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(6, seed=3)
    separate = step(model, [collate(items, pad_id=0)], gast(pick="topk"), weighting=weighting)
    joint = collate([*items, *TARGETS], pad_id=0)
    found = step(model, [joint], gast(pick="topk", form="concat"), weighting=weighting)
    assert found.facts["picks"] == separate.facts["picks"]
    for key in ("alignment_mean", "alignment_std", "max_z"):
        assert found.facts[key] == pytest.approx(separate.facts[key], rel=1e-3)
    weights = slow_weights([*items, *TARGETS], weighting)
    smaller = sum(weights[:6]) / sum(weights)
    expected = {n: g * smaller for n, g in separate.gradients.items()}
    assert worst_error(found.gradients, expected) <= 1e-5


def test_target_gradients_stay_between_refreshes() -> None:
    model = tiny_trainable("llama", "lora").train()
    optimizer = sgd(model, 0.5)
    pool = TokenSource(tiny_tokens(12, seed=4), pad_id=0)
    seen: list[dict[str, Tensor]] = []
    cosines: list[bool] = []
    items = tiny_tokens(6)
    batch = collate(items, pad_id=0)
    with GAST(refresh_every=2, pick="topk").attach(model, optimizer, pool=pool) as session:
        for _ in range(4):
            model.zero_grad()
            session.expect(batch.labels)
            rows = loop_gradients(copy.deepcopy(stripped(model)), items)
            batch_loss(model, batch, "token").backward()
            facts = session.end_step()
            cosines.append("target_cosine" in facts)
            seen.append(dict(session.target.gradients))
            for layer, names in enumerate(slow_layers(model)):
                scores = slow_scores(rows, seen[-1], names)
                assert parts(facts["picks"][str(layer)]) == slow_topk(scores, 3)
            optimizer.step()
    assert cosines == [False, False, True, False]
    for a, b, same in ((0, 1, True), (1, 2, False), (2, 3, True)):
        assert all(torch.equal(seen[a][n], seen[b][n]) is same for n in seen[a])


def stripped(model: nn.Module) -> nn.Module:
    """Return a model of the same weights without hooks."""
    plain = tiny_trainable("llama", "lora")
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_refresh_every_step_is_the_default() -> None:
    model = tiny_trainable("llama", "lora").train()
    one, two = (
        step(model, [tiny_batch()], gast(refresh_every=m), number=4) for m in (1, 2)
    )  # step 4 is due for both
    assert one.facts["picks"] == two.facts["picks"]
    assert all(torch.equal(one.gradients[n], two.gradients[n]) for n in one.gradients)


def test_momentum_mixes_old_and_new_target_gradients() -> None:
    model = tiny_trainable("llama", "lora").train()
    pool = TokenSource(tiny_tokens(12, seed=4), pad_id=0)
    found: list[dict[str, Tensor]] = []
    for momentum in (0.0, 0.75):
        method = GAST(momentum=momentum, pick="softmax")
        with method.attach(model, sgd(model), pool=pool) as session:
            found.append(dict(session.target.gradients))
            session.begin_step(1)
            found.append(dict(session.target.gradients))
    for name, new in found[1].items():
        torch.testing.assert_close(found[3][name], 0.25 * new + 0.75 * found[0][name])


# 5. What must not matter.


@pytest.mark.parametrize("form", ["separate", "two_pass"])
@pytest.mark.parametrize("pick", ["random", "random_shared", "all"])
def test_target_rows_never_reach_the_update(pick: str, form: str) -> None:
    model = with_dropout(tiny_trainable("llama", "full"), 0.1).train()
    found = [
        step(model, [tiny_batch(6)], GAST(target=targets, pick=pick, form=form))
        for targets in (TARGETS, tiny_tokens(9, seed=21))
    ]
    assert found[0].facts["picks"] == found[1].facts["picks"]
    for name, gradient in found[0].gradients.items():
        assert torch.equal(gradient, found[1].gradients[name]), name


def test_targets_change_the_picks_and_nothing_else() -> None:
    model = tiny_trainable("llama", "lora").train()
    found = [
        step(model, [tiny_batch(8)], GAST(target=targets, pick="topk"))
        for targets in (TARGETS, tiny_tokens(9, seed=21))
    ]
    assert found[0].facts["picks"] != found[1].facts["picks"]


@pytest.mark.parametrize("pick", ["softmax", "random", "random_shared", "topk"])
def test_batch_order_and_padding_change_no_pick(pick: str) -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(8)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    first = step(model, [collate(items, pad_id=0)], gast(pick=pick))
    wide = collate([*(items[k] for k in order), tiny_tokens(1, seed=2, longest=30)[0]], pad_id=7)
    others = [
        collate([items[k] for k in order], pad_id=0),
        collate([items[k] for k in order], pad_id=3, side="left"),
        Batch(wide.ids[:8], wide.input_ids[:8], wide.attention_mask[:8], wide.labels[:8]),
    ]
    for other in others:
        again = step(model, [other], gast(pick=pick))
        for layer in range(2):
            assert sorted(order[n] for n in again.picks(layer)) == first.picks(layer)
        assert worst_error(again.gradients, first.gradients) <= 1e-5


def test_the_seed_the_step_and_the_micro_batch_key_the_noise() -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch(12)

    def line(**changes: int) -> str:
        return "".join(step(model, [batch], gast(pick="random"), **changes).facts["picks"].values())

    assert line() == line()
    assert len({line(), line(seed=1), line(number=1)}) == 3
    twice = step(model, [batch, batch], gast(pick="random")).facts["picks"]
    assert twice["0"][:12] != twice["0"][12:]
    assert twice["0"] != twice["1"]
    shared = step(model, [batch, batch], gast(pick="random_shared")).facts["picks"]
    assert shared["0"] == shared["1"]
    assert shared["0"][:12] != shared["0"][12:]


@pytest.mark.parametrize("form", ["separate", "two_pass"])
def test_the_size_of_the_loss_changes_no_pick_and_passes_through(form: str) -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch(8)
    one = step(model, [batch], gast(form=form))
    for c in (1024.0, 2.0**-40):
        other = step(model, [batch], gast(form=form), scale=c)
        assert one.facts["picks"] == other.facts["picks"]
        for name, gradient in one.gradients.items():
            assert torch.equal(c * gradient, other.gradients[name])


def test_the_size_of_the_target_gradient_changes_no_pick() -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch(8)
    lines: list[dict[str, str]] = []
    for c in (1.0, 64.0, 2.0**-40):
        with gast(loss_weighting="token").attach(model, sgd(model)) as session:
            for gradient in session.target.gradients.values():
                gradient.mul_(c)
            session.expect(batch.labels)
            batch_loss(model, batch, "token").backward()
            lines.append(session.end_step()["picks"])
    assert lines[0] == lines[1] == lines[2]


def test_a_target_without_gradient_draws_evenly() -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch(6)
    even = step(model, [batch], gast(pick="random", loss_weighting="token"))
    with gast(loss_weighting="token").attach(model, sgd(model)) as session:
        for gradient in session.target.gradients.values():
            gradient.zero_()
        session.expect(batch.labels)
        batch_loss(model, batch, "token").backward()
        facts = session.end_step()
    assert facts["picks"] == even.facts["picks"]
    assert facts["max_z"] == [0.0, 0.0]
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_examples_that_are_all_alike_are_drawn_evenly() -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = collate([tiny_tokens(1)[0]] * 6, pad_id=0)
    counts = np.zeros(6)
    for number in range(20):
        found = step(model, [batch], gast(), number=number)
        assert found.facts["max_z"] == [0.0, 0.0]
        assert all(bool(g.isfinite().all()) for g in found.gradients.values())
        for layer in range(2):
            counts[found.picks(layer)] += 1
    assert counts.sum() == 20 * 2 * 3
    assert (np.abs(counts / 40 - 0.5) < 4 * np.sqrt(0.25 / 40)).all()


def test_first_scores_of_lora_rest_on_its_second_factor() -> None:
    model = tiny_trainable("llama", "lora").train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    items = tiny_tokens(8)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    found = step(model, [collate(items, pad_id=0)], gast(pick="topk"))
    for layer, names in enumerate(slow_layers(model)):
        only_b = [n for n in names if "lora_B" in n]
        assert found.picks(layer) == slow_topk(slow_scores(rows, target, only_b), 4)


# 6. How many, and of which.


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [(0.5, 8, 4), (0.5, 5, 2), (0.5, 3, 2), (0.5, 1, 1), (0.1, 4, 1), (0.99, 4, 4), (3, 8, 3),
     (3, 2, 2), (100, 4, 4), (1, 4, 1)],
)  # fmt: skip
def test_a_share_or_a_number_of_examples(keep: float | int, n: int, k: int) -> None:
    model = tiny_trainable("llama", "lora").train()
    # Step 3: a single example is refused at the first step only.
    found = step(model, [tiny_batch(n)], gast(keep=keep, loss_weighting="token"), number=3)
    assert [len(found.picks(layer)) for layer in range(2)] == [k, k]


@pytest.mark.parametrize(
    ("form", "weighting"), [("separate", "token"), ("separate", "example"), ("two_pass", "token")]
)
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("pick", ["softmax", "all"])
def test_examples_without_target_tokens_are_never_picked(
    pick: str, place: int, form: str, weighting: str
) -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(6)
    empty = Tokens("none", items[place].input_ids, np.zeros_like(items[place].is_target))
    mixed = [*items[:place], empty, *items[place + 1 :]]
    rest = [*items[:place], *items[place + 1 :]]
    found = step(model, [collate(mixed, pad_id=0)], gast(pick=pick, form=form), weighting=weighting)
    rows, target = loop_gradients(model, rest), slow_target(model, TARGETS)
    expected: dict[str, Tensor] = {}
    for layer, names in enumerate(slow_layers(model)):
        assert found.facts["picks"][str(layer)][place] == "0"
        picked = [n - (n > place) for n in found.picks(layer)]
        assert len(picked) == (5 if pick == "all" else slow_count(0.5, 5))
        expected |= slow_mean(rows, slow_weights(rest, weighting), picked, names)
        if pick == "softmax":
            scores = slow_scores(rows, target, names)
            z = slow_standardise(scores)
            assert found.facts["max_z"][layer] == pytest.approx(max(map(abs, z)), rel=1e-3)
            assert found.facts["alignment_std"][layer] == pytest.approx(np.std(scores), rel=1e-3)
    assert worst_error(found.gradients, expected) <= 1e-5


# 7. GREATS.


@pytest.mark.parametrize("rate", [1e-3, 0.1, 3.0])
def test_greats_takes_the_twins_picks_for_the_whole_model(rate: float) -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(10, seed=5)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    names = [name for layer in slow_layers(model) for name in layer]
    scores, gram = slow_scores(rows, target, names), slow_gram(rows, names)
    expected = slow_greedy(scores, gram, rate, 5)
    method = GREATS(target=TARGETS, target_batch=4)
    found = step(model, [collate(items, pad_id=0)], method, rate=rate, scale=3.7)
    assert found.picks(0) == found.picks(1) == expected
    mean = slow_mean(rows, slow_weights(items, "token"), expected, names)
    assert worst_error(found.gradients, {n: 3.7 * g for n, g in mean.items()}) <= 1e-5


def test_redundancy_changes_the_picks_of_greats() -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch(10, seed=5)
    method = GREATS(target=TARGETS, target_batch=4)
    lines = {step(model, [batch], method, rate=rate).facts["picks"]["0"] for rate in (1e-4, 3.0)}
    assert len(lines) == 2


def test_greats_per_layer() -> None:
    model = tiny_trainable("llama", "lora").train()
    items = tiny_tokens(10, seed=5)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    method = GREATS(target=TARGETS, target_batch=4, is_shared=False)
    found = step(model, [collate(items, pad_id=0)], method, rate=1.0)
    for layer, names in enumerate(slow_layers(model)):
        expected = slow_greedy(slow_scores(rows, target, names), slow_gram(rows, names), 1.0, 5)
        assert found.picks(layer) == expected


def test_greats_with_a_rate_of_zero_takes_the_best_aligned() -> None:
    model = tiny_trainable("llama", "lora").train()  # as in the first step of a warm-up
    items = tiny_tokens(10, seed=5)
    rows, target = loop_gradients(model, items), slow_target(model, TARGETS)
    names = [name for layer in slow_layers(model) for name in layer]
    method = GREATS(target=TARGETS, target_batch=4)
    found = step(model, [collate(items, pad_id=0)], method, rate=0.0)
    assert found.picks(0) == slow_topk(slow_scores(rows, target, names), 5)


def test_one_pick_for_all_layers_needs_two_passes() -> None:
    model = tiny_trainable("llama", "lora").train()
    with (
        pytest.raises(ConfigError, match="two_pass"),
        GREATS(target=TARGETS, pick="topk", form="separate").attach(model, sgd(model)),
    ):
        pass


# 8. Half precision.


@pytest.mark.parametrize("form", ["separate", "two_pass"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_picks_nearly_the_same_examples(precision: str, form: str) -> None:
    model = tiny_trainable("llama", "lora").train()
    same = total = 0
    scale = 1024.0 if precision == "float16" else 1.0
    for number in range(6):
        batch = tiny_batch(16, seed=number)
        exact = step(model, [batch], gast(form=form), number=number)
        model.zero_grad()
        optimizer = sgd(model)
        with gast(form=form).attach(model, optimizer, precision=precision, step=number) as session:
            session.expect(batch.labels)
            with torch.autocast("cpu", getattr(torch, precision)):
                loss = batch_loss(model, batch, "token")
            (scale * loss).backward()
            picks = session.end_step()["picks"]
        for layer in ("0", "1"):
            pairs = zip(picks[layer], exact.facts["picks"][layer], strict=True)
            same += sum(a == b for a, b in pairs)
            total += 16
        error = worst_error(
            {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None},
            exact.gradients,
        )
        if picks == exact.facts["picks"]:
            assert error < 0.1
    assert same / total > 0.95


def test_a_bf16_model_picks_nearly_the_same_examples() -> None:
    model = tiny_trainable("llama", "lora").train()
    rough = copy.deepcopy(model).bfloat16()
    same = total = 0
    for number in range(6):
        batch = tiny_batch(16, seed=number)
        lines = [step(m, [batch], gast(), number=number).facts["picks"] for m in (model, rough)]
        for layer in ("0", "1"):
            same += sum(a == b for a, b in zip(lines[0][layer], lines[1][layer], strict=True))
            total += 16
    assert same / total > 0.95


def test_scores_are_exact_within_the_loops_own_autocast() -> None:
    # Two passes score from within the model's call, which stands inside the loop's autocast.
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch(8)
    outside = step(model, [batch], gast(form="two_pass")).facts
    with gast(form="two_pass", loss_weighting="token").attach(model, sgd(model)) as session:
        session.expect(batch.labels)
        with torch.autocast("cpu", torch.bfloat16):
            batch_loss(model, batch, "token").backward()
        facts = session.end_step()
    assert facts["alignment_std"] == pytest.approx(outside["alignment_std"], rel=1e-5)


# 9. A layer sampler beside it.


@dataclass(frozen=True, slots=True)
class Turns(Method):
    """A layer sampler in small: the layers of each step in turn."""

    turns: tuple[tuple[int, ...], ...]

    def start(self, scene: Scene) -> Session:
        return TurnsSession(self, scene)


class TurnsSession:
    def __init__(self, options: Turns, scene: Scene) -> None:
        self.turns, self.layers = options.turns, trainable_layers(scene.model)
        self.active: tuple[int, ...] = ()

    def begin_step(self, step: int) -> None:
        self.active = self.turns[step % len(self.turns)]
        for k, layer in enumerate(self.layers):
            for p in layer.parameters.values():
                p.requires_grad_(k in self.active)

    def expect(self, labels: Tensor, ids: Sequence[str] = ()) -> None: ...

    def end_step(self) -> dict[str, Any]:
        return {"active": list(self.active)}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None: ...

    def close(self) -> None:
        for layer in self.layers:
            for p in layer.parameters.values():
                p.requires_grad_(True)


@pytest.mark.parametrize("form", ["separate", "two_pass"])
def test_a_sampler_that_takes_all_layers_changes_nothing(form: str) -> None:
    model = with_dropout(tiny_trainable("llama", "lora"), 0.1).train()
    alone = step(model, [tiny_batch(6)], gast(form=form))
    beside = step(model, [tiny_batch(6)], gast(form=form, sampler=Turns(((0, 1),))))
    assert alone.facts == beside.facts
    assert all(torch.equal(alone.gradients[n], beside.gradients[n]) for n in alone.gradients)


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("form", ["separate", "two_pass"])
def test_inactive_layers_neither_move_nor_cost(form: str, refresh_every: int) -> None:
    model = tiny_trainable("llama", "lora").train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    layers = [layer.parameters for layer in trainable_layers(model)]
    method = gast(
        sampler=Turns(((1,), (0,))), form=form, pick="topk", refresh_every=refresh_every,
        loss_weighting="token",
    )  # fmt: skip
    items = tiny_tokens(6)
    batch = collate(items, pad_id=0)
    with method.attach(model, optimizer) as session:
        for number in range(2):
            on, off = 1 - number, number
            before = {n: p.detach().clone() for n, p in layers[off].items()}
            states = {n: copy.deepcopy(optimizer.state.get(p)) for n, p in layers[off].items()}
            reference = stripped(model)
            rows = loop_gradients(reference, items)
            session.expect(batch.labels)
            batch_loss(model, batch, "token").backward()
            facts = session.end_step()
            assert facts["active"] == [on]
            assert list(facts["picks"]) == [str(on)]
            assert facts["alignment_mean"][off] is None
            assert facts["tokens"][off] is None
            names = slow_layers(reference)[on]
            scores = slow_scores(rows, session.target.gradients, names)
            assert parts(facts["picks"][str(on)]) == slow_topk(scores, 3)
            assert all(p.grad is None for p in layers[off].values())
            optimizer.step()
            optimizer.zero_grad()
            for name, p in layers[off].items():
                assert torch.equal(p, before[name])
                assert_same_state(optimizer.state.get(p), states[name])
    assert all(p.requires_grad for layer in layers for p in layer.values())


def assert_same_state(found: dict[str, Tensor] | None, before: dict[str, Tensor] | None) -> None:
    assert (found or {}).keys() == (before or {}).keys()
    assert all(torch.equal(found[key], before[key]) for key in found or {})


# 10. What a saved state holds.

Saved = tuple[dict[str, Any], dict[str, Tensor]]


def test_a_session_goes_on_where_another_stopped() -> None:
    pool = TokenSource(tiny_tokens(12, seed=4), pad_id=0)
    method = GAST(refresh_every=3, momentum=0.5)

    def run(
        model: nn.Module, steps: range, saved: Saved | None = None
    ) -> tuple[list[Any], Saved | None]:
        lines: list[Any] = []
        with method.attach(model, sgd(model, 0.1), pool=pool, step=steps[0]) as session:
            if saved is not None:
                session.load_state(*saved)
                session.begin_step(steps[0])
            for number in steps:
                batch = tiny_batch(6, seed=number)
                session.expect(batch.labels)
                model.zero_grad()
                batch_loss(model, batch, "token").backward()
                lines.append(session.end_step()["picks"])
                if number == steps[-1]:
                    return lines, session.state()
                session.begin_step(number + 1)
        return lines, None

    model = tiny_trainable("llama", "lora").train()
    whole, _ = run(model, range(6))
    first, saved = run(model, range(4))
    rest, _ = run(model, range(4, 6), saved)
    assert first + rest == whole
    other = tiny_trainable("llama", "lora").train()
    with (
        GAST(keep=0.25).attach(other, sgd(other), pool=pool) as session,
        pytest.raises(IncompatibleRunError, match="options"),
    ):
        session.load_state(*saved)


# 11. What is refused.


def test_adapters_that_are_used_outside_of_their_layer_are_refused() -> None:
    model = tiny_trainable("llama", "prefix").train()
    with pytest.raises(CoverageError, match="outside of their layer"):
        step(model, [tiny_batch()], gast(loss_weighting="token"))
    step(model, [tiny_batch()])


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = tiny_trainable("llama", "full").requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(SelectionError, match="trainable"), gast().attach(model, optimizer):
        pass


def test_targets_without_answers_are_refused() -> None:
    model = tiny_trainable("llama", "lora")
    mute = [Tokens(t.id, t.input_ids, np.zeros_like(t.is_target)) for t in TARGETS]
    with (
        pytest.raises(DataError, match="no target example has an answer"),
        GAST(target=mute).attach(model, sgd(model)),
    ):
        pass
    source = TokenSource(mute, pad_id=0)
    with (
        pytest.raises(DataError, match="no target token"),
        GAST(target="target").attach(model, sgd(model), target=source),
    ):
        pass


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, 0, -1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(keep: float | int) -> None:
    with pytest.raises(ConfigError, match="keep"):
        GAST(keep=keep)


def test_packed_batches_are_refused() -> None:
    model = tiny_trainable("llama", "lora").train()
    ids = torch.randint(2, 60, (2, 8))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4]])
    for mask in (None, torch.ones_like(ids)):
        with (
            gast().attach(model, sgd(model)),
            pytest.raises(DataError, match="packed"),
        ):
            model(input_ids=ids, position_ids=packed, labels=ids, attention_mask=mask)


def test_a_batch_of_one_is_refused_at_the_first_step() -> None:
    model = tiny_trainable("llama", "lora").train()
    with pytest.raises(ConfigError, match="nothing to choose"):
        step(model, [tiny_batch(1)], gast())
    step(model, [tiny_batch(1)], gast(keep=1.0))


def test_labels_must_be_known() -> None:
    model = tiny_trainable("llama", "lora").train()
    batch = tiny_batch()
    with gast().attach(model, sgd(model)), pytest.raises(DataError, match="labels"):
        batch_loss(model, batch, "token")


def test_targets_in_the_batch_and_parameters_outside_of_the_layers_are_refused() -> None:
    model = tiny_trainable("llama", "full").train()
    with pytest.raises(ConfigError, match="learn from the targets"):
        step(model, [tiny_batch(6)], gast(form="concat", target_batch=2))
    for name, p in model.named_parameters():
        p.requires_grad_(".layers." in name)
    step(model, [tiny_batch(6)], gast(form="concat", target_batch=2))


def test_a_source_of_targets_is_never_copied() -> None:
    class Locked(TokenSource):
        def __deepcopy__(self, memo: object) -> "Locked":
            raise AssertionError

    model = tiny_trainable("llama", "lora").train()
    step(model, [tiny_batch(4)], GAST(target=Locked(TARGETS, pad_id=0)))


def test_target_batches_that_fill_the_batch_are_refused() -> None:
    model = tiny_trainable("llama", "lora").train()
    with pytest.raises(DataError, match="no example beside"):
        step(model, [tiny_batch(4)], gast(form="concat", target_batch=4))
