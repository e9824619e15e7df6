"""LESS and TracIn equal their twins, from a stock Trainer's checkpoints to the ranking."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from loops import loop_gradients
from slow_less import Moment, slow_adam, slow_less, slow_tracin
from stock import Stock, at, stock_model, train_stock
from test_gist import examples, facts_of
from torch import nn

from selectune.gradients.adam import AdamSteps, Moments, adam_steps
from selectune.gradients.engine import GradientEngine
from selectune.gradients.facts import CheckpointFacts
from selectune.gradients.projection import Projection
from selectune.gradients.store import GradientStore, Target
from selectune.gradients.view import View
from selectune.methods.data.gist import GistOptions
from selectune.methods.data.gist import score as gist
from selectune.methods.data.less import LessOptions
from selectune.methods.data.less import score as less
from selectune.methods.data.tracin import TracinOptions
from selectune.methods.data.tracin import score as tracin
from selectune.methods.evidence import Evidence
from selectune.progress import Silent
from selectune.training.trainer_folder import put_weights, read_moments, trainer_checkpoints

POOL, TARGETS = examples("z", 7, seed=1), examples("v", 4, seed=2)
SUBTASKS = ["a", "b", "a", "b"]
SEED = 3


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return train_stock(tmp_path_factory.mktemp("stock"))


def flat(model: nn.Module, items: list) -> np.ndarray:
    columns = loop_gradients(model, items).values()
    return torch.cat([c.flatten(1) for c in columns], 1).numpy()


def joined(parts: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([t.flatten() for t in parts.values()]).double().numpy()


@pytest.fixture(scope="module")
def twins(stock: Stock) -> list[Moment]:
    """Return what the live optimizer held, and gradients from the one-example loop."""
    history = json.loads((stock.folder / "checkpoint-9/trainer_state.json").read_text())
    rates = {row["step"]: row["learning_rate"] for row in history["log_history"] if "loss" in row}
    moments: list[Moment] = []
    for k, seen in enumerate(stock.seen):
        model = at(stock, k)
        moments.append(
            Moment(
                flat(model, POOL),
                flat(model, TARGETS),
                joined(seen.m),
                joined(seen.v),
                seen.n_steps,
                sum(rates[s] for s in range(3 * k + 1, 3 * k + 4)) / 3,
            )
        )
    return moments


def evidence_of(stock: Stock, view: View, path: Path, *, budget: int = 30) -> Evidence:
    """Return what selectune makes of the folder alone."""
    model = stock_model()
    found: list[CheckpointFacts] = []
    for checkpoint in trainer_checkpoints(stock.folder):
        put_weights(model, checkpoint.path)
        stored = GradientStore(path / f"{checkpoint.step}", {}).compute(
            GradientEngine(model),
            POOL,
            [Target(t, "task", g) for t, g in zip(TARGETS, SUBTASKS, strict=True)],
            pad_id=0,
            token_budget=budget,
            shard_examples=3,
            progress=Silent(),
            adam=adam_steps(view, read_moments(model, checkpoint.path)),
            projection=Projection.of(view.projection, SEED),
        )
        found.append(CheckpointFacts(stored.facts, checkpoint.learning_rate))
    return Evidence(tuple(t.id for t in POOL), np.ones(len(POOL), int), checkpoints=tuple(found))


@pytest.mark.parametrize("form", ["release", "textbook", "none"])
def test_from_a_stock_folder_to_scores_equals_the_twin(
    stock: Stock, twins: list[Moment], tmp_path: Path, form: str
) -> None:
    evidence = evidence_of(stock, View(form), tmp_path)
    for aggregate in ("mean_of_cosines", "cosine_of_mean"):
        scores = less(evidence, LessOptions(adam=form, aggregate=aggregate))
        expected = slow_less(twins, SUBTASKS, form=form, aggregate=aggregate)
        np.testing.assert_allclose(scores.score, expected, rtol=1e-3, atol=1e-5)
        order = sorted(range(len(POOL)), key=lambda n: (-expected[n], POOL[n].id))
        assert scores.ranking() == [POOL[n].id for n in order]
    assert scores.about["learning_rates"] == pytest.approx([t.learning_rate for t in twins])


@pytest.mark.parametrize("projection", ["rademacher:50", "hadamard:50", "hadamard:700"])
def test_projected_scores_equal_one_global_matrix(
    stock: Stock, twins: list[Moment], tmp_path: Path, projection: str
) -> None:
    evidence = evidence_of(stock, View("release", projection), tmp_path)
    scores = less(evidence, LessOptions(projection=projection))
    how = Projection.of(projection, SEED)
    assert how is not None
    blocks: list[np.ndarray] = []
    for name, p in stock_model().named_parameters():
        if p.requires_grad:
            out = torch.zeros(p.numel(), how.dim, dtype=torch.float64)
            how.add(out, name, torch.eye(p.numel(), dtype=torch.float64))
            blocks.append(out.numpy().T)
    expected = slow_less(twins, SUBTASKS, R=np.concatenate(blocks, 1))
    np.testing.assert_allclose(scores.score, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_tracin_equals_its_twin(
    stock: Stock, twins: list[Moment], tmp_path: Path, aggregate: str
) -> None:
    scores = tracin(evidence_of(stock, View(), tmp_path), TracinOptions(aggregate=aggregate))
    expected = slow_tracin(twins, aggregate)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores.score, expected, rtol=1e-3, atol=1e-5 * scale)


def test_scoring_again_from_the_store_equals_scoring_anew(stock: Stock, tmp_path: Path) -> None:
    view = View("release", "rademacher:40")
    options = LessOptions(projection=view.projection)
    first = less(evidence_of(stock, view, tmp_path / "a"), options)
    again = less(evidence_of(stock, view, tmp_path / "a"), options)
    other = less(evidence_of(stock, view, tmp_path / "b", budget=4000), options)
    assert first.score.tobytes() == again.score.tobytes()
    np.testing.assert_allclose(first.score, other.score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["release", "textbook"])
def test_a_step_of_adam_is_the_formula_number_by_number(form: str) -> None:
    rng = np.random.default_rng(0)
    m, v, g = rng.normal(size=12), rng.random(12) * 1e-6, rng.normal(size=(3, 12))
    twin = Moment(g, g, m, v, 7, 1.0)
    moments = Moments(torch.tensor(m), torch.tensor(v), 7)
    found = moments.stepped(torch.tensor(g), form)
    expected = np.stack([slow_adam(row, twin, form) for row in g])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_textbook_step_is_the_one_that_torch_takes() -> None:
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(3):
        p.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[p]
    m, v, n = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), int(state["step"])
    before, g = p.detach().clone(), torch.randn(5, dtype=torch.float64)
    p.grad = g.clone()
    optimizer.step()
    moments = Moments(m, v, n, (0.8, 0.95), 1e-6)
    torch.testing.assert_close(before - p.detach(), moments.stepped(g[None], "textbook")[0])


def test_what_a_batch_does_not_touch_moves_by_its_momentum() -> None:
    from selectune.gradients.products import _Shaped

    p = nn.Parameter(torch.zeros(2, 3))
    steps = AdamSteps({"w": Moments(torch.ones(2, 3), torch.ones(2, 3), 1)}, "release")
    shaped = _Shaped({"w": p}, steps)
    [(name, rows)] = shaped.unseen(4)
    (part,) = shaped.parts(name, rows)
    torch.testing.assert_close(part, torch.full((4, 6), 0.9 / 0.999**0.5))
    assert shaped.unseen(4) == []
    shaped.close_batch()
    assert len(shaped.unseen(4)) == 1  # the next batch does not touch it either


def test_hand_examples_separate_the_three_aggregates() -> None:
    # One subtask: a long target along x, a short one along y; an example between and one along x.
    targets = np.array([[3.0, 0.0], [0.0, 1.0]])
    pool = np.array([[1.0, 0.0], [1.0, 1.0]])
    plain = facts_of(pool, targets, ["a", "a"])
    assert plain.gradients is not None
    evidence = Evidence(
        plain.ids, plain.n_target_tokens, checkpoints=(CheckpointFacts(plain.gradients, 1e-4),)
    )
    cosines = less(evidence, LessOptions(adam="none")).score
    means = less(evidence, LessOptions(adam="none", aggregate="cosine_of_mean")).score
    best = gist(plain, GistOptions(rank="full")).score
    np.testing.assert_allclose(cosines, [0.5, np.sqrt(0.5)])
    np.testing.assert_allclose(means, [1.5 / np.sqrt(2.5), 2 / np.sqrt(5)])
    np.testing.assert_allclose(best, [1.0, np.sqrt(0.5)])


def test_checkpoints_count_by_their_learning_rates() -> None:
    rng = np.random.default_rng(0)
    parts = [facts_of(rng.normal(size=(5, 8)), rng.normal(size=(3, 8))) for _ in range(2)]

    def scored(*rates: float) -> np.ndarray:
        pairs = zip(parts, rates, strict=True)
        facts = tuple(CheckpointFacts(p.gradients, r) for p, r in pairs if p.gradients and r)
        ids, n = parts[0].ids, parts[0].n_target_tokens
        return less(Evidence(ids, n, checkpoints=facts), LessOptions()).score

    mixed = scored(3e-4, 1e-4)
    np.testing.assert_allclose(mixed, 0.75 * scored(7.0, 0.0) + 0.25 * scored(0.0, 7.0))


def test_scaling_a_pool_gradient_scales_tracin_and_leaves_plain_less() -> None:
    rng = np.random.default_rng(0)
    pool, targets = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))

    def both(pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        facts = facts_of(pool, targets)
        assert facts.gradients is not None
        found = (CheckpointFacts(facts.gradients, 1e-3),)
        evidence = Evidence(facts.ids, facts.n_target_tokens, checkpoints=found)
        return less(evidence, LessOptions()).score, tracin(evidence, TracinOptions()).score

    before, after = both(pool), both(2.5 * pool)
    np.testing.assert_allclose(after[0], before[0])
    np.testing.assert_allclose(after[1], 2.5 * before[1])
