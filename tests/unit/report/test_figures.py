"""Marks stand where their numbers say."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectune.report import figures


def _tree(markup: str) -> ET.Element:
    return ET.fromstring(markup)  # noqa: S314 (our own text)


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(0, 1))
def test_a_scale_is_linear_and_keeps_marks_inside(low: float, span: float, share: float) -> None:
    scale = figures.Scale(low, low + span)
    assert math.isclose(scale(low + share * span), 100 * share, abs_tol=1e-3)
    assert scale(low - span) == 0
    assert scale(low + 2 * span) == 100


@pytest.mark.parametrize("values", [[], [3.0], [math.nan, math.inf], [0.0, 0.0], [1.0, 2.0]])
def test_a_scale_around_anything_has_a_width(values: list[float]) -> None:
    scale = figures.Scale.around(values)
    assert scale.high > scale.low


def test_a_whisker_draws_its_interval_its_mean_and_zero() -> None:
    drawn = _tree(
        figures.whisker(figures.Scale(-10.0, 10.0), 2.0, (-1.0, 5.0), "good", "gain", zero=0)
    )
    whisker = next(e for e in drawn if "whisker" in e.get("class", ""))
    zero = next(e for e in drawn if e.get("class") == "zero")
    dot = next(e for e in drawn if e.tag == "circle")
    assert (whisker.get("x1"), whisker.get("x2")) == ("45%", "75%")
    assert (zero.get("x1"), dot.get("cx")) == ("50%", "60%")
    assert drawn[0].tag == "title"
    assert drawn[0].text == "gain"


def test_bars_of_a_spectrum_are_coloured_up_to_the_rank_and_as_high_as_their_share() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    bars = [e for e in _tree(figures.spectrum(shares, 2, "s")) if e.tag == "rect"]
    assert [b.get("class") for b in bars] == ["bar selected", "bar selected", "bar pool"]
    heights = [float(b.get("height", "")) for b in bars]
    np.testing.assert_allclose(np.array(heights) / sum(heights), shares, atol=0.01)


def test_a_histogram_outline_holds_the_counts() -> None:
    drawn = _tree(figures.ridge(np.array([1.0, 4.0, 2.0]), np.array([0.0, 2.0, 0.0]), 50.0, "r"))
    everyone, chosen = (e.get("d", "") for e in drawn.iter() if e.tag == "path")
    height = 38
    assert [y for _, y in _points(everyone)][1:] == [height * (1 - s) for s in (0.25, 1, 0.5)]
    assert [y for _, y in _points(chosen)][1:] == [height, height / 2, height]


def test_a_loss_that_is_no_number_interrupts_its_curve() -> None:
    steps = np.arange(5.0)
    losses = np.array([3.0, 2.0, math.nan, 1.5, 1.0])
    drawn = _tree(figures.curves({"selected": (steps, losses)}, "loss"))
    path = next(e.get("d", "") for e in drawn.iter() if e.tag == "path")
    assert path.count("M") == 2
    assert len(_points(path)) == 4


@pytest.mark.parametrize("n", [1, 2])
def test_curves_of_few_or_equal_points_are_drawn(n: int) -> None:
    line = np.arange(float(n)), np.full(n, 2.0)
    _tree(figures.curves({"selected": line}, "loss"))


def test_arms_have_one_colour_and_unknown_ones_share_three() -> None:
    arms = ["selected", "random", "base", "length", "perplexity"]
    classes = [figures.arm_class(a, arms) for a in arms]
    assert classes == ["selected", "random", "base", "other1", "other2"]
