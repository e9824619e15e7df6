"""Intervals: paired by id, seeded, and covering what they say."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectune.errors import DataError
from selectune.evaluation import Evaluation, compare_paired, compare_seeds


def _answers(losses: np.ndarray, right: list[bool | None] | None = None) -> Evaluation:
    n = len(losses)
    columns = {
        "id": [f"q{k}" for k in range(n)],
        "answer_loss": losses.tolist(),
        "correct_norm": pa.array(right or [None] * n, pa.bool_()),
    }
    return Evaluation(pa.table(columns))


def _pair(differences: np.ndarray) -> tuple[Evaluation, Evaluation]:
    return _answers(differences), _answers(np.zeros_like(differences))


@pytest.mark.parametrize("skewed", [False, True])
def test_ninety_five_percent_cover_the_truth_ninety_five_times_in_a_hundred(skewed: bool) -> None:
    rng, n_covered = np.random.default_rng(0), 0
    for repeat in range(400):
        drawn = rng.exponential(1.0, 60) if skewed else rng.normal(1.0, 2.0, 60)
        found = compare_paired(*_pair(drawn), n_boot=600, seed=repeat)
        n_covered += found.low <= 1.0 <= found.high
    # 400 repeats: two standard errors are 2.2 points; a percentile bootstrap of 60 loses 1 to 2.
    assert 0.90 <= n_covered / 400 <= 0.975


def test_the_hierarchical_interval_covers_where_one_that_ignores_seeds_does_not() -> None:
    rng = np.random.default_rng(0)
    n_covered = n_naive = 0
    for repeat in range(200):
        noise = rng.normal(0, 1.0, (8, 40))
        data = 1 + rng.normal(0, 0.4, (8, 1)) + rng.normal(0, 0.5, (1, 40)) + noise
        found = compare_seeds([_pair(row) for row in data], n_boot=400, seed=repeat)
        naive = compare_paired(*_pair(data.flatten()), n_boot=400, seed=repeat)
        n_covered += found.low <= 1 <= found.high
        n_naive += naive.low <= 1 <= naive.high
    assert n_covered / 200 >= 0.88
    assert n_naive / 200 < 0.70


@settings(max_examples=25)
@given(st.permutations(range(12)))
def test_pairs_are_joined_by_id_not_by_row(order: list[int]) -> None:
    rng = np.random.default_rng(1)
    a, b = _answers(rng.normal(size=12)), _answers(rng.normal(size=12))
    shuffled = Evaluation(b.table.take(list(order)))
    assert compare_paired(a, shuffled, n_boot=200) == compare_paired(a, b, n_boot=200)


def test_one_seed_repeats_and_another_differs() -> None:
    pair = _pair(np.random.default_rng(2).normal(size=30))
    once, again = (compare_paired(*pair, n_boot=500, seed=7) for _ in range(2))
    assert once == again
    assert compare_paired(*pair, n_boot=500, seed=8).low != once.low


def test_swapping_the_two_models_mirrors_the_interval() -> None:
    rng = np.random.default_rng(3)
    a, b = _answers(rng.normal(size=30)), _answers(rng.normal(size=30))
    there, back = (compare_paired(*pair, n_boot=500) for pair in ((a, b), (b, a)))
    assert there.low == pytest.approx(-back.high)
    assert there.mean_difference == pytest.approx(-back.mean_difference)


def test_what_is_hard_for_both_cancels() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 100, 50)
    found = compare_paired(_answers(hard + 1 + rng.normal(0, 0.1, 50)), _answers(hard))
    assert 0.9 < found.low < 1 < found.high < 1.1
    assert found.excludes_zero


def test_accuracy_is_compared_over_the_examples_with_options() -> None:
    a = _answers(np.zeros(4), [True, True, None, False])
    b = _answers(np.zeros(4), [False, True, None, False])
    found = compare_paired(a, b, metric="correct_norm")
    assert (found.n, found.metric) == (3, "correct_norm")
    assert found.mean_difference == pytest.approx(1 / 3)


def test_large_sets_are_drawn_in_pieces_with_the_same_result_as_their_theory() -> None:
    drawn = np.random.default_rng(5).normal(0, 1, 9000)
    found = compare_paired(*_pair(drawn), n_boot=1500)  # 13.5 million draws: four pieces
    half = 1.96 * drawn.std() / np.sqrt(9000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_different_examples_on_the_two_sides_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="q2"):
        compare_paired(_answers(np.zeros(3)), _answers(np.zeros(2)))


def test_accuracy_without_options_is_refused() -> None:
    with pytest.raises(DataError, match="options"):
        compare_paired(*_pair(np.zeros(3)), metric="correct_norm")


def test_it_turns_into_plain_values() -> None:
    found = compare_paired(*_pair(np.ones(3)), n_boot=100)
    assert found.to_json() == {
        "mean_difference": 1.0,
        "low": 1.0,
        "high": 1.0,
        "n": 3,
        "n_seeds": 1,
        "metric": "answer_loss",
    }
