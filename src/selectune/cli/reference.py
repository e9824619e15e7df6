"""docs/reference.md: every key of a recipe, written out from the code itself."""

from selectune.recipe import describe, describe_owner


def reference() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Reference",
        "",
        "Made from the code by `python -m selectune.cli.pages`; a test keeps it current. What",
        "`score.method`, `tune.method` and the other names can be: [methods.md](methods.md).",
        "",
        "## Keys of a recipe",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *(table_row(row) for row in describe()),
        "",
        "## Keys of an owner's recipe",
        "",
        "Beside `output`, `seed` and `model`; see `selectune emulate`.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *(table_row(row) for row in describe_owner()),
    ]
    return "\n".join(lines) + "\n"


def table_row(cells: tuple[str, str, str, str]) -> str:
    """Return key, type, default and meaning as a row of a table."""
    key, *rest = (cell.replace("|", "\\|") for cell in cells)
    return f"| `{key}` | {' | '.join(rest)} |"
