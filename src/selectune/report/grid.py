"""The page of a comparison: which methods beat random, on which tasks, at what price."""

import math
from collections.abc import Sequence
from pathlib import Path

from selectune.evaluation import Interval
from selectune.files import write_file
from selectune.offsite.table import ALL_TASKS as OFFSITE_ALL
from selectune.offsite.table import OffsiteTable
from selectune.report import figures, weight_transfer
from selectune.report.blocks import drawn_rows, folded, isolated, listed, panel, section, table
from selectune.report.grid_facts import (
    ALL_TASKS,
    BASE,
    RANDOM,
    Ends,
    GridCell,
    GridFacts,
    won_lost,
)
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.numbers import count, decimal, duration, metric, percent
from selectune.report.page import document
from selectune.report.scatter import Across, Point, scatter

NAME = "report.html"
_MOST_NAMED = 5  # methods in a headline
_LOSS = metric("answer_loss")


def write_grid_report(folder: Path, facts: GridFacts) -> Path:
    """Write the page into a comparison's folder, and return its path.

    Args:
        folder: a place that cannot be written is a StorageError.
        facts: what to show.
    """
    path = folder / NAME
    write_file(path, render(facts).encode())
    return path


def render(facts: GridFacts) -> str:
    """Return the page; equal facts give equal text."""
    return document(
        facts.title,
        ("style", "layers", "weights", "grid"),
        _verdict(facts),
        _against_random(facts),
        _levels(facts),
        _price(facts),
        _elsewhere(facts),
        _texts(facts),
        _offsite(facts),
        _settings(facts),
        _replay(facts),
    )


def _few(methods: Sequence[str]) -> str:
    """Return the names of some methods as a headline holds them; the table names them all."""
    names = [shortened(m, 40) for m in methods]
    if len(names) > _MOST_NAMED:
        names = [*names[: _MOST_NAMED - 1], f"{len(names) - _MOST_NAMED + 1} others"]
    return listed(names)


def _verdict(facts: GridFacts) -> Markup:
    found = {m: facts.at(facts.main_task, m).tone for m in facts.rivals}
    # The best first; the worst first too, of what is worse.
    far = {m: abs((facts.at(facts.main_task, m).against_random or (0.0,))[0]) for m in found}
    better = sorted((m for m in found if found[m] == "good"), key=far.__getitem__, reverse=True)
    where = "all tasks together" if facts.main_task == ALL_TASKS else facts.main_task
    if not facts.rivals:
        tone, headline = "even", "Random is all there is."
    elif better:
        tone = "good"
        headline = f"Better than random: {_few(better)}."
    else:
        tone, headline = "even", "No method is better than random."
    worse = sorted((m for m in found if found[m] == "bad"), key=far.__getitem__, reverse=True)
    said = [
        f"By answer loss on {where}, {count(len(facts.seeds), 'seed')}, where the 95 % interval "
        "leaves no doubt.",
        f"Worse than random: {_few(worse)}." if worse else "",
        "One seed says nothing about the noise of training." if len(facts.seeds) == 1 else "",
    ]
    return tag(
        "header",
        tag("p", "selectune compare", class_="kicker"),
        tag("h1", facts.title, dir="auto"),
        tag(
            "div",
            tag("p", headline, class_="headline", dir="auto"),
            tag("p", " ".join(part for part in said if part), class_="numbers"),
            class_=f"verdict {tone}",
        ),
    )


def _against_random(facts: GridFacts) -> Markup | None:
    """Return the map: a row per method, a column per task."""
    if not facts.rivals:
        return None
    cells = [facts.at(task, m) for m in facts.rivals for task in facts.tasks]
    ends = [-x for cell in cells for x in (*(cell.against_random or ()), *_gaps(facts, cell))]
    scale = figures.Scale.around([0.0, *ends])
    rows: list[list[Child]] = []
    for method in facts.rivals:
        mine = [facts.at(task, method) for task in facts.tasks]
        alone = [cell for cell in mine if cell.task != ALL_TASKS]
        won, lost = won_lost(cell.against_random for cell in alone)
        score = join([tag("b", f"{won} : {lost}"), tag("span", f"of {len(alone)}", class_="unit")])
        rows.append([_name(method), *(_cell(facts, cell, scale) for cell in mine), score])
    headings: list[Child] = ["Method", *(_task(task) for task in facts.tasks)]
    headings.append(join(["Won : lost", tag("span", "tasks", class_="unit")]))
    lede = (
        "Answer loss less that of random, nats per token of the right answer, held-out: a minus "
        "sign is a gain. Brackets and bars hold 95 % intervals over questions and seeds, small "
        "dots are single seeds; a coloured cell leaves no doubt, and right is better in every "
        "drawing."
    )
    return section("against", "Against random", lede, table(headings, rows, class_="grid heat"))


