"""Rows of layers, the first at the bottom: what maps and profiles of layers share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selectune.report.figures import line, text
from selectune.report.markup import Markup, Number, coordinate, join, tag

FOOT = 36  # pixels under the rows: numbers, and what they count


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """A bar per layer, to the right of a map.

    Args:
        values: length of each bar, NaN for none.
        label: what they are.
        most: what fills the width.
        unit: "%" where values are shares of 1.
    """

    values: Float[np.ndarray, " l"]
    label: str
    most: float
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Foot:
    """The x axis of a map.

    Args:
        marks: (place in percent, text).
        label: what they count.
        breaks: places in percent where columns are kept apart.
    """

    marks: Sequence[tuple[float, str]]
    label: str
    breaks: Sequence[float] = ()


def row_height(n_layers: int) -> int:
    """Return pixels per layer: whole, or rows would blur."""
    return max(3, min(16, 340 // n_layers))


def pointed(row_titles: Sequence[str], row: int, top: int) -> list[Markup]:
    """Return a transparent strip over each layer that tells its numbers to a pointer."""
    n = len(row_titles)
    return [
        tag("rect", tag("title", words), y=top + row * (n - 1 - place), width="100%", height=row,
            class_="pointed")
        for place, words in enumerate(row_titles)
    ]  # fmt: skip


def axis_below(foot: Foot, height: int) -> list[Markup]:
    """Return the x axis, `height` pixels down."""
    return [
        line(0, height, 100, height, "rail"),
        *(text(x, height + 15, words, class_="tick") for x, words in foot.marks),
        text(50, height + 32, foot.label, anchor="middle", class_="sense"),
    ]


def bars(side: Side, row: int, top: int) -> list[Markup]:
    """Return a bar per layer, rows being `row` pixels high and beginning at `top`."""
    n, thick = len(side.values), max(2, row - 3)
    return [
        tag("rect", y=top + row * (n - 1 - place) + (row - thick) / 2, height=thick,
            width=f"{coordinate(100 * float(value) / side.most)}%", class_="bar")
        for place, value in enumerate(side.values)
        if math.isfinite(value)
    ]  # fmt: skip


def layer_numbers(layers: Sequence[int], row: int, top: int, head: str) -> Markup:
    """Return the y axis: numbers of layers, as many as have room."""
    n = len(layers)
    every = next(k for k in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if k * row >= 14)
    numbers = [
        tag("text", f"{layers[i]}", x=34, y=top + row * (n - i - 0.5) + 4, text_anchor="end",
            class_="tick")
        for i in range(0, n, every)
    ]  # fmt: skip
    return tag(
        "svg",
        *numbers,
        tag("text", "Layer", x=34, y=top - 10, text_anchor="end", class_="sense"),
        tag("text", head, x=34, y=10, text_anchor="end", class_="sense") if head else None,
        width=38,
        height=top + row * n + FOOT,
        class_="fig numbers",
        aria_hidden="true",
    )


def beside(numbers: Markup, drawn: Markup, side: Markup | None) -> Markup:
    """Return layer numbers, a figure and what stands to its right as one row of the page."""
    return tag("div", join([numbers, drawn, side]), class_="map beside" if side else "map")


def percent_of(value: Number) -> str:
    """Return a share of 1 in whole percent, "–" where there is none."""
    return f"{100 * value:.0f}\u202f%" if math.isfinite(value) else "–"
