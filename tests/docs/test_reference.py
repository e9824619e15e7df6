from pathlib import Path

from selectune.cli.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m selectune.cli.reference > docs/reference.md"
    )
