"""Several emulators of one model: what each gives away against how well it trains."""

from collections.abc import Mapping
from pathlib import Path

from selectune.errors import ConfigError
from selectune.evaluation import Interval
from selectune.files import write_file
from selectune.offsite.table import OffsiteRow, OffsiteTable
from selectune.report.blocks import isolated, listed, section, table
from selectune.report.emulator_facts import EmulatorFacts
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.numbers import count, decimal, percent
from selectune.report.page import document
from selectune.report.scatter import Across, Point, scatter
from selectune.tables import signed

NAME = "report.html"


def write_frontier(
    folder: Path, emulators: Mapping[str, EmulatorFacts], won: OffsiteTable | None = None
) -> Path:
    """Write one page on several emulators of one model into a folder.

    Args:
        folder: a place that cannot be written is a StorageError.
        emulators: by name, judged on one probe.
        won: what tuning on them won, by the same names; None where nobody has measured it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: no row of the table is called as an emulator is.
    """
    path = folder / NAME
    write_file(path, render(emulators, won).encode())
    return path


def render(emulators: Mapping[str, EmulatorFacts], won: OffsiteTable | None = None) -> str:
    """Return the page; equal facts give equal text."""
    numbers = {name: place + 1 for place, name in enumerate(emulators)}
    losses = {name: facts.quality["losses_nats"]["emulator"] for name, facts in emulators.items()}
    points = [
        Point(
            number=numbers[name],
            label=name,
            x=losses[name],
            y=facts.quality["gradients"]["cosine"],
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
            scatter(points, "Cosine of the gradients", _by_loss(first)),
            table(
                ["Emulator", "Compressor", "Of the middle", "Loss by itself", "Cosine",
                 "Relative error"],
                [_row(numbers[name], name, facts) for name, facts in emulators.items()],
                class_="plain",
            ),
        ),
        None
        if won is None
        else _won(won, numbers, losses, _by_loss(first)),
    )  # fmt: skip


def _by_loss(facts: EmulatorFacts) -> Across:
    return Across(
        "its own loss",
        "loss of the emulator by itself, nats per token; gives less away →",
        mark=(facts.quality["losses_nats"]["original"], "the model"),
    )


def _won(
    won: OffsiteTable,
    numbers: Mapping[str, int],
    losses: Mapping[str, float],
    across: Across,
) -> Markup:
    """Return what tuning on the emulators won for the model, over all tasks together."""
    is_loss = won.metric == "answer_loss"
    task = won.rows[0].task  # all of them, where there are several
    rows = [row for row in won.rows if row.task == task and row.method in numbers]
    if not rows:
        raise ConfigError(
            "the table names no emulator of this folder",
            where="won",
            why=f"it has {listed(sorted({row.method for row in won.rows}))}, the folder "
            f"{listed(list(numbers))}",
            do="name the table's rows as the emulators' folders are called",
        )
    points = [
        Point(
            number=numbers[row.method],
            label=row.method,
            x=losses[row.method],
            y=-row.gain.mean_difference if is_loss else row.gain.mean_difference,
        )
        for row in rows
    ]
    unit = "nats per token of the answer, lower is better" if is_loss else "% right"
    utility = "Loss that the plugged model lost" if is_loss else "Points that the plugged model won"
    seeds = count(rows[0].n_seeds, "seed")
    return section(
        "won",
        "What tuning on them won for the model",
        f"Answers to held-out questions, {seeds}; brackets hold 95 % intervals over questions and "
        "seeds. A bad emulator buys Δ cheaply: read it beside ZS and what tuning in the open "
        "reaches.",
        scatter(points, utility, across),
        table(
            ["Emulator", join(["ZS", tag("span", unit, class_="unit")]), "FT", "FT of the adapter",
             "Emulator ZS", "EFT", "PI", "Δ = PI − EFT", "PI − ZS"],
            [_outcome(numbers[row.method], row, 3 if is_loss else 1) for row in rows],
            class_="plain",
        ),
    )  # fmt: skip


def _outcome(number_of: int, row: OffsiteRow, digits: int) -> list[Child]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    def interval(found: Interval) -> str:
        told = signed(found.mean_difference, found.low, found.high, digits)
        return told.replace("-", "−")

    values = (row.zs, row.ft, row.ft_adapter, row.emulator_zs, row.eft, row.pi)
    return [
        _named(number_of, row.method),
        *map(number, values),
        interval(row.delta),
        interval(row.gain),
    ]


def _named(number: int, name: str) -> Markup:
    return join([f"{number} ", isolated(shortened(name, 60))])


def _row(number: int, name: str, facts: EmulatorFacts) -> list[Child]:
    quality = facts.quality
    options = ", ".join(f"{key} {value}" for key, value in facts.about["options"].items())
    return [
        _named(number, name),
        join([facts.about["method"], tag("span", options, class_="unit") if options else None]),
        percent(quality["ratios"]["middle"]),
        decimal(quality["losses_nats"]["emulator"]),
        f"{quality['gradients']['cosine']:.3f}".replace("-", "−"),
        f"{quality['gradients']['relative_error']:.3f}",
    ]
