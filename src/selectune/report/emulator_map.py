"""What goes out: one column per layer, one row per matrix, coloured by how much of it stayed."""

from collections.abc import Sequence

import numpy as np

from selectune.report import figures
from selectune.report.blocks import folded, listed, panel, section, table
from selectune.report.emulator_facts import CHANNELS, Cut, EmulatorFacts
from selectune.report.layer_rows import FOOT, Foot, axis_below
from selectune.report.maps import Ramp
from selectune.report.markup import Child, Markup, coordinate, join, shortened, tag
from selectune.report.numbers import percent
from selectune.report.weight_density import short_names
from selectune.report.weight_marks import cells, drawn

ATTENTION = "attention"  # where it was left as it is, nothing in it has a name
_LAYER = "layer"
_ROW = 22
_BEFORE, _BEHIND = 86, 104  # pixels for words on either side
_WORDS = {
    "adapter": ("trains0 cell", "whole, to be tuned"),
    "whole": ("rising8 cell", "whole, not to be tuned"),
    "shared": ("shared0 cell", "runs another layer's weights"),
    "gone": ("none cell", "left out"),
}


def going_out(facts: EmulatorFacts) -> Markup:
    """Return the part of the page on what is in the package."""
    return section(
        "map",
        "What goes out",
        "Every layer of the model, from input on the left to output on the right. The stronger the "
        "colour, the more of its parameters the package holds.",
        panel(join(["Share that is kept", tag("span", f" · {_summary(facts)}", class_="soft")]),
              Ramp(0.0, 1.0).key("none", "all") if facts.cuts else None,
              _key(facts),
              _map(facts)),
        _shared(facts),
        folded("Layer by layer, in numbers", _table(facts)),
    )  # fmt: skip


def labels_of(names: Sequence[str]) -> dict[str, str]:
    """Return short labels for matrices and channels."""
    short = short_names([name for name in names if name != CHANNELS])
    return {name: short.get(name, name) for name in names}


def layers_in_words(layers: Sequence[int]) -> str:
    """Return "0, 1, 28 and 29", or "0 to 3 and 9" where three or more stand in a row."""
    runs: list[list[int]] = []
    for j in layers:
        if runs and j == runs[-1][-1] + 1:
            runs[-1].append(j)
        else:
            runs.append([j])
    parts = [
        part
        for run in runs
        for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))
    ]
    return listed(parts)


def _rows(facts: EmulatorFacts) -> list[str]:
    if not facts.cuts:
        return [_LAYER]
    names = facts.names
    return [*(() if set(names) - {CHANNELS} else (ATTENTION,)), *names]


def _cut(facts: EmulatorFacts, j: int, name: str) -> Cut | None:
    return next((cut for cut in facts.cuts.get(j, ()) if cut.name == name), None)


def _summary(facts: EmulatorFacts) -> str:
    ratios = facts.quality["ratios"]
    return (
        f"{percent(ratios['middle'])} of the parameters of layers "
        f"{layers_in_words(facts.middle)}; {percent(ratios['whole'])} of the whole model"
    )


def _key(facts: EmulatorFacts) -> Markup:
    fates = {facts.fate(j) for j in range(facts.n_layers)}
    if facts.cuts:
        fates.discard("whole")  # the ramp says it
    return figures.key({swatch: words for fate, (swatch, words) in _WORDS.items() if fate in fates})


def _shared(facts: EmulatorFacts) -> Markup | None:
    """Return who runs in whose place."""
    users: dict[int, list[int]] = {}
    for j, source in facts.sources.items():
        if j != source:
            users.setdefault(source, []).append(j)
    pairs = [f"{source} in place of {layers_in_words(js)}" for source, js in sorted(users.items())]
    return tag("p", f"Layers that also run: {'; '.join(pairs)}.", class_="note") if pairs else None


