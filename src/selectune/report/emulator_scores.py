"""Why these were kept: singular values and scores of every matrix, scores of every channel."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from selectune.report import figures
from selectune.report.blocks import folded, section
from selectune.report.emulator_facts import Cut, EmulatorFacts
from selectune.report.emulator_map import labels_of
from selectune.report.markup import Markup, coordinate, tag
from selectune.report.numbers import percent

_HEIGHT = 76  # pixels of one drawing
_INNER = 1000
_MANY, _FEW = 160, 64  # dots in a drawing, on the page and in its folded part
_SPREAD = 20  # largest over median: from here on a linear axis shows but a few
_LOWEST = 0.01  # share of values that may lie below the end of a logarithmic axis
_DEEP = 1e-5  # of the largest: deeper no logarithmic axis goes
_HEAD = 14  # pixels of words above a drawing


@dataclass(frozen=True, slots=True)
class _Axis:
    """A y axis, linear or logarithmic.

    Args:
        low: at the bottom.
        high: at the top.
        is_log: whether equal steps are equal factors.
    """

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> "_Axis":
        """Return an axis on which most values can be told apart."""
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        middle = float(np.median(values)) if len(values) else 0.0
        if low >= 0 and 0 < middle * _SPREAD < high:
            least = float(np.quantile(values, _LOWEST))
            return cls(max(least, _DEEP * high), high, is_log=True)
        return cls(low, high if high > low else low + 1, is_log=False)

    def __call__(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return places from 0 at the bottom to 1 at the top."""
        if self.is_log:
            share = np.log(np.maximum(values, self.low) / self.low)
            return share / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    @property
    def words(self) -> str:
        """Its ends, and whether it is logarithmic."""
        ends = f"{self.low:.2g} to {self.high:.2g}".replace("-", "−")
        return ends + (", log" if self.is_log else "")


def scores(facts: EmulatorFacts) -> Markup | None:
    """Return the part of the page on scores; None where whole layers were chosen."""
    layers = [j for j in facts.middle if facts.cuts.get(j)]
    if not layers:
        return None
    shown = list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))
    others = [j for j in layers if j not in shown]
    return section(
        "scores",
        "Why these were kept",
        "Each dot is one singular component of a matrix, the largest on the left: above its "
        "singular value, below its score. Where the two tell different stories, blue dots stand "
        "among grey ones. Channels are sorted by score and cut off.",
        figures.key({"selected": "kept", "pool": "left out", **_protected(facts)}),
        *(_layer(facts, j, _MANY) for j in shown),
        folded(f"The other {len(others)} layers", *(_layer(facts, j, _FEW) for j in others))
        if others
        else None,
        tag(
            "p",
            f"At most {_MANY} dots are drawn of a matrix, evenly spaced. Beyond the first so "
            "many: kept although singular values alone would have left them out. Energy: of the "
            "squared singular values. Logarithmic axes end where 1 % of the values are lower; "
            "these lie on their edge.",
            class_="note",
        ),
    )


def _protected(facts: EmulatorFacts) -> dict[str, str]:
    if not any(cut.n_protected for cuts in facts.cuts.values() for cut in cuts):
        return {}
    return {"line selected": "kept whatever the score"}


def _layer(facts: EmulatorFacts, j: int, n_dots: int) -> Markup:
    short = labels_of(facts.names)
    panels = [_panel(cut, j, short[cut.name], n_dots) for cut in facts.cuts[j]]
    return tag("div", tag("h3", f"Layer {j}"), tag("div", *panels, class_="multiples"))


def _panel(cut: Cut, j: int, label: str, n_dots: int) -> Markup:
    what = f"layer {j}, {label}: {cut.words}"
    drawings = (
        [_channels(cut, what, n_dots)]
        if cut.spectrum is None
        else [
            _dots(cut.spectrum, cut, "singular value", what, n_dots),
            _dots(cut.scores, cut, "score", what, n_dots, is_last=True),
        ]
    )
    return tag(
        "figure",
        tag("figcaption", label, tag("span", f" {cut.words}", class_="soft")),
        *drawings,
        tag("p", _remark(cut), class_="note"),
    )


