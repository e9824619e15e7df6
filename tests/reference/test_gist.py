"""GIST equals its twin, on synthetic gradients and on real ones of tiny models."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_gradients
from slow_gist import (
    slow_gist,
    slow_overlap,
    slow_rank_by_gap,
    slow_rank_by_split,
    slow_rank_left_out,
)
from tiny import tiny_tokens, tiny_trainable

from selectune.data import Tokens
from selectune.errors import SelectionError
from selectune.gradients.engine import GradientEngine
from selectune.gradients.facts import GradientFacts
from selectune.gradients.store import GradientStore, StoredPool, Target
from selectune.gradients.subspace import (
    Spectrum,
    overlap,
    rank_by_energy,
    rank_by_gap,
    rank_by_split,
    rank_left_out,
    spectrum,
)
from selectune.methods.data.gist import Aggregate, GistOptions
from selectune.methods.data.gist import score as gist
from selectune.methods.evidence import Evidence
from selectune.progress import Silent
from selectune.registry import get
from selectune.selection import Scores


def facts_of(pool: np.ndarray, targets: np.ndarray, groups: list[str] | None = None) -> Evidence:
    """Return the evidence that explicit gradients amount to."""
    m = len(targets)
    facts = GradientFacts(
        pool @ targets.T,
        np.linalg.norm(pool, axis=1),
        targets @ targets.T,
        tuple(f"t{j}" for j in range(m)),
        tuple(groups or [""] * m),
    )
    ids = tuple(f"z{n:03d}" for n in range(len(pool)))
    return Evidence(ids, np.arange(1, len(pool) + 1), gradients=facts)


def synthetic(n: int = 40, m: int = 9, d: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return pool and target gradients with a few true directions."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(4, d))
    targets = rng.normal(size=(m, 4)) @ basis + 0.3 * rng.normal(size=(m, d))
    pool = rng.normal(size=(n, d))
    pool[: n // 2] += rng.normal(size=(n // 2, 4)) @ basis
    return pool, targets


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.7, 0.8, 0.95, 1.0])
def test_scores_energy_and_rank_equal_the_twin(share: float, seed: int) -> None:
    pool, targets = synthetic(seed=seed)
    scores = gist(facts_of(pool, targets), GistOptions(rank=f"energy:{share}"))
    expected, energy, rank = slow_gist(pool, targets, share=share)
    np.testing.assert_allclose(scores.score, expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(scores.columns["energy"], energy, rtol=1e-5)
    assert scores.about["rank"] == rank


def test_subtask_means_equal_the_release() -> None:
    pool, targets = synthetic()
    groups = ["a", "b", "b", "a", "c", "c", "a", "b", "c"]
    options = GistOptions(aggregate="max_subtask_mean", rank=4)
    scores = gist(facts_of(pool, targets, groups), options)
    expected, _, _ = slow_gist(pool, targets, rank=4, subtasks=groups)
    np.testing.assert_allclose(scores.score, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.8, 0.95])
def test_normalised_targets_equal_the_twin_over_unit_gradients(share: float, seed: int) -> None:
    pool, targets = synthetic(seed=seed)
    targets[:2] *= 8.0  # short answers that would own the space
    evidence = facts_of(pool, targets)
    scores = gist(evidence, GistOptions(rank=f"energy:{share}", normalize_targets=True))
    unit = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    expected, energy, rank = slow_gist(pool, unit, share=share)
    np.testing.assert_allclose(scores.score, expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(scores.columns["energy"], energy, rtol=1e-5)
    assert scores.about["rank"] == rank
    # The report warns of lengths as they are.
    lengths = np.linalg.norm(targets, axis=1)
    np.testing.assert_allclose(scores.about["target_norms"], lengths, rtol=1e-6)
    # Lengths of targets decide nothing any more.
    longer = gist(
        facts_of(pool, targets * np.arange(1.0, 10.0)[:, None]),
        GistOptions(rank=f"energy:{share}", normalize_targets=True),
    )
    np.testing.assert_allclose(longer.score, scores.score, rtol=1e-6, atol=1e-9)
    assert rank_by_energy(spectrum(targets @ targets.T), share) < rank


def test_a_target_without_gradient_stays_without_when_targets_are_normalised() -> None:
    pool, targets = synthetic()
    options = GistOptions(normalize_targets=True)
    without = gist(facts_of(pool, targets), options)
    nothing = np.zeros((1, targets.shape[1]))
    scores = gist(facts_of(pool, np.concatenate([targets, nothing])), options)
    np.testing.assert_allclose(scores.score, without.score, rtol=1e-6, atol=1e-9)
    assert (scores.columns["to:t9"] == 0).all()


@pytest.mark.parametrize("is_unit", [False, True])
def test_hand_examples_tell_the_columns_of_subtasks(is_unit: bool) -> None:
    targets = np.array([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    pool = np.array([[1.0, 0.0], [1.0, 1.0]])
    options = GistOptions(rank="full", aggregate="per_subtask", normalize_targets=is_unit)
    scores = gist(facts_of(pool, targets, ["b", "b", "a"]), options)
    # The mean of b is (1.5, 0.5); that of its unit gradients is (0.5, 0.5).
    expected = [1 / np.sqrt(2), 1.0] if is_unit else [1.5 / np.sqrt(2.5), 2 / np.sqrt(5)]
    np.testing.assert_allclose(scores.columns["subtask:b"], expected)
    np.testing.assert_allclose(scores.columns["subtask:a"], [1 / np.sqrt(2), 1.0])
    np.testing.assert_allclose(scores.score, [expected[0], 1.0])
    assert [n for n in scores.columns if n.startswith("subtask:")] == ["subtask:a", "subtask:b"]


def test_per_subtask_is_the_best_subtask_mean_with_columns_beside_it() -> None:
    pool, targets = synthetic()
    groups = ["a", "b", "b", "a", "c", "c", "a", "b", "c"]
    evidence = facts_of(pool, targets, groups)
    best = gist(evidence, GistOptions(aggregate="max_subtask_mean", rank=4))
    each = gist(evidence, GistOptions(aggregate="per_subtask", rank=4))
    columns = np.stack([each.columns[f"subtask:{name}"] for name in "abc"])
    np.testing.assert_array_equal(each.score, best.score)
    np.testing.assert_array_equal(each.score, columns.max(0))
    assert len(set(columns.argmax(0))) == 3
    assert not any(name.startswith("subtask:") for name in best.columns)


def test_hand_examples_separate_the_aggregates() -> None:
    # Targets along x (long) and along y (short), and two of one subtask pulling apart.
    targets = np.array([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    pool = np.array([[1.0, 0.0], [1.0, 1.0]])
    evidence = facts_of(pool, targets, ["a", "a", "b"])
    best = gist(evidence, GistOptions(rank="full")).score
    means = gist(evidence, GistOptions(rank="full", aggregate="max_subtask_mean")).score
    np.testing.assert_allclose(best, [1.0, 1.0])
    # The mean of (3, 0) and (0, 1) is (1.5, 0.5): its cosine to (1, 0) is 1.5 / sqrt(2.5).
    np.testing.assert_allclose(means, [1.5 / np.sqrt(2.5), 1.0])
    average = gist(evidence, GistOptions(rank="full", aggregate="mean_example")).score
    np.testing.assert_allclose(average[0], (1 + 0 + np.sqrt(0.5)) / 3)


@pytest.mark.parametrize("rank", [2, 3, 5, "full"])
def test_a_copy_of_a_target_scores_one(rank: int | str) -> None:
    pool, targets = synthetic()
    pool[7] = 2.5 * targets[3]
    scores = gist(facts_of(pool, targets), GistOptions(rank=rank))
    assert scores.score[7] == pytest.approx(1.0, abs=1e-5)
    assert scores.best_target[7] == "t3"


@pytest.mark.parametrize("method", ["gist", "grad_cosine"])
def test_what_nearly_equals_a_target_in_the_whole_space_is_listed(method: str) -> None:
    pool, targets = synthetic()
    across = np.linalg.svd(targets)[2][-1]  # at right angles to all targets
    length = np.linalg.norm(targets[3])
    for n, tangent in ((7, 0.03), (5, 0.04), (9, 0.05)):  # cosines of .9996, .9992, .9988
        pool[n] = 0.2 * (targets[3] + tangent * length * across)
    pool[11] = -targets[4]
    entry = get("data_scorer", method)
    scores = entry.function(facts_of(pool, targets), entry.parse({}))
    near = scores.about["near_targets"]
    assert [(i, j) for i, j, _ in near] == [("z007", "t3"), ("z005", "t3")]
    assert [c for *_, c in near] == pytest.approx([(1 + t**2) ** -0.5 for t in (0.03, 0.04)])


def test_full_rank_times_energy_is_the_full_space_cosine() -> None:
    pool, targets = synthetic()
    evidence = facts_of(pool, targets)
    scores = gist(evidence, GistOptions(rank="full"))
    entry = get("data_scorer", "grad_cosine")
    cosine = entry.function(evidence, entry.parse({}))
    np.testing.assert_allclose(
        scores.score * scores.columns["energy"], cosine.score, rtol=1e-5, atol=1e-8
    )
    multiplied = gist(evidence, GistOptions(rank="full", energy="multiply"))
    np.testing.assert_allclose(multiplied.score, cosine.score, rtol=1e-5, atol=1e-8)


@settings(max_examples=25)
@given(st.floats(1e-3, 1e3), st.integers(0, 39))
def test_scaling_a_pool_gradient_changes_no_score(scale: float, row: int) -> None:
    pool, targets = synthetic()
    before = gist(facts_of(pool, targets), GistOptions()).score
    pool[row] *= scale
    after = gist(facts_of(pool, targets), GistOptions()).score
    np.testing.assert_allclose(before, after, rtol=1e-6, atol=1e-9)


@settings(max_examples=25)
@given(st.permutations(range(9)), st.permutations(range(40)))
def test_order_of_targets_and_pool_changes_nothing(js: list[int], ns: list[int]) -> None:
    pool, targets = synthetic()
    before = gist(facts_of(pool, targets), GistOptions()).score
    after = gist(facts_of(pool[ns], targets[js]), GistOptions()).score
    np.testing.assert_allclose(before[ns], after, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("aggregate", get_args(Aggregate))
@pytest.mark.parametrize(("rank", "is_whole"), [(3, True), (6, True), (2, False), (4, False)])
def test_rotations_inside_equal_eigenvalues_change_nothing_where_the_rank_cuts_none(
    monkeypatch: pytest.MonkeyPatch, aggregate: Aggregate, rank: int, is_whole: bool
) -> None:
    rng = np.random.default_rng(0)

    def orthogonal(n: int) -> np.ndarray:
        return np.linalg.qr(rng.normal(size=(n, n)))[0]

    # Singular values 3, then 2 twice, then 1 three times.
    s, U = np.array([3.0, 2.0, 2.0, 1.0, 1.0, 1.0]), orthogonal(6)
    pool, targets = rng.normal(size=(30, 40)), (U * s) @ np.linalg.qr(rng.normal(size=(40, 6)))[0].T
    evidence = facts_of(pool, targets, ["a", "a", "b", "b", "c", "c"])
    options = GistOptions(rank=rank, aggregate=aggregate)

    def found(turned: np.ndarray) -> Scores:
        monkeypatch.setattr("selectune.methods.data.gist.spectrum", lambda _: Spectrum(turned, s))
        return gist(evidence, options)

    before = found(U)
    flipped = found(U * np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]))
    rotated = found(
        np.concatenate([U[:, :1], U[:, 1:3] @ orthogonal(2), U[:, 3:] @ orthogonal(3)], 1)
    )
    for others, is_same in ((flipped, True), (rotated, is_whole)):
        gaps = [np.abs(others.score - before.score).max()]
        gaps += [np.abs(others.columns[n] - column).max() for n, column in before.columns.items()]
        assert (max(gaps) < 1e-9) == is_same


@pytest.mark.parametrize("m", [1, 2])
def test_rank_one_is_refused_unless_energy_is_multiplied(m: int) -> None:
    pool, targets = synthetic(m=m)
    options = GistOptions(rank=1)
    with pytest.raises(SelectionError, match="rank 1"):
        gist(facts_of(pool, targets), options)
    scores = gist(facts_of(pool, targets), GistOptions(rank=1, energy="multiply"))
    assert len(np.unique(np.round(scores.score, 9))) > 2


def test_gate_sends_examples_without_energy_to_the_end_and_leaves_the_others() -> None:
    pool, targets = synthetic()
    evidence = facts_of(pool, targets)
    plain = gist(evidence, GistOptions())
    is_low = plain.columns["energy"] < 0.3
    assert 0 < is_low.sum() < len(pool)
    gated = gist(evidence, GistOptions(energy="gate:0.3"))
    np.testing.assert_array_equal(gated.score, np.where(is_low, -1.0, plain.score))
    lowest = {evidence.ids[n] for n in np.flatnonzero(is_low)}
    assert set(gated.ranking()[-len(lowest) :]) == lowest


def noisy(noise: float, seed: int = 1, n_true: int = 12, m: int = 57) -> np.ndarray:
    """Return target gradients that share `n_true` directions, with noise of their own."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(n_true, 4000))
    return rng.normal(size=(m, n_true)) @ basis + noise * rng.normal(size=(m, 4000))


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_leaving_targets_out_finds_the_true_rank_and_equals_the_twin(noise: float) -> None:
    targets = noisy(noise)
    assert rank_left_out(targets @ targets.T) == slow_rank_left_out(targets) == 12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [3, 4, 5, 9, 14])
