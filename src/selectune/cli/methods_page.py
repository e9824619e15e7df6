"""docs/methods.md: every method of every family, written out from the registry."""

from textwrap import dedent

from selectune.cli.reference import table_row
from selectune.recipe.words import option_rows
from selectune.registry import Entry, Family, methods

FAMILIES: dict[Family, tuple[str, str]] = {
    "data_scorer": ("Data scorers", "`score.method`: which examples, once before training."),
    "selection_rule": ("Selection rules", "`select.rule`: in which order scores fill the budget."),
    "training_method": (
        "Training methods",
        "`tune.method`, a callback or a context: which layers, examples per layer or entries, in "
        "every step.",
    ),
    "row_picker": ("Row pickers", "`tune.options.pick` of the methods that choose per layer."),
    "weight_scorer": (
        "Scorers of single weights",
        "`tune.weights.method`, `selectune.weights`: which entries train.",
    ),
    "compressor": (
        "Compressors",
        "`emulate.method`: what stands in for the layers that stay at their owner's.",
    ),
}


def methods_page() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Methods",
        "",
        "Made from the registry by `python -m selectune.cli.pages`; a test keeps it current. What",
        "was measured, and the papers' own numbers: [PAPERS.md](../PAPERS.md).",
    ]
    for family, (title, about) in FAMILIES.items():
        entries = methods(family)
        lines += ["", f"## {title}", "", about, "", "| method | what | needs |", "|---|---|---|"]
        for entry in entries:
            needs = ", ".join(sorted(entry.needs)) or "-"
            lines.append(
                f"| [`{entry.name}`](#{_anchor(entry)}) | {_cell(entry.summary)} | {needs} |"
            )
        for entry in entries:
            lines += ["", *_method(entry)]
    return "\n".join(lines) + "\n"


def _anchor(entry: Entry) -> str:
    # "random" is the name of methods of several families, and an anchor stands once on a page.
    return f"{entry.family}-{entry.name}".replace("_", "-")


def _method(entry: Entry) -> list[str]:
    lines = [f'<a id="{_anchor(entry)}"></a>', "", f"### {entry.name}", "", entry.summary]
    if entry.formula:
        lines += ["", "```text", dedent(entry.formula), "```"]
    facts = (("Paper", entry.paper), ("Cost", entry.cost), ("Fails", entry.fails))
    told = [f"- **{name}** {text}" for name, text in facts if text]
    lines += ["", *told] if told else []
    rows = [table_row(row) for row in option_rows(entry.options)]
    if rows:
        lines += ["", "| option | type | default | meaning |", "|---|---|---|---|", *rows]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
