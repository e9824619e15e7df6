"""What tuning on one task did to the others: transfer, forgetting, collapse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from selectune.report import figures
from selectune.report.blocks import folded, isolated, listed, table
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.weight_facts import TransferFacts


@dataclass(frozen=True, slots=True)
class _Column:
    """A metric: its heading, what it means in short, and how numbers are written."""

    label: str
    unit: str
    factor: int = 100
    is_signed: bool = False

    def number(self, value: float) -> str:
        """Return a value in percent or points."""
        sign = "+" if self.is_signed else ""
        return f"{self.factor * value:{sign}.1f}".replace("-", "−")


_COLUMNS = {
    "id_accuracy": _Column("Own task", "accuracy in %, higher is better"),
    "ood_accuracy": _Column("Other tasks", "accuracy in %, higher is better"),
    "ood_gain": _Column("Gain on them", "points over the base", is_signed=True),
    "forget_ratio": _Column("Forget ratio", "% of the base's accuracy, lower is better"),
    "collapse_percent": _Column("Collapse", "% of tasks below 1 %, lower is better", factor=1),
}
_SCORINGS = {
    "generated": "Answers that the model wrote.",
    "likelihood": "The likeliest of the given options counts as the answer: some option always is "
    "the likeliest, so accuracy cannot collapse.",
}


def transfer(facts: Sequence[TransferFacts]) -> Markup | None:
    """Return a table for each way of judging answers."""
    if not facts:
        return None
    arms = list(dict.fromkeys(f.arm for f in facts))
    tables = [
        _table([f for f in facts if f.scoring == scoring], arms)
        for scoring in dict.fromkeys(f.scoring for f in facts)
    ]
    return tag("div", tag("h3", "What did they do to other tasks?"), *tables, class_="task")


def _table(facts: Sequence[TransferFacts], arms: Sequence[str]) -> Markup:
    names = [name for name in _COLUMNS if any(name in f.estimates for f in facts)]
    scales = {name: _scale(name, facts) for name in names}
    rows: list[list[Child]] = []
    if base := facts[0].base:
        mean = f"{100 * fmean(base.values()):.1f}"
        known = {"id_accuracy": mean, "ood_accuracy": mean}
        swatch = tag("i", class_="swatch base")
        rows.append([join([swatch, "base, untouched"]), *(known.get(n, _none()) for n in names)])
    for f in facts:
        swatch = tag("i", class_=f"swatch {figures.arm_class(f.arm, arms)}")
        label = join([swatch, isolated(shortened(f.arm, 24))])
        rows.append([label, *(_cell(f, n, scales[n], arms) for n in names)])
    headings = [
        join([_COLUMNS[n].label, tag("span", _COLUMNS[n].unit, class_="unit")]) for n in names
    ]
    n_tasks, seeds = len(facts[0].base), sorted({f.n_seeds for f in facts})
    lede = (
        f"{_SCORINGS.get(facts[0].scoring, facts[0].scoring)} Tuned on each of {n_tasks} tasks "
        f"({listed([str(s) for s in seeds])} {'seed' if seeds == [1] else 'seeds'}) and tested on "
        "all; means over the tasks, brackets hold 95 % intervals over questions and seeds."
    )
    undefined = [f"{f.arm} {f.n_undefined}" for f in facts if f.n_undefined]
    note = (
        f"Without a forget ratio, as the base answers no other task: {', '.join(undefined)} of "
        f"{n_tasks} tasks."
        if undefined
        else ""
    )
    return tag(
        "div",
        tag("p", lede, class_="lede"),
        table(["Method", *headings], rows, class_="grid"),
        tag("p", note, class_="note") if note else None,
        folded("By the task tuned on", _by_task(facts, names)),
        class_="transfer",
    )


def _scale(name: str, facts: Sequence[TransferFacts]) -> figures.Scale:
    ends = [v for f in facts for v in f.estimates.get(name) or ()]
    zero = [0.0] if _COLUMNS[name].is_signed else []
    return figures.Scale.around([_COLUMNS[name].factor * v for v in ends] + zero)


def _cell(f: TransferFacts, name: str, scale: figures.Scale, arms: Sequence[str]) -> Markup:
    found = f.estimates.get(name)
    if found is None:
        return _none()
    column = _COLUMNS[name]
    value, low, high = found
    words, ends = column.number(value), f"[{column.number(low)}, {column.number(high)}]"
    factor = column.factor
    mark = figures.whisker(
        scale, factor * value, (factor * low, factor * high), figures.arm_class(f.arm, arms),
        f"{column.label} of {f.arm}: {words} {ends}", zero=0.0 if column.is_signed else None,
    )  # fmt: skip
    return join([tag("b", words), tag("span", ends, class_="bracket"), mark])


def _by_task(facts: Sequence[TransferFacts], names: Sequence[str]) -> Markup:
    rows: list[list[Child]] = []
    for f in facts:
        for task, values in f.by_task.items():
            label = join([isolated(shortened(f.arm, 24)), " · ", isolated(shortened(task, 40))])
            rows.append([label, *(_number(values, n) for n in names)])
    headings = [_COLUMNS[n].label for n in names]
    return table(["Method and task", *headings], rows, class_="plain")


def _number(values: Mapping[str, float | None], name: str) -> Child:
    value = values.get(name)
    return _none() if value is None else _COLUMNS[name].number(value)


def _none() -> Markup:
    return tag("span", "–", class_="soft")
