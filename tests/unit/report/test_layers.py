"""What was trained is drawn as it was recorded, and not drawn where nothing was."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectune.report.layer_rows import Foot
from selectune.report.layer_summary import alignment
from selectune.report.layers import trained
from selectune.report.maps import Ramp, layer_map, step_foot
from selectune.report.page import ReportData, TrainingFacts, render
from selectune.report.steps import Steps
from unit.report.samples import ARABIC, SCRIPT, bare_run, steps_of
from unit.report.test_page import Page


@pytest.fixture
def section_of(bare_run: ReportData) -> Callable[..., str]:
    def made(*facts: TrainingFacts) -> str:
        return trained(dataclasses.replace(bare_run, training=facts)) or ""

    return made


def cells_of(drawn: ET.Element, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Read a map back from its strokes."""
    levels = np.full(shape, -1)
    cells = next(e for e in drawn.iter("svg") if e.get("class") == "cells")
    for path in cells:
        for x, y, width in re.findall(r"M(\d+) ([\d.]+)h(\d+)", path.get("d", "")):
            row, start = shape[0] - 1 - int(float(y)), int(x)
            assert (levels[row, start : start + int(width)] == -1).all()  # nothing drawn twice
            levels[row, start : start + int(width)] = int(path.get("class", "")[len(kind) :])
    return levels


def tree(markup: str) -> ET.Element:
    return ET.fromstring(markup)  # noqa: S314 (our own text)


def titles(section: str, heading: str) -> list[str]:
    """Return what a pointer over each row of a figure shows, first layer first."""
    figure = section.split(heading)[1].split("</figure>")[0]
    rows = re.findall(r"<rect[^>]*><title>(layer [^<]*)</title>", figure)
    return list(dict.fromkeys(rows))  # the bars beside a map repeat them


@given(st.integers(1, 12).flatmap(lambda n: st.lists(
    st.lists(st.just(float("nan")) | st.floats(-0.5, 1.5), min_size=n, max_size=n),
    min_size=1, max_size=8)))  # fmt: skip
def test_a_map_has_the_colour_of_every_value_and_none_for_a_missing_one(
    rows: list[list[float]],
) -> None:
    values = np.asarray(rows)
    ramp = Ramp(0.0, 1.0)
    layers = list(range(len(rows)))
    drawn = tree(layer_map(values, ramp, "t", layers=layers, row_titles=["r"] * len(rows),
                           foot=Foot([], "")))  # fmt: skip
    levels = cells_of(drawn, "rising", values.shape)
    np.testing.assert_array_equal(levels, ramp(values))
    np.testing.assert_array_equal(levels == -1, np.isnan(values))
    known = ~np.isnan(values)
    inside = known & (values >= 0) & (values < 1)
    np.testing.assert_array_equal(levels[inside], np.floor(values[inside] * ramp.n))


def test_the_axis_of_steps_puts_a_number_under_the_column_of_its_step() -> None:
    edges = np.array([0.0, 1.0, 2.0, 10.0, 20.0])
    places = {words: place for place, words in step_foot(edges).marks}
    for words, place in places.items():
        column = int(place / 25)
        assert edges[column] <= int(words) < edges[column + 1]
    assert "15" in places


def test_the_number_of_cells_drawn_active_is_the_number_of_active_layers(
    section_of: Callable[..., str],
) -> None:
    facts = steps_of(n_layers=12, n_steps=50, n_active=3, picks=False)
    section = section_of(facts)
    figure = section.split("Which layers were trained")[1].split("</figure>")[0]
    cells = tree(re.findall(r"<svg[^>]*class=\"cells\".*?</svg>", figure)[0])
    levels = cells_of(cells, "is", (12, 50))
    expected = np.zeros((12, 50))
    for step, told in facts.records:
        expected[told["active"], step] = 1
    np.testing.assert_array_equal(levels, expected)
    assert "3 of 12 layers in each step" in section
    for layer, words in enumerate(titles(section, "Which layers were trained")):
        assert f"layer {layer}: trained in {expected[layer].sum():.0f} of 50 steps" in words


def test_the_last_picks_are_drawn_as_they_were_sorted_within_a_step(
    section_of: Callable[..., str],
) -> None:
    facts = steps_of(n_layers=6, n_steps=20, n_active=4)
    figure = section_of(facts).split("Do layers pick the same")[1].split("</figure>")[0]
    cells = tree(re.findall(r"<svg[^>]*class=\"cells\".*?</svg>", figure)[0])
    levels = cells_of(cells, "is", (6, 96))
    for place, (_, told) in enumerate(facts.records[-6:]):
        drawn = levels[:, 16 * place : 16 * (place + 1)]
        for layer in range(6):
            row = told["picks"].get(str(layer))
            assert (drawn[layer] == 1).sum() == (row.count("1") if row else 0)
            assert (drawn[layer] == -1).all() == (row is None)
        wanted = np.where(drawn == 1, 1, 0).sum(0)
        assert (np.diff(wanted) <= 0).all()
    for layer, words in enumerate(titles(section_of(facts), "Do layers pick the same")):
        told_rows = [t["picks"].get(str(layer), "") for _, t in facts.records]
        n, k = sum(map(len, told_rows)), sum(r.count("1") for r in told_rows)
        assert f"layer {layer}: picked {k:,} of {n:,} examples" in words