def test_leaving_targets_out_of_few_equals_the_twin(m: int, seed: int) -> None:
    pool, targets = synthetic(m=m, seed=seed)
    targets[1] = 2.0 * targets[0]  # one direction fewer than targets
    rank = slow_rank_left_out(targets)
    assert rank_left_out(targets @ targets.T) == rank
    assert gist(facts_of(pool, targets), GistOptions(rank="loo")).about["rank"] == rank


@pytest.mark.parametrize("rank", ["loo", "split:0.5"])
def test_where_one_direction_would_do_ours_take_two(rank: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.normal(3, 1, size=(9, 1))
    targets = lengths * rng.normal(size=9000) + 0.1 * rng.normal(size=(9, 9000))
    facts = facts_of(rng.normal(size=(20, 9000)), targets)
    assert gist(facts, GistOptions(rank=rank)).about["rank"] == 2
    with pytest.raises(SelectionError, match="rank 1"):
        gist(facts, GistOptions(rank="energy:0.95"))


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_gap_and_split_find_the_true_rank_where_the_energy_rule_counts_noise(noise: float) -> None:
    targets = noisy(noise)
    K = targets @ targets.T
    ids = [f"t{j}" for j in range(len(K))]
    assert rank_by_gap(spectrum(K)) == 12
    assert 10 <= rank_by_split(K, ids, 0.95) <= 12
    assert rank_by_split(K, ids, 0.99) == 12
    if noise == 3.0:
        assert rank_by_energy(spectrum(K), 0.95) > 30


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [2, 3, 4, 5, 9])
def test_gap_and_split_equal_their_twins(m: int, seed: int) -> None:
    _, targets = synthetic(m=m, seed=seed)
    ids = [f"t{j}" for j in range(m)]
    K = targets @ targets.T
    singular = np.linalg.svd(targets, compute_uv=False)
    assert rank_by_gap(spectrum(K)) == slow_rank_by_gap(singular)
    if m < 4:
        return
    for share in (0.5, 0.8, 0.95, 1.0):
        expected = slow_rank_by_split(targets, ids, share, seed)
        assert rank_by_split(K, ids, share, seed=seed) == expected


