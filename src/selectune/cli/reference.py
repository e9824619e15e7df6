"""docs/reference.md: every key of a recipe and every method, written out from the code itself.

python -m selectune.cli.reference > docs/reference.md
"""

from selectune.recipe import describe, describe_owner
from selectune.recipe_words import option_rows
from selectune.registry import Entry, Family, methods

_FAMILIES: dict[Family, str] = {
    "data_scorer": "Data scorers (`score.method`)",
    "selection_rule": "Selection rules (`select.rule`)",
    "training_method": "Training methods (`tune.method`)",
    "row_picker": "Row pickers (`tune.options.pick`)",
    "weight_scorer": "Scorers of single weights (`tune.weights.method`)",
    "compressor": "Compressors (`emulate.method`)",
}


def reference() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Reference",
        "",
        "Made from the code by `python -m selectune.cli.reference`; a test keeps it current.",
        "",
        "## Keys of a recipe",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *(_row(row) for row in describe()),
        "",
        "## Keys of an owner's recipe",
        "",
        "Beside `output`, `seed` and `model`; see `selectune emulate`.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *(_row(row) for row in describe_owner()),
    ]
    for family, title in _FAMILIES.items():
        lines += ["", f"## {title}"]
        for entry in methods(family):
            lines += ["", *_method(entry)]
    return "\n".join(lines) + "\n"


def _method(entry: Entry) -> list[str]:
    lines = [f"### {entry.name}", "", entry.summary]
    facts = (("Paper", entry.paper), ("Cost", entry.cost), ("Fails", entry.fails))
    told = [f"- **{name}** {text}" for name, text in facts if text]
    lines += ["", *told] if told else []
    rows = [_row(row) for row in option_rows(entry.options)]
    if rows:
        lines += ["", "| option | type | default | meaning |", "|---|---|---|---|", *rows]
    return lines


def _row(cells: tuple[str, str, str, str]) -> str:
    key, *rest = (cell.replace("|", "\\|") for cell in cells)
    return f"| `{key}` | {' | '.join(rest)} |"


if __name__ == "__main__":
    print(reference(), end="")
