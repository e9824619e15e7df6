"""Figures as hand-made SVG: the few marks that the report needs.

Not matplotlib: its import costs a second, its SVG carries its own fonts and colours, and it cannot
reflow. Here text stays text in the page's font and takes its colours from the style sheet (dark
mode comes free), equal data gives equal bytes, and a figure stretches with the page while its
letters keep their size: x is in percent of the width, y in pixels, and paths live in an inner
<svg> that is scaled in x alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selectune.report.markup import Markup, Number, coordinate, join, tag
from selectune.report.numbers import tick, ticks

_INNER = 1000  # x units of the inner drawing
_ARM_CLASSES = {"selected": "selected", "random": "random", "base": "base", "full": "full"}


def arm_class(arm: str, arms: Sequence[str]) -> str:
    """Return the colour class of an arm: the same on the whole page."""
    if arm in _ARM_CLASSES:
        return _ARM_CLASSES[arm]
    others = [a for a in arms if a not in _ARM_CLASSES]
    return f"other{others.index(arm) % 3 + 1}"


@dataclass(frozen=True, slots=True)
class Scale:
    """A range of numbers laid over the width of a figure, in percent."""

    low: float
    high: float

    def __call__(self, value: Number) -> float:
        """Return where `value` lies: 0 left, 100 right; what lies outside is put on the edge."""
        return float(np.clip(100 * (value - self.low) / (self.high - self.low), 0, 100))

    @classmethod
    def around(cls, values: Sequence[float], *, pad: float = 0.06) -> "Scale":
        """Return a scale over all finite `values`, with some air on both sides."""
        finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        air = (high - low) * pad or abs(high) * 0.1 or 1.0
        return cls(low - air, high + air)


def figure(title: str, height: Number, *marks: Markup | None, class_: str = "fig") -> Markup:
    """Return an SVG as wide as its column, with an accessible name."""
    return tag(
        "svg", tag("title", title), *marks, class_=class_, width="100%", height=height, role="img"
    )


def stretched(height: Number, *marks: Markup) -> Markup:
    """Return a drawing with x in 0..1000 that fills the width."""
    return tag(
        "svg",
        *marks,
        width="100%",
        height=height,
        viewBox=f"0 0 {_INNER} {coordinate(height)}",
        preserveAspectRatio="none",
    )


def text(
    x: Number, y: Number, content: str, *, anchor: str | None = None, class_: str = ""
) -> Markup:
    """Return text at x percent; near an edge it grows inwards."""
    side = anchor or ("start" if x < 4 else "end" if x > 96 else "middle")
    return tag("text", content, x=_percent(x), y=y, text_anchor=side, class_=class_ or None)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """Return a line, x in percent."""
    return tag("line", x1=_percent(x1), y1=y1, x2=_percent(x2), y2=y2, class_=class_)


def axis(scale: Scale, *, low: str = "", high: str = "") -> Markup:
    """Return a bare axis with round numbers, and what its two directions mean."""
    values, step = ticks(scale.low, scale.high)
    words = low or high
    return figure(
        "axis: " + ", ".join(tick(v, step) for v in values),
        34 if words else 18,
        *(text(scale(v), 13, tick(v, step), class_="tick") for v in values),
        text(0, 30, low, anchor="start", class_="sense") if low else None,
        text(100, 30, high, anchor="end", class_="sense") if high else None,
    )


def whisker(
    scale: Scale,
    value: float,
    interval: tuple[float, float] | None,
    class_: str,
    title: str,
    *,
    zero: Number | None = None,
) -> Markup:
    """Return a dot with its interval; `zero` draws a reference line."""
    middle = 13
    dot = tag("circle", cx=_percent(scale(value)), cy=middle, r=5, class_=f"dot {class_}")
    return figure(
        title,
        2 * middle,
        line(0, middle, 100, middle, "rail"),
        line(scale(zero), 0, scale(zero), 2 * middle, "zero") if zero is not None else None,
        line(scale(interval[0]), middle, scale(interval[1]), middle, f"whisker {class_}")
        if interval
        else None,
        dot if math.isfinite(value) else None,
    )


def twin_bars(pool: float, chosen: float, most: float, title: str) -> Markup:
    """Return a source's share of the pool above its share of the selection."""
    return figure(
        title,
        22,
        tag("rect", y=3, height=6, rx=1, width=_percent(100 * pool / most), class_="bar pool"),
        tag(
            "rect", y=11, height=8, rx=1, width=_percent(100 * chosen / most), class_="bar selected"
        ),
    )