def test_halves_depend_on_ids_and_seed_and_not_on_order() -> None:
    targets = noisy(8.0, m=24)
    ids = [f"t{j}" for j in range(24)]
    K = targets @ targets.T
    order = np.random.default_rng(0).permutation(24)
    shuffled = rank_by_split(K[np.ix_(order, order)], [ids[j] for j in order], 0.9)
    assert shuffled == rank_by_split(K, ids, 0.9)
    found = {rank_by_split(K, ids, 0.9, seed=seed) for seed in range(6)}
    assert len(found) > 1


@pytest.mark.parametrize("rank", ["gap", "split:0.95"])
def test_few_targets_are_taken_whole_by_gap_and_split(rank: str) -> None:
    pool, targets = synthetic(m=3)
    assert gist(facts_of(pool, targets), GistOptions(rank=rank)).about["rank"] == 3


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_overlap_equals_the_twin(share: float) -> None:
    _, one = synthetic(seed=0)
    other = one + 2.0 * np.random.default_rng(5).normal(size=one.shape)
    spaces = spectrum(one @ one.T), spectrum(other @ other.T)
    ranks = rank_by_energy(spaces[0], share), rank_by_energy(spaces[1], share)
    found = overlap(*spaces, one @ other.T, ranks)
    assert found == pytest.approx(slow_overlap(one, other, share), rel=1e-6)
    assert 0.1 < found < 0.95


