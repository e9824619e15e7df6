"""Marks and words of the figures about single weights."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

from selectune.report.markup import Markup, coordinate, tag

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fine_percent(share: float) -> str:
    """Return a share of 1 in percent with two digits that count: "0.024 %", "1.0 %", "71 %".

    What is not everything is never written as 100 %.
    """
    if not math.isfinite(share):
        return "–"
    value = 100 * share
    if 99.5 <= value < 100:
        return f"{math.floor(10 * value) / 10}\u202f%"
    exponent = int(f"{value:.1e}".partition("e")[2])  # of the rounded number: 0.999 is 1.0
    return f"{value:.{max(0, 1 - exponent) if value else 0}f}\u202f%"


def power(exponent: int) -> str:
    """Return a power of ten as people write it."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def size_of(exponent: float) -> str:
    """Return about what number has this logarithm to base ten."""
    return f"{10.0**exponent:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def cells(levels: Int[np.ndarray, "r c"], kind: str) -> list[Markup]:
    """Return one path per colour, a row being 1 high and the first at the top; -1 is left empty."""
    strokes: dict[int, list[str]] = {}
    for place, row in enumerate(levels):
        for start, end in _runs(row):
            if row[start] >= 0:
                stroke = f"M{start} {coordinate(place + 0.5)}h{end - start}"
                strokes.setdefault(int(row[start]), []).append(stroke)
    return [
        tag("path", d="".join(parts), class_=f"{kind}{level}")
        for level, parts in sorted(strokes.items())
    ]


def drawn(rows: int, columns: int, height: int, *paths: Markup, y: int = 0) -> Markup:
    """Return cells as wide as the figure and `height` pixels high."""
    return tag(
        "svg",
        *paths,
        y=y,
        width="100%",
        height=height,
        viewBox=f"0 0 {columns} {rows}",
        preserveAspectRatio="none",
        class_="cells",
    )


def outline(is_in: Bool[np.ndarray, "r c"], class_: str) -> Markup:
    """Return the line between the cells that are in and those that are not."""
    padded = np.pad(is_in, 1).astype(int)
    parts: list[str] = []
    for y, edge in enumerate(np.diff(padded, axis=0)[:, 1:-1]):
        parts += [f"M{start} {y}h{end - start}" for start, end in _runs(edge != 0) if edge[start]]
    for x, edge in enumerate(np.diff(padded, axis=1)[1:-1].T):
        parts += [f"M{x} {start}v{end - start}" for start, end in _runs(edge != 0) if edge[start]]
    return tag("path", d="".join(parts), class_=class_)


def _runs(row: Int[np.ndarray, " c"] | Bool[np.ndarray, " c"]) -> Iterator[tuple[int, int]]:
    """Yield where neighbours of one value begin and end."""
    edges = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist(), len(row)]
    return ((start, end) for start, end in pairwise(edges) if end > start)
