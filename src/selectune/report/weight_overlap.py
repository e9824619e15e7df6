"""How much the choices of several methods have in common, beside what chance gives."""

from collections.abc import Sequence

from selectune.report.blocks import folded, isolated, panel, table
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.weight_facts import SharedWeights
from selectune.report.weight_marks import fine_percent

_LEVELS = 9
_NEAR = 1.5  # a share below this many times chance is not called more than chance


def shared(pairs: Sequence[SharedWeights]) -> Markup | None:
    """Return the matrix of pairs, and all numbers of each pair."""
    if not pairs:
        return None
    arms = list(dict.fromkeys(name for p in pairs for name in (p.first, p.second)))
    by_names = {(p.first, p.second): p for p in pairs}
    rows: list[list[Child]] = [
        [isolated(shortened(a, 24)), *(_cell(a, b, by_names) for b in arms)] for a in arms
    ]
    most = max(pairs, key=lambda p: p.jaccard)
    words = f"most alike: {most.first} and {most.second}, Jaccard index {most.jaccard:.2f}"
    drawn = table(
        ["", *(isolated(shortened(a, 24)) for a in arms)], rows, class_="plain narrow shares"
    )
    return panel(
        join(["Do methods choose the same weights?", tag("span", f" · {words}", class_="soft")]),
        drawn,
        _numbers(pairs),
        note="Of the weights that the row's method chose, the share that the column's chose too; "
        "below it what a blind choice of the column's size would share.",
    )


def _cell(row: str, column: str, pairs: dict[tuple[str, str], SharedWeights]) -> Markup:
    found = pairs.get((row, column)) or pairs.get((column, row))
    if row == column or found is None:
        return tag("span", "–", class_="soft")
    mine, other = (
        (found.n_first, found.n_second) if found.first == row else (found.n_second, found.n_first)
    )
    share, chance = found.n_both / max(1, mine), other / max(1, found.n_eligible)
    level = min(_LEVELS - 1, int(_LEVELS * share))
    is_more = share > _NEAR * chance
    return tag(
        "span",
        tag("b", fine_percent(share)) if is_more else fine_percent(share),
        tag("span", f"chance {fine_percent(chance)}", class_="unit"),
        class_=f"share rising{level}",
    )


def _numbers(pairs: Sequence[SharedWeights]) -> Markup:
    has_signs = any(p.sign_agreement is not None for p in pairs)
    rows: list[list[Child]] = []
    for p in pairs:
        names = join([isolated(shortened(p.first, 24)), " and ", isolated(shortened(p.second, 24))])
        signs = "–" if p.sign_agreement is None else fine_percent(p.sign_agreement)
        row: list[Child] = [
            names, f"{p.n_first:,}", f"{p.n_second:,}", f"{p.n_both:,}", f"{p.by_chance:,.0f}",
            f"{p.jaccard:.3f}",
        ]  # fmt: skip
        rows.append([*row, signs] if has_signs else row)
    names = ["Pair", "First", "Second", "Both", "By chance", "Jaccard index"]
    return folded(
        "All pairs in numbers",
        table([*names, "Moved alike"] if has_signs else names, rows, class_="plain"),
    )
