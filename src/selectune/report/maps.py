"""Maps of layers: one row per layer, the first at the bottom, a colour per cell.

Cells of one colour are one path, and neighbours in a row one stroke of it: a map of 30 layers and
80 columns takes some 20 kB. Colours are classes of `layers.css`, so dark mode comes free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from selectune.report.figures import figure, line, text
from selectune.report.layer_rows import (
    FOOT,
    Foot,
    Side,
    axis_below,
    bars,
    beside,
    layer_numbers,
    pointed,
    row_height,
)
from selectune.report.markup import Markup, coordinate, tag
from selectune.report.numbers import tick, ticks

LEVELS = 9  # odd: a two-sided ramp has a middle
_HEAD = 56  # pixels of the bars above a map


@dataclass(frozen=True, slots=True)
class Ramp:
    """A range of numbers cut into colours.

    Args:
        low: the first colour begins here.
        high: the last one ends here.
        kind: class of the colours: "rising", "sided" (two hues around the middle) or "is" (two).
    """

    low: float
    high: float
    kind: str = "rising"

    @property
    def n(self) -> int:
        """How many colours there are."""
        return 2 if self.kind == "is" else LEVELS

    def __call__(self, values: Float[np.ndarray, "l c"]) -> Int[np.ndarray, "l c"]:
        """Return the colour of each value, -1 for NaN; what lies outside gets the nearest."""
        share = (np.nan_to_num(values, nan=self.low) - self.low) / (self.high - self.low)
        level = np.clip(np.floor(share * self.n), 0, self.n - 1).astype(np.int64)
        return np.where(np.isnan(values), -1, level)

    def key(self, low: str, high: str, *, middle: str = "") -> Markup:
        """Return a legend: the colours in a row, words at its ends and in the middle."""
        width = 100 / self.n
        cells = [
            tag("rect", x=f"{coordinate(i * width)}%", width=f"{coordinate(width)}%", height=12,
                class_=f"{self.kind}{i}")
            for i in range(self.n)
        ]  # fmt: skip
        words = ", ".join(part for part in (low, middle, high) if part)
        bar = figure(f"colours, from low to high: {words}", 12, *cells, class_="fig ramp")
        ends = (tag("span", low), bar, tag("span", high))
        note = tag("span", f"middle: {middle}", class_="soft") if middle else None
        return tag("p", *ends, note, class_="key")


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A bar per column, above a map.

    Args:
        values: height of each bar, NaN for none.
        label: what they are, in short.
        words: what to write on each bar; empty for nothing.
        line: a height to compare with, None for none.
    """

    values: Float[np.ndarray, " c"]
    label: str
    words: Sequence[str] = ()
    line: float | None = None


def step_foot(edges: Float[np.ndarray, " c1"]) -> Foot:
    """Return an axis of optimizer steps.

    Args:
        edges: step at which each column begins, and where the last one ends.
    """
    n = len(edges) - 1
    values, _ = ticks(float(edges[0]), float(edges[-1]), 7)
    whole = sorted({round(v) for v in values if edges[0] <= round(v) < edges[-1]})
    # Half a step in, so that a column of one step has its number below its middle.
    places = np.interp(np.asarray(whole) + 0.5, edges, np.arange(n + 1)) / n
    marks = [(100 * float(p), f"{v:,}") for p, v in zip(places, whole, strict=True)]
    return Foot(marks, "optimizer step →")


def layer_map(
    values: Float[np.ndarray, "l c"],
    ramp: Ramp,
    title: str,
    *,
    layers: Sequence[int],
    row_titles: Sequence[str],
    foot: Foot,
    side: Side | None = None,
    head: Head | None = None,
) -> Markup:
    """Return a map with its axes.

    Args:
        values: a row per layer, NaN where there is nothing to colour.
        ramp: the colours.
        title: accessible name: what is to be seen.
        layers: number of each layer.
        row_titles: what a pointer over each layer shows.
        foot: the x axis.
        side: bars per layer.
        head: bars per column.
    """
    n_layers, n_columns = values.shape
    row = row_height(n_layers)
    height = row * n_layers
    top = 0 if head is None else _HEAD
    cells = tag(
        "svg",
        *_cells(ramp(values), ramp.kind),
        y=top,
        width="100%",
        height=height,
        viewBox=f"0 0 {n_columns} {n_layers}",
        preserveAspectRatio="none",
        class_="cells",
    )
    drawn = figure(
        title,
        top + height + FOOT,
        None if head is None else _bars_above(head),
        cells,
        *(line(x, top, x, top + height, "break") for x in foot.breaks),
        *pointed(row_titles, row, top),
        *axis_below(foot, top + height),
        class_="fig cells-over",
    )
    sided = None if side is None else _bars_beside(side, row, top, row_titles)
    return beside(layer_numbers(layers, row, top, head.label if head else ""), drawn, sided)


def _cells(levels: Int[np.ndarray, "l c"], kind: str) -> list[Markup]:
    """Return one path per colour, made of horizontal strokes as high as a row."""
    n_layers, n_columns = levels.shape
    strokes: dict[int, list[str]] = {}
    for place, row in enumerate(levels):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), n_columns]
        y = coordinate(n_layers - place - 0.5)
        for start, end in pairwise(edges):
            if end > start and row[start] >= 0:
                strokes.setdefault(int(row[start]), []).append(f"M{start} {y}h{end - start}")
    return [
        tag("path", d="".join(parts), class_=f"{kind}{level}")
        for level, parts in sorted(strokes.items())
    ]


def _bars_beside(side: Side, row: int, top: int, row_titles: Sequence[str]) -> Markup:
    height = top + row * len(side.values)
    factor = 100 if side.unit == "%" else 1
    _, step = ticks(0, factor * side.most, 3)
    end = tick(factor * side.most, step / 10) + ("\u202f%" if side.unit else "")
    return figure(
        f"{side.label}, by layer; the widest bar allowed is {end}",
        height + FOOT,
        line(0, top, 0, height, "rail"),
        *bars(side, row, top),
        *pointed(row_titles, row, top),
        line(0, height, 100, height, "rail"),
        text(0, height + 15, "0", anchor="start", class_="tick"),
        text(100, height + 15, end, anchor="end", class_="tick"),
        text(0, height + 32, side.label, anchor="start", class_="sense"),
        class_="fig bars",
    )


def _bars_above(head: Head) -> Markup:
    room = _HEAD - 22  # a line of words above, some air below
    known = head.values[np.isfinite(head.values)]
    most = max(float(known.max(initial=0)), head.line or 0.0) or 1.0
    slot = 100 / len(head.values)
    gap = 0.12 if slot > 4 else 0.0
    bottom = _HEAD - 6
    marks: list[Markup] = []
    for place, value in enumerate(head.values):
        if not math.isfinite(value):
            continue
        size = room * float(value) / most
        marks.append(
            tag("rect", x=f"{coordinate(slot * (place + gap / 2))}%", y=bottom - size, height=size,
                width=f"{coordinate(slot * (1 - gap))}%", class_="bar")
        )  # fmt: skip
        if head.words:
            marks.append(text(slot * (place + 0.5), 10, head.words[place], anchor="middle"))
    if head.line is not None:
        y = bottom - room * head.line / most
        marks.append(line(0, y, 100, y, "cutoff"))
    return tag("g", *marks, class_="head")
