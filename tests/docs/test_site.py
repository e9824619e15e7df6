"""The site holds every document, and the repository every page that its navigation names."""

from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def pages(entry: object) -> Iterator[str]:
    """Yield what a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for inside in entry.values():
            yield from pages(inside)
    elif isinstance(entry, list):
        for inside in entry:
            yield from pages(inside)


def test_the_navigation_names_every_document_once() -> None:
    written = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(pages(written["nav"]))
    docs = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    root = [file.name.lower().replace("readme", "index") for file in ROOT.glob("*.md")]
    assert sorted(named) == sorted([*docs, *root])


def test_the_site_is_built_by_what_is_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    line = next(line for line in project.splitlines() if line.startswith("docs = "))
    assert line == f'docs = ["{next(p for p in pinned if p.startswith("mkdocs-material=="))}"]'