def _gaps(facts: GridFacts, cell: GridCell) -> list[float]:
    """Return the difference from random, seed by seed."""
    random = facts.at(cell.task, RANDOM)
    return [a - b for a, b in zip(cell.losses, random.losses, strict=True)]


def _cell(facts: GridFacts, cell: GridCell, scale: figures.Scale) -> Markup:
    assert cell.against_random is not None
    value, low, high = cell.against_random
    words, ends = _signed(value), f"[{_signed(low)}, {_signed(high)}]"
    title = f"{cell.method} on {cell.task}: {words} {ends}"
    seeds = [
        tag("circle", cx=f"{scale(-gap):.2f}%", cy=5, r=2.5, class_=f"dot {cell.tone} one")
        for gap in _gaps(facts, cell)
    ]
    bar = figures.whisker(scale, -value, (-high, -low), cell.tone, title, zero=0)
    dots = figures.figure("seed by seed", 10, *seeds)
    accuracy = ""
    if cell.accuracy_against_random is not None:
        gain = 100 * cell.accuracy_against_random[0]
        accuracy = f"accuracy {_signed(gain, 1)} points"
    return tag(
        "div",
        tag("b", words),
        tag("span", ends, class_="bracket"),
        dots,
        bar,
        tag("span", accuracy, class_="unit") if accuracy else None,
        class_=f"told {cell.tone}",
    )


def _levels(facts: GridFacts) -> Markup:
    panels = [_level_panel(facts, task) for task in facts.tasks]
    lede = (
        "Held-out answer loss, nats per token; left is better. The large dot is the mean over "
        "seeds, the small ones the seeds. Accuracy, length-normalised, stands beside."
    )
    return section("levels", "What each reached", lede, tag("div", *panels, class_="pair"))


def _level_panel(facts: GridFacts, task: str) -> Markup:
    cells = [facts.at(task, m) for m in (BASE, *facts.methods)]
    # The untouched base may be so far off that all the others would be one dot.
    scale = figures.Scale.around([loss for cell in cells[1:] for loss in cell.losses], pad=0.3)
    rows: list[list[Child]] = []
    for cell in cells:
        colour = cell.method if cell.method in (BASE, RANDOM) else "selected"
        seeds = [
            tag("circle", cx=f"{scale(loss):.2f}%", cy=13, r=2.5, class_=f"dot {colour} one")
            for loss in cell.losses
        ]
        accuracy = "" if cell.accuracy is None else percent(cell.accuracy)
        title = f"{cell.method} on {task}: {_LOSS.level(cell.loss)}"
        is_far = cell.loss > scale.high
        drawn = figures.figure(
            title,
            26,
            figures.line(0, 13, 100, 13, "rail"),
            figures.text(100, 9, "off the scale →", class_="tick") if is_far else None,
            *(seeds if len(seeds) > 1 else ()),
            None
            if is_far
            else tag("circle", cx=f"{scale(cell.loss):.2f}%", cy=13, r=5, class_=f"dot {colour}"),
        )
        words = join([tag("b", f"{cell.loss:.3f}"), tag("span", accuracy, class_="bracket")])
        rows.append([_name(cell.method), drawn, words])
    return panel(_task(task), drawn_rows(rows, figures.axis(scale, low="← better")))


def _price(facts: GridFacts) -> Markup | None:
    cells = [facts.at(facts.main_task, m) for m in facts.methods]
    priced = [cell for cell in cells if cell.seconds]
    if not priced:
        return None
    numbers = {cell.method: place + 1 for place, cell in enumerate(priced)}
    random = facts.at(facts.main_task, RANDOM).seconds
    points = [
        Point(number=numbers[cell.method], label=cell.method, x=cell.seconds or 0, y=-cell.loss)
        for cell in priced
    ]
    mark = (random, "random") if random else None
    across = Across("seconds for one model", "seconds for one model →", wish=-1, mark=mark)
    rows: list[list[Child]] = [
        [
            join([f"{numbers[cell.method]} ", _name(cell.method)]),
            duration(cell.seconds or 0),
            f"{(cell.seconds or 0) / random:.2f}" if random else "–",
            f"{cell.loss:.3f}",
        ]
        for cell in priced
    ]
    return section(
        "price",
        "Quality and price",
        "To the left a model costs less: the warm-up, passes and scores that a method needs, and "
        "its own training, as if nothing were shared. Further up it answers better. Coloured: no "
        "other method is as good in both and better in one.",
        scatter(points, "Answer loss, upside down", across),
        table(["Method", "One model", "By random", "Answer loss"], rows, class_="plain"),
    )


def _elsewhere(facts: GridFacts) -> Markup | None:
    drawn = weight_transfer.transfer(facts.transfers)
    return drawn and section("transfer", "Elsewhere", "", drawn)