def test_a_count_of_active_layers_that_varies_is_drawn_and_one_that_does_not_is_said(
    section_of: Callable[..., str],
) -> None:
    def facts(*active: list[int]) -> TrainingFacts:
        return TrainingFacts(
            arm="a", n_layers=4, records=[(i, {"active": a}) for i, a in enumerate(active)]
        )

    varied = section_of(facts([0], [1, 2], [0, 1, 2]))
    assert "1 to 3, 2.0 on average, of 4 layers" in varied
    heads = tree(re.findall(r'<g class="head">.*?</g>', varied)[0])
    heights = [float(e.get("height", "")) for e in heads if e.get("class") == "bar"]
    np.testing.assert_allclose(np.array(heights) / heights[2], [1 / 3, 2 / 3, 1], atol=0.01)
    steady = section_of(facts([0, 1], [2, 3]))
    assert "2 of 4 layers in each step" in steady
    assert 'class="head"' not in steady
    whole = section_of(facts([0, 1, 2, 3], [0, 1, 2, 3]))
    assert "all 4 in every one of 2 steps" in whole
    assert 'class="cells"' not in whole


def test_alignment_is_mean_and_deviation_of_all_scores_of_equal_steps() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(1.0, 2.0, (20, 3, 16)) + rng.normal(0, 1, (20, 1, 1))
    records: list[tuple[int, dict[str, Any]]] = [
        (i, {"alignment_mean": s.mean(1).tolist(), "alignment_std": s.std(1).tolist()})
        for i, s in enumerate(scores)
    ]
    mean, spread = alignment(Steps(TrainingFacts(arm="a", n_layers=3, records=records)))
    np.testing.assert_allclose(mean, scores.mean((0, 2)))
    np.testing.assert_allclose(spread, scores.std((0, 2)))


def test_bars_of_tokens_are_as_long_as_their_sums(section_of: Callable[..., str]) -> None:
    records = [(0, {"tokens": [30, None, 10]}), (1, {"tokens": [None, 20, 50]}), (2, {})]
    section = section_of(TrainingFacts(arm="a", n_layers=3, records=records))
    figure = section.split("How much did each layer learn")[1].split("</figure>")[0]
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%" class="bar"', figure)]
    np.testing.assert_allclose(np.array(widths) / 100, [0.5, 1 / 3, 1.0], atol=0.001)
    assert "Which layers matter" not in section
    assert "Do layers pick" not in section


def test_the_table_has_every_layer_and_only_columns_that_hold_something(
    section_of: Callable[..., str],
) -> None:
    section = section_of(steps_of(n_layers=7, n_steps=12, picks=False, n_active=2))
    table = section.split("Numbers by layer")[1]
    assert re.findall(r'<th scope="col">([^<]*)', table) == [
        "Layer", "Importance at the end", "Steps trained"
    ]  # fmt: skip
    assert re.findall(r'<th scope="row">([^<]*)', table) == [str(i) for i in range(7)]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [(0, {})],
        [(0, {"probe": {"sets": []}}), (5, {})],
        [(0, {"importance": [None, None], "active": None})],
    ],
)
def test_no_figure_where_there_are_no_facts(
    records: list[tuple[int, dict[str, Any]]], full_run: ReportData
) -> None:
    data = dataclasses.replace(
        full_run, training=[TrainingFacts(arm="selected", n_layers=2, records=records)]
    )
    assert render(data) == render(full_run)
    assert 'id="layers"' not in render(full_run)
    assert ".map" not in render(full_run)  # a plain run does not carry the styles either


def test_every_arm_has_its_part_and_its_name_is_text(method_run: ReportData) -> None:
    source = render(method_run)
    page = Page(source)
    assert [f.arm for f in method_run.training] == ["selected", SCRIPT, ARABIC]
    for arm in ("selected", SCRIPT, ARABIC):
        assert f"Arm: {arm}" in page.text
    assert SCRIPT not in source.split("</style>")[1]
    assert source.count("Which layers matter most?") == 2  # the second arm has no importance
    assert page.text.index("Training loss") < page.text.index("What was trained")


def test_thirty_layers_and_a_thousand_steps_in_three_arms_stay_small(
    section_of: Callable[..., str],
) -> None:
    facts = steps_of(n_layers=30, n_steps=1000, n_active=8)
    section = section_of(*(dataclasses.replace(facts, arm=a) for a in ("a", "b", "c")))
    assert len(section.encode()) < 400_000


_BARE = bare_run()
_ROW = st.none() | st.lists(st.none() | st.floats(-3, 3), min_size=3, max_size=3)
_STEP = st.fixed_dictionaries(
    {},
    optional={
        "active": st.none() | st.lists(st.integers(0, 2), unique=True),
        "importance": st.none() | st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=3),
        "alignment_mean": _ROW,
        "alignment_std": st.none() | st.lists(st.none() | st.floats(0, 3), min_size=3, max_size=3),
        "max_z": st.none() | st.lists(st.none() | st.floats(0, 9), min_size=3, max_size=3),
        "target_cosine": _ROW,
        "tokens": st.none() | st.lists(st.none() | st.integers(0, 99), min_size=3, max_size=3),
        "picks": st.none()
        | st.integers(0, 5).flatmap(
            lambda n: st.dictionaries(st.sampled_from("012"), st.text("01", min_size=n, max_size=n))
        ),
        "examples": st.lists(st.sampled_from("abcde"), max_size=5),
    },
)


@settings(deadline=None)
@given(st.lists(_STEP, max_size=8))
def test_any_facts_with_any_gaps_make_a_page(steps: list[dict[str, Any]]) -> None:
    facts = TrainingFacts(
        arm="a", n_layers=3, records=list(enumerate(steps)), n_tokens={"a": 1, "b": 7, "c": 30}
    )
    page = Page(trained(dataclasses.replace(_BARE, training=[facts])) or "")
    assert page.is_balanced
    written = [page.text, *(v for _, found in page.elements for v in found.values())]
    assert not re.search(r"\b(nan|inf|not a number)\b", " ".join(written))
