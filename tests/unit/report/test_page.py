"""The page says what happened, in any run, and holds nothing that could act."""

import base64
import dataclasses
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from selectune.report.choice import Choice
from selectune.report.page import PoolTable, ReportData, parts_of, render, write_report
from unit.report.samples import ARABIC, SCRIPT, best_ids, levels_of, pool_of

RUNS = pytest.mark.parametrize("name", ["full", "wide", "bare", "method"])
_VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; open elements must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.is_balanced = True
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.is_balanced &= not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.is_balanced &= bool(self._open) and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, attribute: str) -> list[str]:
        """Return every value of an attribute."""
        return [a[attribute] for _, a in self.elements if attribute in a]


@RUNS
def test_nothing_on_the_page_can_act_or_load(
    name: str, run_named: Callable[[str], ReportData]
) -> None:
    page = Page(render(run_named(name)))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "img", "base", "video"}
    attributes = {a for _, found in page.elements for a in found}
    assert not {a for a in attributes if a.startswith("on")} | attributes & {"style", "src"}
    assert all(link.startswith(("#", "data:,")) for link in page.all("href"))
    assert "url(" not in render(run_named(name)).split("</style>")[0]


@RUNS
def test_the_page_is_well_formed_and_its_links_lead_somewhere(
    name: str, run_named: Callable[[str], ReportData]
) -> None:
    page = Page(render(run_named(name)))
    assert page.is_balanced
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    anchors = {link[1:] for link in page.all("href") if link.startswith("#")}
    assert anchors <= set(ids)
    assert set(page.all("aria-labelledby")) <= set(ids)


@RUNS
def test_every_figure_has_a_name(name: str, run_named: Callable[[str], ReportData]) -> None:
    source = render(run_named(name))
    drawings = re.findall(r'<svg[^>]*role="img"[^>]*>(.{7})', source)
    assert drawings
    assert set(drawings) == {"<title>"}


def test_the_policy_names_the_style_sheet_and_allows_no_script(full_run: ReportData) -> None:
    source = render(full_run)
    style = source.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = Page(source).all("content")[0]
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'; script-src 'none'" in policy


def test_equal_runs_give_equal_pages(full_run: ReportData) -> None:
    assert render(full_run) == render(dataclasses.replace(full_run))


def test_what_users_wrote_is_there_as_text(full_run: ReportData, wide_run: ReportData) -> None:
    full, wide = Page(render(full_run)).text, Page(render(wide_run)).text
    for example in full_run.best:
        for _, text in example.parts:
            assert text.strip()[:100] in full
    for warning in wide_run.warnings:
        assert warning in wide
    assert f"{SCRIPT} · {ARABIC}" in wide
    assert full_run.recipe_yaml in full


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"selected", "base"}, "no random control was tuned"),
        ({"selected", "random"}, "the untouched base was not evaluated"),
        ({"selected"}, "no random control was tuned"),
        (set[str](), "Nothing was evaluated"),
    ],
)
def test_a_missing_baseline_is_said_before_the_verdict(
    arms: set[str], words: str, full_run: ReportData
) -> None:
    levels = [x for x in levels_of("csqa") if x.arm in arms]
    text = Page(render(dataclasses.replace(full_run, levels=levels, differences=()))).text
    assert words in text
    assert text.index(words) < text.index("Better than random")


def test_a_run_with_both_baselines_opens_with_the_verdict(full_run: ReportData) -> None:
    text = Page(render(full_run)).text
    assert "lacks a baseline" not in text
    assert text.index("Better than random.") < text.index("Evaluation")
    assert "selected vs random" in text


def test_composition_counts_by_source_equal_a_plain_count(wide_run: ReportData) -> None:
    choice = Choice.of(wide_run)
    chosen = set(wide_run.selected_ids)
    n_by, k_by = choice.counts()
    for place, source in enumerate(choice.sources):
        rows = [i for i, s in zip(wide_run.pool.ids, wide_run.pool.sources, strict=True)
                if s == source]  # fmt: skip
        assert n_by[place] == len(rows)
        assert k_by[place] == sum(i in chosen for i in rows)


@pytest.mark.parametrize("n_sources", [1, 12, 13, 14, 40])
def test_every_example_is_in_one_row_of_the_composition(
    n_sources: int, full_run: ReportData
) -> None:
    pool = pool_of(tuple(f"s{i}" for i in range(n_sources)), 5)
    data = dataclasses.replace(full_run, pool=pool, selected_ids=best_ids(pool, 3))
    groups = Choice.of(data).groups()
    assert len(groups) <= 13
    np.testing.assert_array_equal(np.sum([of for _, of in groups], axis=0), 1)


def test_a_text_of_a_million_letters_makes_a_small_page(full_run: ReportData) -> None:
    long = dataclasses.replace(full_run.best[0], parts=(("text", "ق" * 1_000_000),))
    data = dataclasses.replace(full_run, best=[long], worst=[])
    source = render(data)
    assert len(source) < 300_000
    assert f"more characters are in {long.origin}" in source


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="energy of 'csqa': 1 values for 2 examples"):
        PoolTable(
            ids=["a", "b"],
            sources=["s", "s"],
            n_tokens=np.array([1, 2]),
            scores={"": np.array([0.1, 0.2])},
            energy={"csqa": np.array([0.5])},
        )


def test_an_empty_pool_and_an_empty_selection_still_make_a_page(full_run: ReportData) -> None:
    nothing = PoolTable(ids=[], sources=[], n_tokens=np.zeros(0, np.int64), scores={})
    assert Page(render(ReportData(title="t", pool=nothing, selected_ids=[], recipe_yaml="")))
    assert Page(render(dataclasses.replace(full_run, selected_ids=[]))).is_balanced


def test_scores_that_are_not_finite_are_counted_and_not_drawn(wide_run: ReportData) -> None:
    assert "5 examples without a finite score" in Page(render(wide_run)).text


def test_every_form_of_content_becomes_parts() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert parts_of({"messages": messages}) == (("user", "hi"), ("assistant", "ho"))
    assert parts_of({"prompt": "a", "completion": "b"}) == (("prompt", "a"), ("completion", "b"))
    assert parts_of({"text": "a"}) == (("text", "a"),)


def test_the_report_is_one_file_in_the_run_directory(full_run: ReportData, tmp_path: Path) -> None:
    path = write_report(tmp_path, full_run)
    assert path == tmp_path / "report.html"
    assert path.read_text("utf-8") == render(full_run)
    assert list(tmp_path.iterdir()) == [path]