def ridge(
    everyone: Float[np.ndarray, " b"],
    chosen: Float[np.ndarray, " b"],
    cutoff: float | None,
    title: str,
) -> Markup:
    """Return a small histogram of all examples with the chosen ones on top of it.

    Args:
        everyone: examples per bin.
        chosen: chosen examples per bin, on the same scale.
        cutoff: where a marker stands, in percent.
        title: accessible name.

    Returns:
        An SVG.
    """
    height = 38
    most = max(float(everyone.max(initial=0)), 1.0)
    return figure(
        title,
        height + 2,
        stretched(
            height,
            _steps(everyone / most, height, "area pool"),
            _steps(chosen / most, height, "area selected"),
        ),
        line(0, height, 100, height, "rail"),
        line(cutoff, 0, cutoff, height, "cutoff") if cutoff is not None else None,
    )


def histograms(
    shares: Mapping[str, Float[np.ndarray, " b"]], scale: Scale, title: str, *, last: str = ""
) -> Markup:
    """Return overlaid histograms, each by its own share per bin, with an x axis.

    Args:
        shares: colour class to share of its examples per bin.
        scale: the x axis.
        title: accessible name.
        last: what to write at the right end instead of a number.

    Returns:
        An SVG.
    """
    height = 150
    most = max((float(s.max(initial=0)) for s in shares.values()), default=0) or 1.0
    values, step = ticks(scale.low, scale.high)
    labels = [v for v in values if not (last and scale(v) > 70)]
    areas = [_steps(s / most, height, f"area {c}") for c, s in shares.items()]
    return figure(
        title,
        height + 20,
        stretched(height, *areas),
        line(0, height, 100, height, "rail"),
        *(text(scale(v), height + 15, tick(v, step), class_="tick") for v in labels),
        text(100, height + 15, last, class_="tick") if last else None,
        class_="fig histogram",
    )


def spectrum(shares: Float[np.ndarray, " _"], rank: int, title: str) -> Markup:
    """Return bars of the energy per direction, the used ones coloured, and their running sum."""
    height, n = 150, len(shares)
    slot = 100 / n
    bars = [
        tag(
            "rect",
            tag("title", f"direction {i + 1}: {100 * share:.1f} % of the energy"),
            x=_percent(slot * (i + 0.1)),
            y=height - max(height * float(share), 1),
            width=_percent(slot * 0.8),
            height=max(height * float(share), 1),
            class_="bar selected" if i < rank else "bar pool",
        )
        for i, share in enumerate(shares)
    ]
    held = np.cumsum(shares)
    points = [((i + 0.5) / n, float(h)) for i, h in enumerate(held)]
    edge = slot * rank
    labels, step = ticks(1, n, 6) if n > 1 else ([1.0], 1.0)
    whole = [v for v in labels if v == round(v)]
    return figure(
        title,
        height + 20,
        *(line(0, height * (1 - y), 100, height * (1 - y), "grid") for y in (0.5, 1.0)),
        *bars,
        stretched(height, _path(points, height, "curve held")),
        text(100, height / 2 - 4, "50 %", class_="tick halo"),
        text(100, -4, "100 %", class_="tick halo"),
        line(edge, 0, edge, height, "cutoff") if rank < n else None,
        line(0, height, 100, height, "rail"),
        *(
            text(
                slot * (v - 0.5), height + 15, tick(v, max(step, 1)), anchor="middle", class_="tick"
            )
            for v in whole
        ),
        class_="fig airy",
    )


