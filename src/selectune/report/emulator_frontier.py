"""Several emulators of one model: what each gives away against how well it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selectune.files import write_file
from selectune.report import figures
from selectune.report.blocks import isolated, panel, section, table
from selectune.report.emulator_facts import EmulatorFacts
from selectune.report.markup import Child, Markup, coordinate, join, shortened, tag
from selectune.report.numbers import count, decimal, percent, tick, ticks
from selectune.report.page import document

NAME = "report.html"
_HEIGHT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One emulator.

    Args:
        label: what it is called.
        loss: its own, in nats per token; the higher, the less it gives away.
        utility: what it is good for; the higher, the better.
    """

    label: str
    loss: float
    utility: float


def frontier(points: Sequence[FrontierPoint], model_loss: float, utility: str) -> Markup:
    """Return a scatter of emulators; those that no other beats in both are coloured.

    Args:
        points: numbered in their order.
        model_loss: of the model by itself, in nats per token on the same probe.
        utility: what `FrontierPoint.utility` is.
    """
    best = {place for place, one in enumerate(points) if not any(_beats(o, one) for o in points)}
    xs = figures.Scale.around([model_loss, *(point.loss for point in points)])
    ys = figures.Scale.around([point.utility for point in points], pad=0.1)
    levels, step = ticks(ys.low, ys.high)
    heights = {value: _HEIGHT * (1 - ys(value) / 100) for value in levels}
    names = ", ".join(points[place].label for place in sorted(best))
    marks = [
        _mark(place, point, (xs(point.loss), _HEIGHT * (1 - ys(point.utility) / 100)), best)
        for place, point in enumerate(points)
    ]
    drawn = figures.figure(
        f"{utility} by the emulator's own loss; not beaten in both: {names}",
        _HEIGHT,
        *(figures.line(0, y, 100, y, "grid") for y in heights.values()),
        *(
            figures.text(0, y - 4, tick(value, step), class_="tick halo")
            for value, y in heights.items()
            if y > 14
        ),
        figures.line(xs(model_loss), 0, xs(model_loss), _HEIGHT, "cutoff"),
        figures.text(xs(model_loss), -6, "the model", class_="tick"),
        figures.line(0, _HEIGHT, 100, _HEIGHT, "rail"),
        *marks,
        class_="fig airy",
    )
    sense = "loss of the emulator by itself, nats per token; gives less away →"
    return panel(utility, drawn, figures.axis(xs, high=sense))


def write_frontier(folder: Path, emulators: Mapping[str, EmulatorFacts]) -> Path:
    """Write one page on several emulators of one model into a folder.

    Args:
        folder: a place that cannot be written is a StorageError.
        emulators: by name, judged on one probe.

    Returns:
        The path of the page.
    """
    path = folder / NAME
    write_file(path, render(emulators).encode())
    return path


def render(emulators: Mapping[str, EmulatorFacts]) -> str:
    """Return the page; equal facts give equal text."""
    points = [
        FrontierPoint(
            label=name,
            loss=facts.quality["losses_nats"]["emulator"],
            utility=facts.quality["gradients"]["cosine"],
        )
        for name, facts in emulators.items()
    ]
    first = next(iter(emulators.values()))
    title = f"{count(len(emulators), 'emulator')} of one model"
    return document(
        title,
        ("style", "emulator"),
        tag("p", "selectune emulator", class_="kicker"),
        tag("h1", title),
        tag("p", "This page stays with the model's owner.", class_="gap"),
        section(
            "frontier",
            "What is given away, and how well it trains",
            "To the right an emulator is worse by itself, so that less is given away; further up, "
            "the gradients of the layers that train are more like the model's. Coloured: no other "
            "emulator is as good in both and better in one.",
            frontier(points, first.quality["losses_nats"]["original"], "Cosine of the gradients"),
            table(
                ["Emulator", "Compressor", "Of the middle", "Loss by itself", "Cosine",
                 "Relative error"],
                [_row(place, *pair) for place, pair in enumerate(emulators.items())],
                class_="plain",
            ),
        ),
    )  # fmt: skip


def _row(place: int, name: str, facts: EmulatorFacts) -> list[Child]:
    quality = facts.quality
    options = ", ".join(f"{key} {value}" for key, value in facts.about["options"].items())
    return [
        join([f"{place + 1} ", isolated(shortened(name, 40))]),
        join([facts.about["method"], tag("span", options, class_="unit") if options else None]),
        percent(quality["ratios"]["middle"]),
        decimal(quality["losses_nats"]["emulator"]),
        f"{quality['gradients']['cosine']:.3f}".replace("-", "−"),
        f"{quality['gradients']['relative_error']:.3f}",
    ]


def _beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    a, b = (one.loss, one.utility), (other.loss, other.utility)
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _mark(place: int, point: FrontierPoint, at: tuple[float, float], best: set[int]) -> Markup:
    x, y = at
    words = f"{point.label}: loss {decimal(point.loss)}, {decimal(point.utility)}"
    return tag(
        "g",
        tag("title", words),
        tag("circle", cx=f"{coordinate(x)}%", cy=y, r=6,
            class_=f"dot {'selected' if place in best else 'base'}"),
        figures.text(x, y - 11, f"{place + 1}", anchor="middle", class_="halo"),
    )  # fmt: skip
