"""The pages of docs/ that are made from the code, all at once.

python -m selectune.cli.pages
"""

from collections.abc import Callable
from pathlib import Path

from selectune.cli.api_page import api_page
from selectune.cli.methods_page import methods_page
from selectune.cli.reference import reference
from selectune.files import write_file

PAGES: dict[str, Callable[[], str]] = {
    "api.md": api_page,
    "methods.md": methods_page,
    "reference.md": reference,
}


def write_pages(folder: Path) -> None:
    """Write every page into the folder of documents."""
    for name, page in PAGES.items():
        write_file(folder / name, page().encode())


if __name__ == "__main__":
    write_pages(Path(__file__).parents[3] / "docs")
