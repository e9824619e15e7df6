"""Every outcome has its own sentence, and every bad one its advice."""

import numpy as np
import pyarrow as pa
import pytest

from selectune.evaluation import Evaluation, verdict

N = 60


def _arm(mean: float, *, accuracy: float | None = None, noise: float = 0.5) -> Evaluation:
    rng = np.random.default_rng(round(100 * mean))
    right = None if accuracy is None else [k < accuracy * N for k in range(N)]
    columns = {
        "id": [f"q{k}" for k in range(N)],
        "answer_loss": (mean + noise * rng.normal(size=N)).tolist(),
        "correct_norm": pa.array(right or [None] * N, pa.bool_()),
    }
    return Evaluation(pa.table(columns))


@pytest.mark.parametrize(
    ("selected", "random", "base", "code", "words"),
    [
        (1.0, 2.0, 5.0, "better_than_random", "Better than random."),
        (2.02, 2.0, 5.0, "no_better_than_random", "No better than random."),
        (3.0, 2.0, 5.0, "worse_than_random", "Worse than random."),
        (6.0, 8.0, 5.0, "worse_than_base", "Worse than not tuning."),
        (4.98, 8.0, 5.0, "no_better_than_base", "No better than not tuning."),
    ],
)
def test_each_outcome_is_named(
    selected: float, random: float, base: float, code: str, words: str
) -> None:
    found = verdict(_arm(selected), _arm(random), _arm(base), n_boot=500)
    assert found.code == code
    assert found.text.startswith(words)
    assert bool(found.advice)
    assert list(found.intervals) == ["random/answer_loss", "base/answer_loss"]


def test_the_sentence_gives_a_positive_number_inside_its_interval() -> None:
    found = verdict(_arm(1.0, noise=0.0), _arm(2.0, noise=0.0), None, n_boot=100)
    assert (
        "Against random examples of the same budget, its answer loss is 1.000 nats per token "
        "lower [1.000, 1.000] (60 held-out examples)." in found.text
    )


def test_without_a_control_the_verdict_says_so_and_how_to_get_one() -> None:
    found = verdict(_arm(1.0), None, _arm(5.0), n_boot=200)
    assert found.code == "no_control"
    assert found.text.startswith("Not compared with random.")
    assert "tune.controls" in found.advice[0]


def test_accuracy_stands_beside_the_loss_where_there_are_options() -> None:
    found = verdict(_arm(1.0, accuracy=0.9), _arm(2.0, accuracy=0.5), None, n_boot=200)
    assert "accuracy differs by +40.0 points" in found.text
    assert "contradicts" not in found.text


def test_a_better_loss_with_a_worse_accuracy_is_called_a_contradiction() -> None:
    found = verdict(_arm(1.0, accuracy=0.3), _arm(2.0, accuracy=0.9), None, n_boot=200)
    assert "contradicts the loss" in found.text
    assert any("disagree" in line for line in found.advice)


def test_a_small_difference_says_how_many_examples_would_settle_it() -> None:
    found = verdict(_arm(1.92), _arm(2.0), _arm(5.0), n_boot=500)
    assert found.code == "no_better_than_random"
    assert "held-out examples would settle it; there were 60" in found.advice[0]


def test_several_seeds_share_one_base_and_are_counted() -> None:
    selected, random = ([_arm(x + s / 50) for s in range(3)] for x in (1.0, 2.0))
    found = verdict(selected, random, _arm(5.0), n_boot=300)
    assert found.code == "better_than_random"
    assert "3 seeds" in found.text
    assert found.advice == []
    assert found.intervals["base/answer_loss"].n_seeds == 3


def test_it_turns_into_plain_values() -> None:
    plain = verdict(_arm(1.0), _arm(2.0), _arm(5.0), n_boot=200).to_json()
    assert plain["code"] == "better_than_random"
    assert plain["intervals"]["random/answer_loss"]["high"] < 0
