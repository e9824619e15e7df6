"""One number per layer: dots with their spread, and bars."""

import math
from collections.abc import Sequence

from selectune.report.figures import Scale, figure, line
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


def layer_lines(
    scale: Scale,
    title: str,
    *,
    layers: Sequence[int],
    row_titles: Sequence[str],
    spans: Sequence[tuple[float, float]],
    dots: Sequence[float],
    label: str,
    zero: float | None = None,
) -> Markup:
    """Return a dot and a line per layer.

    Args:
        scale: the x axis.
        title: accessible name.
        layers: number of each layer.
        row_titles: what a pointer over each layer shows.
        spans: both ends of each line, NaN for none.
        dots: place of each dot.
        label: what the x axis counts.
        zero: where a reference line stands.
    """
    row = row_height(len(layers))
    height = row * len(layers)
    marks: list[Markup] = []
    for place, ((low, high), dot) in enumerate(zip(spans, dots, strict=True)):
        y = height - row * (place + 0.5)
        if math.isfinite(low) and math.isfinite(high):
            marks.append(line(scale(low), y, scale(high), y, "span"))
        if math.isfinite(dot):
            r = min(3.5, row / 2.5)
            marks.append(tag("circle", cx=f"{coordinate(scale(dot))}%", cy=y, r=r, class_="dot"))
    values, step = ticks(scale.low, scale.high, 4)
    foot = Foot([(scale(v), tick(v, step)) for v in values], label)
    drawn = figure(
        title,
        height + FOOT,
        *(line(scale(v), 0, scale(v), height, "grid") for v in values),
        line(scale(zero), 0, scale(zero), height, "zero") if zero is not None else None,
        *marks,
        *pointed(row_titles, row, 0),
        *axis_below(foot, height),
        class_="fig lines",
    )
    return beside(layer_numbers(layers, row, 0, ""), drawn, None)


def layer_bars(
    side: Side, title: str, *, layers: Sequence[int], row_titles: Sequence[str]
) -> Markup:
    """Return a bar per layer as a figure of its own."""
    row = row_height(len(layers))
    height = row * len(layers)
    scale = Scale(0.0, side.most)
    values, step = ticks(0, side.most, 4)
    foot = Foot([(scale(v), tick(v, step)) for v in values], side.label)
    drawn = figure(
        title,
        height + FOOT,
        *(line(scale(v), 0, scale(v), height, "grid") for v in values),
        *bars(side, row, 0),
        *pointed(row_titles, row, 0),
        *axis_below(foot, height),
        class_="fig bars",
    )
    return beside(layer_numbers(layers, row, 0, ""), drawn, None)
