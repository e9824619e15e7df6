"""Each token is as strong as its score, on the side of its sign, and foreign text stays text."""

import dataclasses
import re

import pytest

from selectune.report.heat import tokens
from selectune.report.page import ReportData, TokenMap, render
from unit.report.samples import SCRIPT, token_map
from unit.report.test_page import Page


def drawn(run: ReportData, *maps: TokenMap) -> str:
    return tokens(dataclasses.replace(run, token_maps=maps)) or ""


def classes(markup: str) -> dict[str, str]:
    """Return the class of every token's span, "" for a plain one, by its text."""
    found = re.findall(r'<span( class="[a-z0-9 ]+")? title="[^"]*">([^<]*)</span>', markup)
    return {text.strip(): name.removeprefix(' class="').rstrip('"') for name, text in found}


def test_levels_follow_the_share_of_the_strongest(bare_run: ReportData) -> None:
    scores = [None, 4.0, 3.1, 2.0, 1.0, 0.05, 0.0, -0.9, -2.1, -4.0]
    one = dataclasses.replace(
        token_map("a"), tokens=[f" t{k}" for k in range(len(scores))], scores=scores
    )
    found = classes(drawn(bare_run, one))
    assert found == {
        "t1": "up l4", "t2": "up l4", "t3": "up l2", "t4": "up l1", "t5": "", "t6": "",
        "t7": "down l1", "t8": "down l3", "t9": "down l4",
    }  # fmt: skip


def test_the_text_is_whole_and_escaped(bare_run: ReportData) -> None:
    page = Page(drawn(bare_run, token_map(SCRIPT)))
    assert f"Question: {SCRIPT}\nAnswer: t0 t1" in page.text
    assert {tag for tag, _ in page.elements} <= {
        "section", "h2", "h3", "p", "div", "article", "span", "b", "bdi", "i",
    }  # fmt: skip


def test_long_texts_are_cut_and_say_so(bare_run: ReportData) -> None:
    prompt = dataclasses.replace(token_map("a", n=700), tokens=["x" * 2000, *["t"] * 702])
    page = Page(drawn(bare_run, prompt)).text
    assert "… x" in page
    assert "x" * 400 not in page
    assert "100 more tokens are in tokens.jsonl" in page


@pytest.mark.parametrize(("form", "word"), [("loss", "on that token alone"), ("position", "there")])
def test_the_page_says_which_form_it_shows(bare_run: ReportData, form: str, word: str) -> None:
    assert word in drawn(bare_run, token_map("a", form))


def test_all_zero_scores_and_no_scores_are_drawn_plain(bare_run: ReportData) -> None:
    zero = dataclasses.replace(token_map("a"), scores=[None, None, None, *[0.0] * 5])
    none = dataclasses.replace(token_map("a"), scores=[None] * 8)
    assert set(classes(drawn(bare_run, zero)).values()) == {""}
    assert "0 of 0 tokens help" in drawn(bare_run, none)


def test_the_style_is_there_only_with_tokens(bare_run: ReportData) -> None:
    assert ".heat" not in render(bare_run)
    assert ".heat" in render(dataclasses.replace(bare_run, token_maps=[token_map("a")]))
