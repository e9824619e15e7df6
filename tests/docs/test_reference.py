"""The pages that are made from the code say what the code says."""

from pathlib import Path
from typing import get_args

import pytest

import selectune
from selectune.cli.api_page import public_names
from selectune.cli.methods_page import FAMILIES
from selectune.cli.pages import PAGES
from selectune.registry import Family, get, methods

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run: python -m selectune.cli.pages"


def test_every_method_of_every_family_has_a_place() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert set(FAMILIES) == set(get_args(Family))
    entries = [entry for family in FAMILIES for entry in methods(family)]
    assert page.count("\n### ") == len(entries)
    for entry in entries:
        anchor = f"{entry.family}-{entry.name}".replace("_", "-")
        assert page.count(f'<a id="{anchor}"></a>\n\n### {entry.name}\n') == 1
        assert page.count(f"(#{anchor})") == 1


def test_a_method_shows_its_formula() -> None:
    assert get("data_scorer", "length").formula == (
        "    S = number of tokens that count in the loss"
    )
    assert get("row_picker", "softmax").formula == ""  # one file of several


def test_every_public_name_has_a_place() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert public_names("selectune") == selectune.__all__
    names = [*selectune.__all__, *selectune.weights.__all__]
    assert [name for name in names if f"\n### {name}\n" not in page] == ["weights"]
    assert "#### Scores.load" in page
    assert "\n### bergson_scores\n" in page
    assert "- `higher_is_better`: False turns" in page