def _texts(facts: GridFacts) -> Markup | None:
    if not facts.texts:
        return None
    rows: list[list[Child]] = [
        [
            _name(one.method),
            f"{one.nats_per_token:.3f}",
            f"{math.exp(one.nats_per_token):.1f}",
            _interval(one.over_base),
            _interval(one.against_random),
        ]
        for one in facts.texts
    ]
    return section(
        "text",
        "Plain text",
        "Loss on text that has nothing to do with the tasks, over all models of a method: what it "
        "gains is forgotten. Intervals are over texts.",
        table(["Method", "Nats per token", "Perplexity", "Less the base", "Less random"], rows,
              class_="plain"),
    )  # fmt: skip


def _offsite(facts: GridFacts) -> Markup | None:
    if not facts.offsite:
        return None
    return section(
        "offsite",
        "On emulators",
        "Rows that a data owner would tune: the model untouched (ZS), tuned in the open (FT; only "
        "the layers that train offsite, FT-adapter), the emulator untouched and tuned (EFT), and "
        "the model with what was tuned on the emulator (PI), which the rest of this page is about. "
        "A bad emulator buys Δ cheaply: read it beside ZS and FT.",
        *(_offsite_table(one) for one in facts.offsite),
    )


def _offsite_table(found: OffsiteTable) -> Markup:
    is_loss = found.metric == "answer_loss"
    digits = 3 if is_loss else 1

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    def interval(one: Interval | None) -> Child:
        if one is None:
            return tag("span", "–", class_="soft")
        ends = ", ".join(_signed(x, digits) for x in (one.low, one.high))
        return f"{_signed(one.mean_difference, digits)} [{ends}]"

    rows: list[list[Child]] = [
        [
            _name(row.method),
            isolated("all tasks" if row.task == OFFSITE_ALL else shortened(row.task, 40)),
            *map(number, (row.zs, row.ft, row.ft_adapter, row.emulator_zs, row.eft, row.pi)),
            *map(interval, (row.delta, row.gain, row.lost)),
        ]
        for row in found.rows
    ]
    unit = "nats per token" if is_loss else "% right"
    headings: list[Child] = ["Method", "Task", join(["ZS", tag("span", unit, class_="unit")])]
    headings += ["FT", "FT-adapter", "Emulator ZS", "EFT", "PI"]
    headings += ["Δ = PI − EFT", "PI − ZS", "PI − FT-adapter"]
    return table(headings, rows, class_="plain")


def _settings(facts: GridFacts) -> Markup | None:
    tasks = [task for task in facts.tasks if task != ALL_TASKS]
    rows: list[list[Child]] = []
    for method in facts.methods:
        cells = [facts.at(task, method) for task in tasks]
        rows.append([_name(method), *(_setting(cell) for cell in cells)])
    tried: list[list[Child]] = [
        [
            _name(method), isolated(shortened(task, 40)), f"{rate:g}", str(epochs),
            "training failed" if loss is None else decimal(loss),
        ]
        for method, task, rate, epochs, loss in facts.tried
    ]  # fmt: skip
    lede = (
        "Learning rate and epochs. Those that were chosen were chosen for every method alike, by "
        "the answer loss on targets held aside, on the first seed; held-out examples were not read."
        if tried
        else "Learning rate and epochs, as the recipe gives them."
    )
    return section(
        "settings",
        "Settings",
        lede,
        table(["Method", *(_task(task) for task in tasks)], rows, class_="plain"),
        folded(
            "What was tried",
            table(["Method", "Task", "Learning rate", "Epochs", "Loss on those held aside"], tried,
                  class_="plain"),
        )
        if tried
        else None,
        *(tag("p", note, class_="note", dir="auto") for note in facts.notes),
    )  # fmt: skip


def _setting(cell: GridCell) -> str:
    if cell.learning_rate is None:
        return "–"
    return f"{cell.learning_rate:g}" + (f", {count(cell.epochs, 'epoch')}" if cell.epochs else "")


def _replay(facts: GridFacts) -> Markup | None:
    if not facts.cells_folder:
        return None
    return section(
        "replay",
        "One cell again",
        "Each cell has a recipe of its own, with the setting that was chosen for it.",
        tag("pre", tag("code", f"selectune compare {facts.cells_folder}/CELL/config.yaml")),
    )


def _name(method: str) -> Markup:
    return isolated(shortened(method, 40))


def _task(task: str) -> Markup:
    return isolated("all tasks" if task == ALL_TASKS else shortened(task, 40))


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _interval(found: Ends | None) -> Child:
    if found is None:
        return tag("span", "–", class_="soft")
    value, low, high = found
    return f"{_signed(value)} [{_signed(low)}, {_signed(high)}]"
