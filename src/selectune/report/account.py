"""What the run did and cost: loss curves, time and memory, warnings, how to repeat it."""

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from selectune.report import figures
from selectune.report.blocks import bullets, folded, isolated, panel, section, table
from selectune.report.contents import Phase, ReportData
from selectune.report.markup import Child, Markup, join, tag
from selectune.report.numbers import count, decimal, duration, percent, size
from selectune.report.outcome import arms_of

_MOST_POINTS = 600  # more than a screen can show; keeps a long run's page small


def training(data: ReportData) -> Markup | None:
    """Return the loss curves of every arm."""
    arms = [arm for arm in arms_of(data) if len(data.loss_curves.get(arm, ())) > 0]
    if not arms:
        return None
    lines = {figures.arm_class(a, arms): _thinned(data.loss_curves[a]) for a in arms}
    ends = ", ".join(f"{a} {decimal(_last_loss(data.loss_curves[a]))}" for a in arms)
    return section(
        "training",
        "Training loss",
        "Loss on the arm's own training examples, by step; the bold line is a running mean. A "
        "lower curve may mean easier examples: compare arms by the evaluation, not here.",
        figures.key({figures.arm_class(a, arms): a for a in arms}),
        panel(
            join(["Nats per token", tag("span", f" · end: {ends}", class_="soft")]),
            figures.curves(lines, f"training loss by step; at the end {ends}"),
        ),
    )


def cost(data: ReportData) -> Markup | None:
    """Return seconds, peak memory and compute per phase."""
    if not data.phases:
        return None
    seconds = sum(p.seconds for p in data.phases)
    most = max(p.seconds for p in data.phases) or 1.0
    rows: list[list[Child]] = [
        [
            join([phase.name, tag("span", phase.note, class_="unit") if phase.note else None]),
            join([duration(phase.seconds), _bar(phase, most)]),
            size(phase.peak_bytes) if phase.peak_bytes is not None else "–",
            decimal(phase.pool_epochs) if phase.pool_epochs is not None else "–",
        ]
        for phase in data.phases
    ]
    rows.append([tag("b", "Total"), tag("b", duration(seconds)), *map(_bold, _totals(data.phases))])
    return section(
        "cost",
        "Cost",
        "One pool epoch is the work of one forward and backward pass over every pool example: the "
        "price of training once on everything.",
        table(["Phase", "Time", "Peak memory", "Pool epochs"], rows, class_="plain cost"),
    )


def total_cost(data: ReportData) -> str:
    """Return time, memory and compute of the run in one line."""
    peak, epochs = _totals(data.phases)
    parts = [duration(sum(p.seconds for p in data.phases))]
    parts += [f"peak {peak}"] if peak != "–" else []
    parts += [f"{epochs} pool epochs"] if epochs != "–" else []
    return ", ".join(parts)


def warnings(data: ReportData) -> Markup:
    """Return the warnings, or that there were none."""
    if not data.warnings:
        return section("warnings", "Warnings", "None.")
    return section(
        "warnings",
        "Warnings",
        f"{count(len(data.warnings), 'warning')} in this run.",
        bullets((tag("span", w, dir="auto") for w in data.warnings), class_="warnings"),
    )


def replay(data: ReportData) -> Markup:
    """Return the command and the recipe that repeat the run, and what it ran on."""
    record = json.dumps(data.run, indent=2, ensure_ascii=False, default=str)
    return section(
        "replay",
        "Run it again",
        "The recipe below, saved as config.yaml beside this page, repeats this run: same data, "
        "seed, machine and versions give the same selection.",
        tag("pre", tag("code", data.replay_command)),
        folded("config.yaml", tag("pre", tag("code", data.recipe_yaml), tabindex="0")),
        folded("run.json: versions, seeds, fingerprints, hardware",
               tag("pre", tag("code", record), tabindex="0")) if data.run else None,
    )  # fmt: skip


def at_a_glance(data: ReportData) -> Markup:
    """Return the run in a handful of facts."""
    pairs: list[tuple[Child, Child]] = []
    if n_pool := len(data.pool.ids):
        n = len(data.selected_ids)
        pairs.append(("Chosen", f"{n:,} of {n_pool:,} examples ({percent(n / n_pool)})"))
    if data.method:
        pairs.append(("Ranked by", data.method))
    pairs += [(label, isolated(text)) for label, text in data.facts.items()]
    if data.phases:
        pairs.append(("Cost", total_cost(data)))
    n_warnings = len(data.warnings)
    pairs.append(
        ("Warnings", tag("a", count(n_warnings), href="#warnings") if n_warnings else "none")
    )
    return tag("dl", *(tag("div", tag("dt", a), tag("dd", b)) for a, b in pairs), class_="glance")


def _totals(phases: Sequence[Phase]) -> tuple[str, str]:
    peaks = [p.peak_bytes for p in phases if p.peak_bytes is not None]
    epochs = [p.pool_epochs for p in phases if p.pool_epochs is not None]
    return size(max(peaks)) if peaks else "–", decimal(sum(epochs)) if epochs else "–"


def _bold(text: str) -> Markup:
    return tag("b", text)


def _bar(phase: Phase, most: float) -> Markup:
    width = f"{100 * phase.seconds / most:.2f}%"
    return figures.figure(
        f"{phase.name}: {duration(phase.seconds)}",
        8,
        tag("rect", y=1, height=6, rx=1, width=width, class_="bar pool"),
        class_="fig thin",
    )


def _last_loss(curve: Sequence[tuple[int, float]]) -> float:
    """Return the mean over the last tenth: one step alone is noise."""
    tail = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
    return float(np.mean(tail))


def _thinned(
    curve: Sequence[tuple[int, float]],
) -> tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]:
    """Return steps and losses; long curves as means of neighbouring steps."""
    steps = np.asarray([s for s, _ in curve], np.float64)
    losses = np.asarray([loss for _, loss in curve], np.float64)
    if len(steps) <= _MOST_POINTS:
        return steps, losses
    starts = np.linspace(0, len(steps), _MOST_POINTS, endpoint=False).astype(int)
    n = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / n, np.add.reduceat(losses, starts) / n
