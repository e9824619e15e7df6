"""Numbers as a person reads them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectune.report import numbers


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
     (702, "11 min 42 s"), (3599.7, "1 h 00 min"), (90_061, "25 h 01 min")],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert numbers.duration(seconds) == words


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (640_000_000, "640 MB"),
     (999_999_999, "1.0 GB"), (2_110_000_000, "2.1 GB"), (3_000_000_000_000, "3.0 TB")],
)  # fmt: skip
def test_sizes(n_bytes: int, words: str) -> None:
    assert numbers.size(n_bytes) == words


def test_changes_name_their_direction_and_turn_the_interval_with_it() -> None:
    loss, accuracy = numbers.metric("answer_loss"), numbers.metric("correct_norm")
    assert loss.change(-0.2141) == "0.214 lower"
    assert loss.change_interval(-0.2141, -0.374, 0.054) == "[−0.054, 0.374]"
    assert accuracy.change(0.04) == "4.0 points higher"
    assert accuracy.change_interval(0.04, -0.015, 0.095) == "[−1.5, 9.5]"
    assert loss.change(0.0001) == "no difference"


def test_a_strange_metric_is_shown_without_judgement() -> None:
    strange = numbers.metric("bleu")
    assert (strange.label, strange.sign, strange.level(0.5)) == ("bleu", 0, "0.50")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_said_to_be_none(value: float) -> None:
    assert numbers.decimal(value) == "not a number"
    assert numbers.metric("answer_loss").level(value) == "not a number"


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_evenly_spaced_and_inside(low: float, span: float) -> None:
    high = low + span
    values, step = numbers.ticks(low, high)
    assert len(values) <= 9
    # At 1e9 two neighbours differ by less than floats can say: the spacing is as good as they are.
    assert all(low - 1e-6 * step <= v <= high + 1e-6 * step for v in values)
    assert all(
        math.isclose(b - a, step, rel_tol=1e-6, abs_tol=1e-15 * 4 * abs(b))
        for a, b in pairwise(values)
    )
    digits = f"{step:e}".split("e")[0]
    assert float(digits) in (1.0, 2.0, 5.0)