def test_overlap_of_equal_nested_and_orthogonal_spaces() -> None:
    e = np.eye(6)
    one, turned = e[:2], np.array([[1.0, 1.0], [1.0, -3.0]]) @ e[:2]
    for other, ranks, expected in [(turned, (2, 2), 1.0), (e[:4], (2, 4), 0.5), (e[4:], (2, 2), 0)]:
        found = overlap(spectrum(one @ one.T), spectrum(other @ other.T), one @ other.T, ranks)
        assert found == pytest.approx(expected, abs=1e-9)


def test_repeated_and_null_targets_fall_below_the_floor() -> None:
    _, targets = synthetic(m=3)
    doubled = np.concatenate([targets, targets, np.zeros((1, targets.shape[1]))])
    assert len(spectrum(doubled @ doubled.T).s) == 3
    with pytest.raises(SelectionError, match="zero"):
        spectrum(np.zeros((3, 3)))


def stored(
    path: Path, family: str, pool: list[Tokens], targets: list[Tokens], budget: int = 40
) -> StoredPool:
    """Return a gradient pass over a tiny model's pool."""
    engine = GradientEngine(tiny_trainable(family, "lora"))
    return GradientStore(path, {"family": family, "budget": budget}).compute(
        engine,
        pool,
        [Target(t, "task", "") for t in targets],
        pad_id=0,
        token_budget=budget,
        shard_examples=4,
        progress=Silent(),
    )


