"""Where chosen weights stand among all: magnitude to the right, gradient upwards."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from selectune.report import figures
from selectune.report.blocks import folded, isolated, panel, table
from selectune.report.layer_rows import FOOT, Foot, axis_below, beside, pointed
from selectune.report.maps import Ramp
from selectune.report.markup import Child, Markup, join, tag
from selectune.report.numbers import count
from selectune.report.weight_facts import WeightPlane
from selectune.report.weight_marks import cells, drawn, fine_percent, outline, power, size_of

_HEIGHT = 300  # pixels, about
_BULK = 0.99  # share of all weights inside the line
_GRADIENTS = {
    "mean_gradient": "|gradient|, mean of the examples",
    "first_gradient": "|gradient| of the first batch",
    "square_gradient": "gradient, root mean square",
    "drift": "|change| in full fine-tuning",
}


def plane(found: WeightPlane) -> Markup | None:
    """Return one map per arm, and what they say in numbers."""
    if not found.eligible.sum() or not found.chosen:
        return None
    arms = list(found.chosen)
    ramp = _ramp(found)
    inside = _bulk(found.eligible)
    maps = [
        panel(join([isolated(arm), tag("span", f" · {_words(found, arm)}", class_="soft")]),
              _map(found, arm, ramp, inside))
        for arm in arms
    ]  # fmt: skip
    shares = [f"{10.0 ** (2 + e):g}\u202f%" for e in (ramp.low, ramp.high)]
    missing = [f"{count(n)} of {arm}" for arm, n in found.outside.items() if n]
    return tag(
        "div",
        tag("h3", "Are they small? Does the task pull at them?"),
        tag(
            "p",
            "Each cell holds the weights of one magnitude and one gradient, both on scales of "
            "powers of ten. Blue where some were chosen, the darker the larger their share.",
            class_="lede",
        ),
        ramp.key(f"{shares[0]} of the cell or less", shares[1]),
        figures.key({"is0 cell": "none chosen", "bulk": f"{_BULK:.0%} of all weights are inside"}),
        tag("div", *maps, class_="pair planes"),
        tag(
            "p",
            f"Up: {_GRADIENTS.get(found.statistic, found.statistic)}. Cells far out hold few "
            "weights, so that chance alone makes some of them dark. The few weights beyond the "
            "axes are in the outermost cells."
            + (f" Not drawn, as their tensors were not scored: {', '.join(missing)}."
               if missing else ""),
            class_="note",
        ),
        _table(found),
        class_="task",
    )  # fmt: skip


def medians(
    counts: Int[np.ndarray, "m g"], edges: Sequence[float], axis: int
) -> tuple[float, float]:
    """Return the exponent of the median along an axis, zeros aside, and the share of zeros."""
    along = counts.sum(1 - axis)
    n = int(along[1:].sum())
    zeros = float(along[0] / max(1, along.sum()))
    if not n:
        return np.nan, zeros
    place = int(np.searchsorted(np.cumsum(along[1:]), n / 2))
    return (edges[place] + edges[place + 1]) / 2, zeros


def _ramp(found: WeightPlane) -> Ramp:
    """Return colours from a tenth of the smallest density, by powers of ten, to everything."""
    n = found.eligible.sum()
    shares = [float(c.sum() / n) for c in found.chosen.values() if c.sum()]
    return Ramp(float(np.round(np.log10(min(shares, default=0.1))) - 1), 0.0)


def _bulk(counts: Int[np.ndarray, "m g"]) -> Int[np.ndarray, "m g"]:
    """Return 1 in the fullest cells that together hold nearly all weights."""
    order = np.argsort(-counts, axis=None, kind="stable")
    held = np.cumsum(counts.ravel()[order])
    n = int(np.searchsorted(held, _BULK * held[-1])) + 1
    found = np.zeros(counts.size, np.int64)
    found[order[:n]] = 1
    return found.reshape(counts.shape)


def _laid_out(table: Float[np.ndarray, "m g"], found: WeightPlane) -> Float[np.ndarray, "r c"]:
    """Return a table as it is drawn: gradients upwards, zeros apart or, where none, not at all."""
    for axis in (0, 1):
        kept = np.take(table, range(1, table.shape[axis]), axis)
        if found.eligible.sum(1 - axis)[0]:
            zeros = np.take(table, [0], axis)
            kept = np.concatenate([zeros, np.full(zeros.shape, np.nan), kept], axis)
        table = kept
    return table.T[::-1]


def _map(found: WeightPlane, arm: str, ramp: Ramp, inside: Int[np.ndarray, "m g"]) -> Markup:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = found.chosen[arm] / found.eligible  # NaN where there is no weight
        exponents = np.log10(share)
    levels = ramp(_laid_out(np.where(found.chosen[arm] > 0, exponents, np.nan), found))
    empty = _laid_out(np.where(share == 0, 0.0, np.nan), found)
    around = _laid_out(inside.astype(float), found) == 1
    n_rows, n_columns = levels.shape
    row = max(3, _HEIGHT // n_rows)
    height = row * n_rows
    drawing = figures.figure(
        f"weights by magnitude and gradient, chosen by {arm}: {_words(found, arm)}",
        height + FOOT,
        drawn(
            n_rows,
            n_columns,
            height,
            *cells(np.where(np.isnan(empty), -1, 0), "is"),
            *cells(levels, ramp.kind),
            outline(around, "bulk"),
        ),
        *pointed(_titles(found, arm), row, 0),
        *axis_below(Foot(_marks(found.magnitude, n_columns), "|weight| →"), height),
        class_="fig cells-over",
    )
    return beside(_upwards(found.gradient, n_rows, row), drawing, None)


def _marks(edges: Sequence[float], n: int) -> list[tuple[float, str]]:
    """Return places in percent of whole powers of ten along an axis of n cells, and of zero."""
    first = n - (len(edges) - 1)  # cells of zeros, and the gap after them
    low, high = edges[0], edges[-1]
    whole = range(int(np.ceil(low - 1e-9)), int(np.floor(high + 1e-9)) + 1)
    every = 1 + len(whole) // 7
    places = np.interp([*whole], edges, np.arange(first, n + 1)) / n
    marks = [(100 * float(p), power(e)) for p, e in zip(places, whole, strict=True)]
    if first:  # numbers next to the zero would be written over it
        return [(50 / n, "0"), *((p, word) for p, word in marks[::every] if p > 9)]
    return marks[::every]


def _upwards(edges: Sequence[float], n_rows: int, row: int) -> Markup:
    height = row * n_rows
    words = [
        tag("text", label, x=34, y=min(height, max(9, height * (1 - place / 100) + 4)),
            text_anchor="end", class_="tick")
        for place, label in _marks(edges, n_rows)
    ]  # fmt: skip
    return tag(
        "svg", *words, width=38, height=height + FOOT, class_="fig labels", aria_hidden="true"
    )


def _titles(found: WeightPlane, arm: str) -> list[str]:
    """Return what a pointer over each row of cells shows, the lowest first."""
    n, k = found.eligible.sum(0), found.chosen[arm].sum(0)
    names = [
        "exactly 0",
        *(f"{size_of(a)} to {size_of(b)}" for a, b in zip(found.gradient, found.gradient[1:],
                                                         strict=False)),
    ]  # fmt: skip
    told = [
        f"gradient {name}: {count(int(a), 'weight')}, {fine_percent(float(b / max(1, a)))} chosen"
        for name, a, b in zip(names, n, k, strict=True)
    ]
    return [told[0], "", *told[1:]] if n[0] else told[1:]


def _words(found: WeightPlane, arm: str) -> str:
    """Return how the chosen compare with all, in words."""
    parts: list[str] = []
    for axis, edges, noun in ((0, found.magnitude, "|weight|"), (1, found.gradient, "|gradient|")):
        mine, all_ = (medians(c, edges, axis)[0] for c in (found.chosen[arm], found.eligible))
        if not np.isnan(mine - all_):
            parts.append(f"{noun} {_times(mine - all_)}")
    return f"median {', '.join(parts)} that of all" if parts else "all of them 0"


def _times(exponent: float) -> str:
    """Return a factor, as exact as cells are wide."""
    factor = 10.0**exponent
    return f"{factor:.0f} ×" if factor >= 9.5 else f"{factor:.1g} ×"


def _table(found: WeightPlane) -> Markup:
    every = {"all eligible weights": found.eligible, **found.chosen}
    rows: list[list[Child]] = []
    for name, counts in every.items():
        row: list[Child] = [isolated(name), f"{counts.sum():,}"]
        for axis, edges in ((0, found.magnitude), (1, found.gradient)):
            middle, zeros = medians(counts, edges, axis)
            row += ["–" if np.isnan(middle) else size_of(middle), fine_percent(zeros)]
        rows.append(row)
    names = ["Weights", "Number", "Median |weight|", "0", "Median gradient", "0"]
    return folded(
        "In numbers",
        table(names, rows, class_="plain"),
        tag("p", "Medians are as exact as cells are wide, and leave zeros out.", class_="note"),
    )
