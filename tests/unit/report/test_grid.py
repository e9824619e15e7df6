"""The page of a comparison: what it says, and that it says no more than the intervals do."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from selectune.report.grid import render, write_grid_report
from selectune.report.grid_facts import GridCell, GridFacts
from unit.report.browser import Browser, find_chromium
from unit.report.grid_samples import bare_grid, full_grid
from unit.report.test_page import Page


def test_the_headline_names_what_leaves_no_doubt() -> None:
    text = Page(render(full_grid())).text
    assert "Better than random: gist." in text
    assert "Worse than random: grad_cosine." in text
    assert "all tasks together, 3 seeds" in text


@pytest.mark.parametrize(
    ("ends", "tone"),
    [((-0.2, -0.3, -0.1), "good"), ((0.2, 0.1, 0.3), "bad"), ((-0.2, -0.5, 0.1), "even"),
     ((0.0, 0.0, 0.0), "even"), (None, "even")],
)  # fmt: skip
def test_a_tone_needs_an_interval_that_leaves_zero_out(
    ends: tuple[float, float, float] | None, tone: str
) -> None:
    assert GridCell(task="t", method="m", losses=[1.0], against_random=ends).tone == tone


def test_a_headline_names_the_best_and_counts_the_others() -> None:
    facts = full_grid()
    cells = [
        replace(cell, method=f"gist {k}", against_random=(-0.1 * k, -0.1 * k - 0.05, -0.04))
        for cell in facts.cells
        for k in range(1, 8)
        if cell.method == "gist"
    ]
    for n, says in (
        (7, "gist 7, gist 6, gist 5, gist 4 and 3 others."),
        (5, "gist 5, gist 4, gist 3, gist 2 and gist 1."),
    ):
        others = [cell for cell in facts.cells if cell.method != "gist"]
        few = [cell for cell in cells if int(cell.method[-1]) <= n]
        text = Page(render(replace(facts, cells=[*others, *few]))).text
        assert f"Better than random: {says}" in text


def test_nobody_better_is_said_plainly() -> None:
    facts = full_grid()
    cells = [
        replace(cell, against_random=cell.against_random and (0.0, -0.1, 0.1))
        for cell in facts.cells
    ]
    assert "No method is better than random." in Page(render(replace(facts, cells=cells))).text


def test_every_number_of_the_map_stands_on_the_page() -> None:
    text = Page(render(full_grid())).text
    for words in ("−0.200", "[−0.300, −0.100]", "+0.300", "0 : 2", "accuracy +2.0 points"):
        assert words in text
    assert "2 : 0" in text  # gist, of two tasks: all of them together is no task


def test_seeds_are_dots_in_every_cell() -> None:
    page = render(full_grid())
    seeds = re.findall(r"<svg[^>]*><title>seed by seed</title>(.*?)</svg>", page)
    assert len(seeds) == 3 * 3
    assert all(drawn.count("<circle") == 3 for drawn in seeds)


def test_what_no_other_beats_in_quality_and_price_is_coloured() -> None:
    page = render(full_grid())
    [title] = re.findall(r"Answer loss, upside down by [^<]*", page)
    # random is the cheapest, gist the best; the two others are dearer and worse.
    assert title.endswith("not beaten in both: random, gist")


def test_foreign_names_are_text() -> None:
    page = render(full_grid())
    assert "<b>&lt;" not in page
    assert "less &lt;b&gt;" in page


def test_random_alone_makes_a_page_without_claims() -> None:
    text = Page(render(bare_grid())).text
    assert "Random is all there is." in text
    assert "One seed says nothing" in text
    assert "Against random" not in text
    assert "nan" not in text


@pytest.mark.skipif(find_chromium() is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("facts", [full_grid(), bare_grid()], ids=["full", "bare"])
def test_the_page_is_silent_and_fits_the_screen(
    facts: GridFacts, width: int, tmp_path: Path
) -> None:
    binary = find_chromium()
    assert binary is not None
    url = write_grid_report(tmp_path, facts).as_uri()
    with Browser(binary, tmp_path / "profile") as browser:
        visit = browser.visit(url, width=width)
    assert [r for r in visit.requests if not r.startswith("data:")] == [url]
    assert visit.complaints == []
    assert visit.scroll_width <= width
