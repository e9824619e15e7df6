"""Numbered points between two wishes, those that no other beats in both coloured."""

from collections.abc import Sequence
from dataclasses import dataclass

from selectune.report import figures
from selectune.report.blocks import panel
from selectune.report.markup import Markup, coordinate, tag
from selectune.report.numbers import decimal, tick, ticks

_HEIGHT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One thing to be judged.

    Args:
        number: by which the page knows it.
        label: what it is called.
        x: its place from left to right.
        y: its place upwards; the higher, the better.
    """

    number: int
    label: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Across:
    """The axis from left to right.

    Args:
        what: a point's x, in short.
        sense: what its right end means.
        wish: +1 if further right is better, -1 if further left is.
        mark: a place to compare with, and what stands there.
    """

    what: str
    sense: str
    wish: int = 1
    mark: tuple[float, str] | None = None


def scatter(points: Sequence[Point], heading: str, across: Across) -> Markup:
    """Return a panel with the points.

    Args:
        points: to be drawn.
        heading: what `Point.y` is.
        across: what `Point.x` is.
    """
    best = {p for p, one in enumerate(points) if not any(_beats(o, one, across) for o in points)}
    mark = across.mark
    xs = figures.Scale.around([*([mark[0]] if mark else []), *(point.x for point in points)])
    ys = figures.Scale.around([point.y for point in points], pad=0.1)
    levels, step = ticks(ys.low, ys.high)
    heights = {value: _HEIGHT * (1 - ys(value) / 100) for value in levels}
    names = ", ".join(points[place].label for place in sorted(best))
    drawn = figures.figure(
        f"{heading} by {across.what}; not beaten in both: {names}",
        _HEIGHT,
        *(figures.line(0, y, 100, y, "grid") for y in heights.values()),
        *(
            figures.text(0, y - 4, tick(value, step), class_="tick halo")
            for value, y in heights.items()
            if y > 14
        ),
        figures.line(xs(mark[0]), 0, xs(mark[0]), _HEIGHT, "cutoff") if mark else None,
        figures.text(xs(mark[0]), -6, mark[1], class_="tick") if mark else None,
        figures.line(0, _HEIGHT, 100, _HEIGHT, "rail"),
        *(
            _mark(point, xs(point.x), _HEIGHT * (1 - ys(point.y) / 100), across, place in best)
            for place, point in enumerate(points)
        ),
        class_="fig airy",
    )
    return panel(heading, drawn, figures.axis(xs, high=across.sense))


def _beats(one: Point, other: Point, across: Across) -> bool:
    a, b = (across.wish * one.x, one.y), (across.wish * other.x, other.y)
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _mark(point: Point, x: float, y: float, across: Across, is_best: bool) -> Markup:
    words = f"{point.label}: {across.what} {decimal(point.x)}, {decimal(point.y)}"
    return tag(
        "g",
        tag("title", words),
        tag("circle", cx=f"{coordinate(x)}%", cy=y, r=6,
            class_=f"dot {'selected' if is_best else 'base'}"),
        figures.text(x, y - 11, f"{point.number}", anchor="middle", class_="halo"),
    )  # fmt: skip
