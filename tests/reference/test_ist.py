"""IST equals its twin: draws, importance and probes."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from deep import ADAPTERS, deep_trainable
from slow_ist import (
    slow_draw,
    slow_gumbel_draw,
    slow_odds_of_rounds,
    slow_odds_of_sets,
    slow_sigmoid,
    slow_suppressed_loss,
    slow_update,
)
from tiny import FAMILIES, tiny_tokens
from torch import nn

from selectune import registry
from selectune.methods.layers.ist import (
    IST,
    Importance,
    Sets,
    advantages,
    suppressed_sets,
    updated,
)
from selectune.training.layer_sampling import CHOICE, draw, log_sigmoid
from selectune.training.method import Scene
from selectune.training.probe_loss import Passes
from selectune.training.sources import TokenSource

REWARDS = ("exp", "neg_loss", "standardised")
POOL = tiny_tokens(30, seed=4)


def source(items: Sequence[object] = POOL) -> TokenSource:
    return TokenSource(items, pad_id=0)


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)


def chi_square_is_fine(counts: Counter, odds: dict) -> bool:
    """Compare counts with odds; four standard deviations of the statistic are allowed."""
    n = sum(counts.values())
    assert set(counts) <= set(odds)
    statistic = sum((counts[key] - n * p) ** 2 / (n * p) for key, p in odds.items())
    degrees = len(odds) - 1
    return statistic < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("u", [[0.0] * 5, [1.5, -2.0, 0.3, 0.0, -0.7]], ids=["even", "uneven"])
def test_layers_are_drawn_one_after_the_other(u: list[float]) -> None:
    odds = slow_odds_of_sets([slow_sigmoid(-x) for x in u], 2)
    weights = log_sigmoid(-np.asarray(u))
    ours = Counter(
        tuple(draw(weights, 2, np.random.default_rng([7, step, CHOICE]))) for step in range(20_000)
    )
    assert chi_square_is_fine(ours, odds)
    rng = random.Random(0)
    twin = Counter(tuple(slow_draw([slow_sigmoid(-x) for x in u], 2, rng)) for _ in range(20_000))
    assert chi_square_is_fine(twin, odds)
    if not any(u):
        assert max(odds.values()) == pytest.approx(min(odds.values()))


def test_a_probe_draws_different_sets_by_how_little_layers_matter() -> None:
    u = np.asarray([0.8, -1.0, 0.0, 0.4])
    odds = slow_odds_of_rounds([slow_sigmoid(x) for x in u], 2, 3)
    found = Counter(
        tuple(map(tuple, suppressed_sets(u, 2, 3, np.random.default_rng([1, step]))))
        for step in range(20_000)
    )
    assert chi_square_is_fine(found, odds)


@pytest.mark.parametrize("n_layers", [2, 3, 4, 5])
@pytest.mark.parametrize("spread", [0.0, 3.0, 300.0, 3000.0])
@pytest.mark.parametrize("candidates", [3, 20])
def test_few_layers_and_extreme_importance_end(
    n_layers: int, spread: float, candidates: int
) -> None:
    size = max(1, n_layers // 2)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        u = spread * rng.standard_normal(n_layers)
        sets = suppressed_sets(u, size, candidates, rng)
        assert len(sets) == min(candidates, math.comb(n_layers, size))
        assert len({tuple(s) for s in sets}) == len(sets)
        assert all(tuple(s) in set(combinations(range(n_layers), size)) for s in sets)
        assert np.isfinite(log_sigmoid(-u)).all()
        a = advantages([1.0 + k for k in range(len(sets))], "exp")
        assert np.isfinite(updated(u, sets, a, 10.0)).all()


@pytest.mark.parametrize("reward", REWARDS)
def test_importance_follows_the_twin(reward: str) -> None:
    n_layers, steps = 7, 600
    useful = np.linspace(-1.0, 1.0, n_layers)

    def rigged(number: int, sets: Sets) -> list[float]:
        return [0.5 + 0.1 * math.sin(number) + 0.2 * float(useful[s].sum()) for s in sets]

    options = IST(reward=reward, lr=1.0)
    learnt = Importance(options, range(n_layers), rigged, seed=5)
    twin = [0.0] * n_layers
    for step in range(steps + 1):
        before = learnt.u.tolist()
        facts = learnt.look(step)
        if step == 0 or step % 10:
            assert learnt.u.tolist() == before
            assert ("importance" in facts) == (step == 0)
            continue
        sets, losses = (learnt.history[-1][key] for key in ("sets", "losses"))
        assert losses == rigged(step // 10 - 1, sets)
        twin = slow_update(twin, sets, losses, 1.0, reward)
        np.testing.assert_allclose(learnt.u, twin, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(facts["importance"], [slow_sigmoid(-x) for x in twin])
        assert facts["probe"] == {"sets": sets, "losses": losses}
    assert len(learnt.history) == steps // 10
    # A layer whose turning down lowers the loss matters less, and the other way round.
    assert learnt.u[0] > 0 > learnt.u[-1]


def test_layers_that_were_not_turned_down_stay() -> None:
    u = np.asarray([0.3, -0.2, 0.1, 0.5])
    moved = updated(u, [[0, 1], [1, 3]], advantages([2.0, 1.0], "exp"), 10.0)
    assert moved[2] == u[2]
    assert moved[0] < u[0]
    assert moved[3] > u[3]


def test_importance_finds_graded_usefulness() -> None:
    useful = np.linspace(0.0, 1.0, 8)
    rng = np.random.default_rng(3)
    rng.shuffle(useful)

    def rigged(number: int, sets: Sets) -> list[float]:
        return [0.3 + 0.2 * float(useful[s].sum()) for s in sets]

    learnt = Importance(IST(), range(8), rigged, seed=0)
    for step in range(1001):
        learnt.look(step)
    importance = np.exp(learnt.log_weights())
    assert np.corrcoef(importance, useful)[0, 1] > 0.9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_probe_measures_what_a_turned_down_copy_loses(kind: str, family: str) -> None:
    model = deep_trainable(kind, 4, family)
    session = IST(interval=1, probe_batch=5).start(Scene(model, sgd(model), 3, pool=source()))
    for step in range(3):
        session.begin_step(step)
    passes = Passes(source(), 5, seed=3)
    assert len(session.guide.history) == 2
    twin = [0.0] * 4
    for number, found in enumerate(session.guide.history):
        items = [POOL[k] for k in passes.indices(number)]
        losses = [slow_suppressed_loss(model, items, s, 0.25) for s in found["sets"]]
        np.testing.assert_allclose(found["losses"], losses, rtol=2e-5)
        assert len({round(x, 4) for x in losses}) > 1
        twin = slow_update(twin, found["sets"], losses, 10.0)
        np.testing.assert_allclose(found["u"], twin, rtol=1e-2, atol=1e-4)
    session.close()


def test_training_draws_the_layers_that_the_twin_draws() -> None:
    model = deep_trainable("lora", 5)
    optimizer = sgd(model)
    items = tiny_tokens(4, seed=1)
    batch = source(items).draw(range(4))
    options = IST(interval=2, probe_batch=4, layers=2, reward="neg_loss")
    with options.attach(model, optimizer, pool=source(), seed=9) as session:
        drawn = []
        for step in range(12):
            noise = np.random.default_rng([9, step, CHOICE]).gumbel(size=5)
            u = [0.0] * 5
            for found in session.guide.history:
                u = slow_update(u, found["sets"], found["losses"], 10.0, "neg_loss")
            np.testing.assert_allclose(session.guide.u, u, rtol=1e-12, atol=1e-12)
            assert session.active == slow_gumbel_draw(u, 2, noise.tolist())
            drawn.append(tuple(session.active))
            optimizer.zero_grad()
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                  labels=batch.labels).loss.backward()  # fmt: skip
            optimizer.step()
    assert len(set(drawn)) > 3


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("why", ["fresh factors", "nothing is turned down"])
def test_importance_stays_where_adapters_answer_alike(reward: str, why: str) -> None:
    model = deep_trainable("lora", 4)
    factor = 0.25
    if why == "fresh factors":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.zero_()
    else:
        factor = 1.0
    options = IST(interval=1, suppression=factor, reward=reward)
    session = options.start(Scene(model, sgd(model), pool=source()))
    for step in range(4):
        session.begin_step(step)
    np.testing.assert_allclose(session.guide.u, np.zeros(4), atol=1e-6)
    session.close()


def test_a_pass_shows_every_example_once() -> None:
    passes = Passes(source(), 16, seed=2)
    seen = [k for number in range(15) for k in passes.indices(number)]  # eight passes
    for epoch in range(8):
        assert sorted(seen[30 * epoch : 30 * epoch + 30]) == list(range(30))
    assert seen[:30] != seen[30:60]
    assert passes.indices(7) == Passes(source(), 16, seed=2).indices(7)
    assert sorted(Passes(source(POOL[:5]), 16, seed=2).indices(3)) == list(range(5))


def test_defaults_are_the_release_s() -> None:
    entry = registry.get("training_method", "ist")
    options = entry.parse({})
    assert (options.layers, options.suppress, options.candidates) == (0.25, 0.5, 3)
    assert (options.lr, options.suppression, options.interval) == (10.0, 0.25, 10)
    assert (options.probe_batch, options.reward, options.probe_from) == (16, "exp", "pool")
    assert "2410.11772" in entry.paper
