from pathlib import Path
from typing import get_args

from selectune.cli.reference import reference
from selectune.registry import Family, methods

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m selectune.cli.reference > docs/reference.md"
    )


def test_every_method_of_every_family_has_a_place() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [entry.name for family in get_args(Family) for entry in methods(family)]
    assert page.count("\n### ") == len(names)
    assert all(f"\n### {name}\n" in page for name in names)