def examples(prefix: str, n: int, seed: int) -> list[Tokens]:
    """Return examples named after what they are for."""
    return [
        Tokens(f"{prefix}{k}", t.input_ids, t.is_target) for k, t in enumerate(tiny_tokens(n, seed))
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_from_tokens_to_ranking_equals_the_twin(family: str, tmp_path: Path) -> None:
    pool, targets = examples("z", 14, seed=1), examples("v", 6, seed=2)
    found = stored(tmp_path / "store", family, pool, targets)
    model = tiny_trainable(family, "lora").double()

    def flat(items: list[Tokens]) -> np.ndarray:
        columns = loop_gradients(model, items).values()
        return torch.cat([c.flatten(1) for c in columns], 1).numpy()

    G, V = flat(pool), flat(targets)
    np.testing.assert_allclose(found.facts.dots, G @ V.T, rtol=1e-4, atol=1e-5 * np.abs(G).max())
    # Two gradients that are nearly orthogonal: what cancels leaves the rounding of fp32.
    gram = V @ V.T
    np.testing.assert_allclose(found.facts.gram, gram, rtol=1e-5, atol=1e-6 * np.abs(gram).max())
    np.testing.assert_allclose(found.facts.norms, np.linalg.norm(G, axis=1), rtol=1e-5)
    evidence = Evidence(found.ids, found.n_target_tokens, gradients=found.of_task("task"))
    scores = gist(evidence, GistOptions())
    expected, _, rank = slow_gist(G, V)
    assert scores.about["rank"] == rank
    np.testing.assert_allclose(scores.score, expected, rtol=1e-4, atol=1e-5)
    order = sorted(range(len(pool)), key=lambda n: (-expected[n], pool[n].id))
    assert scores.ranking() == [pool[n].id for n in order]


def test_batches_order_and_shards_change_nothing(tmp_path: Path) -> None:
    pool, targets = examples("z", 13, seed=1), examples("v", 5, seed=2)
    one = stored(tmp_path / "a", "llama", pool, targets, budget=12)
    shuffled = [pool[k] for k in np.random.default_rng(0).permutation(len(pool))]
    other = stored(tmp_path / "b", "llama", shuffled, targets, budget=4000)
    place = {i: n for n, i in enumerate(other.ids)}
    order = [place[i] for i in one.ids]
    np.testing.assert_allclose(one.facts.dots, other.facts.dots[order], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(one.facts.norms, other.facts.norms[order], rtol=1e-5)


def test_tasks_in_one_pass_equal_passes_of_their_own(tmp_path: Path) -> None:
    pool = examples("z", 9, seed=1)
    a, b = examples("a", 4, seed=2), examples("b", 5, seed=3)
    engine = GradientEngine(tiny_trainable("llama", "lora"))

    def run(name: str, targets: list[Target]) -> StoredPool:
        return GradientStore(tmp_path / name, {"n": name}).compute(
            engine, pool, targets, pad_id=0, token_budget=60, shard_examples=99, progress=Silent()
        )

    both = run("both", [Target(t, "a", "") for t in a] + [Target(t, "b", "") for t in b])
    alone = run("alone", [Target(t, "b", "") for t in b])
    joint, own = both.of_task("b"), alone.of_task("b")
    assert joint.target_ids == own.target_ids
    np.testing.assert_allclose(joint.dots, own.dots, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(joint.gram, own.gram, rtol=1e-5, atol=1e-8)