def _map(facts: EmulatorFacts) -> Markup:
    rows, n = _rows(facts), facts.n_layers
    shares = np.full((len(rows), n), np.nan)
    for j in facts.middle:
        if facts.fate(j) in ("smaller", "whole"):
            for place, name in enumerate(rows):
                cut = _cut(facts, j, name)
                shares[place, j] = 1.0 if cut is None else cut.share
    height = _ROW * len(rows)
    figure = figures.figure(
        f"share of each matrix that is kept, by layer: {_summary(facts)}",
        height + FOOT,
        drawn(
            len(rows), n, height,
            *cells(Ramp(0.0, 1.0)(shares), "rising"),
            *_whole_columns(facts, "adapter", "trains", len(rows)),
            *_whole_columns(facts, "shared", "shared", len(rows)),
        ),
        *(figures.line(0, _ROW * k, 100, _ROW * k, "between") for k in range(1, len(rows))),
        *_pointed(facts, rows, height),
        *axis_below(_foot(n), height),
        class_="fig cells-over",
    )  # fmt: skip
    short = labels_of(rows)
    return tag(
        "div",
        _labels([short[name] for name in rows], _BEFORE, "end", height),
        figure,
        _labels([_range(facts, name) for name in rows], _BEHIND, "start", height),
        class_="map modules kept",
    )


def _whole_columns(facts: EmulatorFacts, fate: str, kind: str, n_rows: int) -> list[Markup]:
    is_so = np.array([facts.fate(j) == fate for j in range(facts.n_layers)])
    return cells(np.tile(np.where(is_so, 0, -1), (n_rows, 1)), kind)


def _pointed(facts: EmulatorFacts, rows: Sequence[str], height: int) -> list[Markup]:
    """Return a transparent strip over each layer that tells its numbers to a pointer."""
    short, width = labels_of(rows), 100 / facts.n_layers
    strips: list[Markup] = []
    for j in range(facts.n_layers):
        words = f"layer {j}: {facts.words(j)}"
        if facts.fate(j) == "smaller":
            cuts = [f"{short[cut.name]} {cut.words}" for cut in facts.cuts[j]]
            words = f"layer {j}: {', '.join(cuts)}"
        strips.append(
            tag("rect", tag("title", words), x=f"{coordinate(j * width)}%", height=height,
                width=f"{coordinate(width)}%", class_="pointed")
        )  # fmt: skip
    return strips


def _foot(n: int) -> Foot:
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 1000) if n <= 10 * k)
    return Foot([(100 * (j + 0.5) / n, f"{j}") for j in range(0, n, every)], "layer")


def _range(facts: EmulatorFacts, name: str) -> str:
    """Return how many of a matrix are kept in the layers that were made smaller."""
    cuts = [cut for j in facts.middle if (cut := _cut(facts, j, name)) is not None]
    if not cuts:
        kept = sum(facts.fate(j) == "whole" for j in facts.middle)
        return f"{kept} of {len(facts.middle)}" if name == _LAYER else "whole"
    counts = [cut.n_kept for cut in cuts]
    low, high, sizes = min(counts), max(counts), {cut.n for cut in cuts}
    if all(cut.is_whole for cut in cuts):
        return "whole"
    words = f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{words} of {sizes.pop():,}" if len(sizes) == 1 else words


def _labels(words: Sequence[str], width: int, side: str, height: int) -> Markup:
    x = width - 4 if side == "end" else 4
    rows = [
        tag("text", shortened(word, 18), x=x, y=_ROW * (i + 0.5) + 4, text_anchor=side,
            class_="tick")
        for i, word in enumerate(words)
    ]  # fmt: skip
    return tag(
        "svg", *rows, width=width, height=height + FOOT, class_="fig labels", aria_hidden="true"
    )


def _table(facts: EmulatorFacts) -> Markup:
    """Return every count as a number, for those who cannot see the map."""
    names = facts.names
    short = labels_of(names)
    rows: list[list[Child]] = []
    for j in range(facts.n_layers):
        row: list[Child] = [f"{j}", facts.words(j)]
        for name in names:
            cut = _cut(facts, j, name)
            row.append("–" if cut is None else _counted(cut))
        rows.append(row)
    return table(["Layer", "What", *(short[name] for name in names)], rows, class_="plain")


def _counted(cut: Cut) -> Child:
    if cut.is_whole:
        return "whole"
    return join([cut.words, tag("span", percent(cut.share), class_="unit")])