def _remark(cut: Cut) -> str:
    if cut.is_whole:
        return "left as it is"
    if cut.spectrum is None:
        total = float(cut.scores.sum())
        held = float(cut.scores[cut.is_kept].sum())
        # Scores below zero make no shares.
        is_share = total > 0 and float(cut.scores.min(initial=0)) >= 0
        return f"{percent(held / total)} of all scores" if is_share else "the highest scores"
    energy = cut.spectrum**2
    held = float(energy[cut.is_kept].sum() / energy.sum()) if energy.any() else 0.0
    beyond = int(cut.is_kept[cut.n_kept :].sum())
    place = f"{beyond:,} beyond the first {cut.n_kept:,}" if beyond else "the largest"
    return f"{place} · {percent(held)} of the energy"


def _dots(
    values: Float[np.ndarray, " n"], cut: Cut, label: str, what: str, n_dots: int,
    *, is_last: bool = False,
) -> Markup:  # fmt: skip
    axis = _Axis.of(values)
    places, bottom = axis(values), _HEAD + _HEIGHT
    strokes: tuple[list[str], list[str]] = ([], [])  # left out, kept
    for i in _spaced(cut.n, n_dots).tolist():
        x, y = _INNER * (i + 0.5) / cut.n, _HEIGHT * (1 - float(places[i]))
        strokes[int(cut.is_kept[i])].append(f"M{coordinate(x)} {coordinate(y)}h0")
    paths = [
        tag("path", d="".join(parts), class_=class_)
        for parts, class_ in zip(strokes, ("dots pool", "dots selected"), strict=True)
    ]
    edge = 100 * cut.n_protected / cut.n
    return figures.figure(
        f"{what}; {label} of each component, {axis.words}",
        bottom + (18 if is_last else 6),
        figures.text(0, 9, f"{label} {axis.words}", class_="tick"),
        figures.line(0, bottom, 100, bottom, "rail"),
        figures.line(0, bottom, edge, bottom, "span selected") if edge else None,
        _under(axis, _HEIGHT, *paths),
        figures.text(0, bottom + 14, "largest", class_="tick") if is_last else None,
        figures.text(100, bottom + 14, "smallest", class_="tick") if is_last else None,
        class_="fig multiple",
    )


def _channels(cut: Cut, what: str, n_dots: int) -> Markup:
    """Return scores from the highest to the lowest, and where they were cut off."""
    # Of equal scores, kept ones first: the cut then falls where it fell.
    order = np.lexsort((~cut.is_kept, -cut.scores))
    axis = _Axis.of(cut.scores)
    places = axis(cut.scores[order])
    height = 2 * _HEIGHT + _HEAD + 14
    bottom = _HEAD + height
    edge = 100 * cut.n_kept / cut.n
    parts = {"curve selected": (0, cut.n_kept), "curve pool": (cut.n_kept, cut.n)}
    paths = [
        tag("path", d=_through(places, start, end, n_dots, height), class_=class_)
        for class_, (start, end) in parts.items()
        if end > start
    ]
    return figures.figure(
        f"{what} channels; scores from the highest to the lowest, {axis.words}",
        bottom + 18,
        figures.text(0, 9, f"score {axis.words}", class_="tick"),
        figures.line(0, bottom, 100, bottom, "rail"),
        _under(axis, height, *paths),
        figures.line(edge, _HEAD, edge, bottom, "cutoff") if edge < 100 else None,
        figures.text(0, bottom + 14, "highest", class_="tick"),
        figures.text(100, bottom + 14, "lowest", class_="tick"),
        class_="fig multiple",
    )


def _under(axis: _Axis, height: int, *paths: Markup) -> Markup:
    """Return a drawing below its words, with a line at zero where that is not the bottom."""
    zero = None
    if not axis.is_log and axis.low < 0:
        y = height * (1 + axis.low / (axis.high - axis.low))
        zero = figures.line(0, y, 100, y, "grid")
    return tag("svg", zero, figures.stretched(height, *paths), y=_HEAD, width="100%", height=height)


def _spaced(n: int, most: int) -> Int[np.ndarray, " k"]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def _through(places: Float[np.ndarray, " n"], start: int, end: int, most: int, height: int) -> str:
    """Return a line through the places from `start` to before `end`."""
    n = len(places)
    points = [
        f"{coordinate(_INNER * (i + 0.5) / n)} {coordinate(height * (1 - float(places[i])))}"
        for i in (start + _spaced(end - start, most)).tolist()
    ]
    return "M" + "L".join(points)