def curves(
    lines: Mapping[str, tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]], title: str
) -> Markup:
    """Return lines over a common x axis, with the y axis written inside.

    Args:
        lines: colour class to (x, y); a y that is not finite interrupts the line.
        title: accessible name.

    Returns:
        An SVG.
    """
    height = 220
    xs = Scale(*_range([x for x, _ in lines.values()]))
    low, high = _range([y for _, y in lines.values()])
    air = (high - low) * 0.05
    ys = Scale(low - air, high + air)
    x_ticks, x_step = ticks(xs.low, xs.high, 6)
    y_ticks, y_step = ticks(ys.low, ys.high, 4)
    paths: list[Markup] = []
    for class_, (x, y) in lines.items():
        smooth = _running_mean(y)
        for series, thickness in ((y, "raw"), (smooth, "smooth")):
            if thickness == "raw" and series is smooth:
                continue
            points = [
                (xs(float(a)) / 100, ys(float(b)) / 100 if math.isfinite(b) else math.nan)
                for a, b in zip(x, series, strict=True)
            ]
            paths.append(_path(points, height, f"curve {class_} {thickness}"))
    heights = {v: height * (1 - ys(v) / 100) for v in y_ticks}
    return figure(
        title,
        height + 20,
        *(line(0, y, 100, y, "grid") for y in heights.values()),
        stretched(height, *paths),
        *(
            text(0, y - 4, tick(v, y_step), class_="tick halo")
            for v, y in heights.items()
            if y > 12
        ),
        line(0, height, 100, height, "rail"),
        *(text(xs(v), height + 15, tick(v, x_step), class_="tick") for v in x_ticks),
    )


def key(entries: Mapping[str, str]) -> Markup:
    """Return a legend in HTML: colour class to words."""
    items = [
        tag("span", tag("i", class_=f"swatch {class_}"), label, class_="entry")
        for class_, label in entries.items()
    ]
    return tag("p", join(items), class_="key")


def _percent(x: Number) -> str:
    return f"{coordinate(x)}%"


def _range(columns: Sequence[Float[np.ndarray, " _"]]) -> tuple[float, float]:
    values = np.concatenate([np.asarray(c, np.float64) for c in columns])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _running_mean(y: Float[np.ndarray, " _"]) -> Float[np.ndarray, " _"]:
    """Return a centred mean over a fifteenth of the line; short lines come back as they are."""
    half = len(y) // 30
    if half == 0:
        return y
    is_finite = np.isfinite(y)
    window = np.ones(2 * half + 1)
    total = np.convolve(np.where(is_finite, y, 0), window, "same")
    n = np.convolve(is_finite.astype(float), window, "same")
    mean = np.divide(total, n, out=np.full(len(y), np.nan), where=n > 0)
    return np.where(is_finite, mean, np.nan)


def _steps(heights: Float[np.ndarray, " b"], height: Number, class_: str) -> Markup:
    """Return a histogram as one closed outline; `heights` are shares of `height`."""
    step = _INNER / len(heights)
    parts = [f"M0 {coordinate(height)}"]
    for i, share in enumerate(heights):
        y = coordinate(height * (1 - float(share)))
        parts.append(f"L{coordinate(i * step)} {y}H{coordinate((i + 1) * step)}")
    return tag("path", d=f"{''.join(parts)}V{coordinate(height)}Z", class_=class_)


def _path(points: Sequence[tuple[float, float]], height: Number, class_: str) -> Markup:
    """Return a line through points in 0..1 (y upwards); NaN interrupts it."""
    parts: list[str] = []
    is_down = False
    for x, y in points:
        if math.isnan(y):
            is_down = False
            continue
        parts.append(
            f"{'L' if is_down else 'M'}{coordinate(_INNER * x)} {coordinate(height * (1 - y))}"
        )
        is_down = True
    return tag("path", d="".join(parts), class_=class_)
