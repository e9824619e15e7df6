"""The first thing on the page: did the selection help, and how sure is that."""

from collections.abc import Sequence

from selectune.report import figures
from selectune.report.blocks import bullets, drawn_rows, isolated, listed, panel, section, table
from selectune.report.contents import BASE, RANDOM, SELECTED, Difference, Level, ReportData, Verdict
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.numbers import count, metric

_TONES = {
    "better_than_random": "good",
    "worse_than_random": "bad",
    "worse_than_base": "bad",
}
_ORDER = (SELECTED, RANDOM, BASE)


def missing_baselines(data: ReportData) -> str:
    """Return what the reader must know before the verdict, "" where both baselines are there."""
    arms = {level.arm for level in data.levels}
    if not arms:
        return (
            "Nothing was evaluated in this run: this page shows what was chosen, "
            "not whether it helps."
        )
    meaning = {
        RANDOM: "no random control was tuned, so it cannot show that choosing beats chance",
        BASE: "the untouched base was not evaluated, so it cannot show that tuning helps",
    }
    missing = [words for arm, words in meaning.items() if arm not in arms]
    if not missing:
        return ""
    return f"This run lacks a baseline: {'; '.join(missing)}."


def verdict(data: ReportData) -> Markup:
    """Return title, verdict, what it rests on, and what to try."""
    gap = missing_baselines(data)
    advice = list(dict.fromkeys(a for found in data.verdicts.values() for a in found.advice))
    return tag(
        "header",
        tag("p", "selectune run", class_="kicker"),
        tag("h1", data.title, dir="auto"),
        tag("p", gap, class_="gap") if gap else None,
        *(_statement(task, found, len(data.verdicts)) for task, found in data.verdicts.items()),
        _evidence(data),
        tag("div", tag("h2", "What to try"), bullets(map(_with_code, advice)), class_="advice")
        if advice
        else None,
    )


def evaluation(data: ReportData) -> Markup | None:
    """Return the table of every arm, task and metric, and the paired differences."""
    if not data.levels:
        return None
    tasks = list(dict.fromkeys(level.task for level in data.levels))
    return section(
        "evaluation",
        "Evaluation",
        "All numbers are from held-out examples, which neither selection nor training saw. "
        "Answer loss is the mean loss of the right answer (lower is better); accuracy is how often "
        "the right option is the likeliest. Brackets hold 95 % intervals.",
        *(_task_table(task, data) for task in tasks),
        _paired(data),
    )


def arms_of(data: ReportData) -> list[str]:
    """Return the arms of the evaluation and of training, best known first."""
    found = [*(level.arm for level in data.levels), *data.loss_curves]
    return sorted(dict.fromkeys(found), key=lambda a: _ORDER.index(a) if a in _ORDER else 3)


def _statement(task: str, found: Verdict, n_verdicts: int) -> Markup:
    """Return one verdict: its first sentence large, the numbers below."""
    tone = _TONES.get(found.code, "even")
    headline, stop, rest = found.text.partition(". ")
    return tag(
        "div",
        tag("p", isolated(task), class_="over") if n_verdicts > 1 and task else None,
        tag("p", headline + stop.strip(), class_="headline", dir="auto"),
        tag("p", rest, class_="numbers", dir="auto") if rest else None,
        class_=f"verdict {tone} one-of-many" if n_verdicts > 1 else f"verdict {tone}",
    )


def _with_code(sentence: str) -> Markup:
    """Return a sentence with its `quoted` parts set as code."""
    pieces = sentence.split("`")
    return join(tag("code", p) if i % 2 else p for i, p in enumerate(pieces))


def _evidence(data: ReportData) -> Markup | None:
    """Return the drawn intervals: paired differences, and levels while there is room."""
    shown = _primary(data)
    if shown is None:
        return None
    what = metric(shown)
    levels = [x for x in data.levels if x.metric == shown]
    tasks = list(dict.fromkeys(x.task for x in levels))
    body: list[Markup] = []
    if differences := [x for x in data.differences if x.metric == shown]:
        body.append(_difference_panel(shown, differences))
    if len(tasks) <= 3:
        arms = [a for a in arms_of(data) if any(x.arm == a for x in levels)]
        scale = figures.Scale.around([v for x in levels for v in _ends(x)])
        rows: list[list[Child]] = []
        for task in tasks:
            for arm in arms:
                for x in (x for x in levels if (x.arm, x.task) == (arm, task)):
                    label = _task_and(arm, task, len(tasks))
                    rows.append([label, _level_mark(x, arms, scale), _level_words(x)])
        unit = f", {what.unit}" if what.unit else ""
        body.append(
            panel(
                f"{what.label}{unit}",
                drawn_rows(rows, figures.axis(scale, **_sense(what.sign))),
            )
        )
    return tag("div", *body, class_="pair")


def _primary(data: ReportData) -> str | None:
    present = list(dict.fromkeys([x.metric for x in (*data.differences, *data.levels)]))
    if not present:
        return None
    return data.primary_metric if data.primary_metric in present else present[0]


def _difference_panel(name: str, differences: Sequence[Difference]) -> Markup:
    what = metric(name)
    # Drawn so that right is better: a lower loss points to the right.
    sign = what.sign or 1
    factor = sign * (100 if what.is_share else 1)
    tasks = list(dict.fromkeys(x.task for x in differences))
    sense = {"low": "← worse", "high": "better →"} if what.sign else {}
    # Chance and base have a scale each: the gain over an untuned base can be 20 times larger, and
    # what matters is the one over chance. That one stands first.
    drawn: list[Markup] = []
    pairs_of = dict.fromkeys((x.arm, x.against) for x in differences)
    for arm, against in sorted(pairs_of, key=lambda pair: pair[1] != RANDOM):
        rows: list[list[Child]] = []
        here = [x for x in differences if (x.arm, x.against) == (arm, against)]
        scale = figures.Scale.around([0.0, *(factor * v for x in here for v in (x.low, x.high))])
        for x in here:
            low, high = sorted((factor * x.low, factor * x.high))
            bracket = what.change_interval(x.value, x.low, x.high)
            label = join([arm, tag("span", f" vs {against}", class_="soft")])
            tone = "good" if low > 0 else "bad" if high < 0 else "even"
            mark = figures.whisker(
                scale, factor * x.value, (low, high), tone if what.sign else "even",
                f"{arm} against {against} on {x.task}: {what.change(x.value)} {bracket}", zero=0,
            )  # fmt: skip
            words = _value(what.change(x.value), bracket.removeprefix("["))
            rows.append([_task_and(label, x.task, len(tasks)), mark, words])
        drawn.append(drawn_rows(rows, figures.axis(scale, **sense)))
    unit = "points" if what.is_share else what.unit
    pairs = sorted({x.n for x in differences})
    span = count(pairs[0]) if len(pairs) == 1 else f"{pairs[0]:,} to {pairs[-1]:,}"
    return panel(
        f"Gain in {what.label[0].lower()}{what.label[1:]}{', ' + unit if unit else ''}",
        *drawn,
        note=f"Paired over {span} held-out examples; the bar is a 95 % interval. A bar that "
        "crosses the line at 0 may be chance.",
    )


def _task_and(label: Child, task: str, n_tasks: int) -> Markup:
    """Return a row's label; the task stands above it where there are several."""
    shown = tag("span", isolated(shortened(task, 40)), class_="over") if n_tasks > 1 else None
    return join([shown, label])


def _value(main: str, bracket: str = "") -> Markup:
    inside = tag("span", f"[{bracket}", class_="bracket") if bracket else None
    return join([tag("b", main), inside])


def _level_words(x: Level) -> Markup:
    what = metric(x.metric)
    if x.low is None or x.high is None:
        return _value(what.level(x.value))
    return _value(what.level(x.value), what.interval(x.low, x.high).removeprefix("["))


def _level_mark(x: Level, arms: Sequence[str], scale: figures.Scale) -> Markup:
    factor = 100 if metric(x.metric).is_share else 1
    interval = None if x.low is None or x.high is None else (factor * x.low, factor * x.high)
    title = f"{x.arm} on {x.task}: {metric(x.metric).level(x.value)}"
    return figures.whisker(scale, factor * x.value, interval, figures.arm_class(x.arm, arms), title)


def _ends(x: Level) -> list[float]:
    factor = 100 if metric(x.metric).is_share else 1
    return [factor * v for v in (x.value, x.low, x.high) if v is not None]


def _sense(sign: int) -> dict[str, str]:
    match sign:
        case 1:
            return {"high": "better →"}
        case -1:
            return {"low": "← better"}
        case _:
            return {}


def _task_table(task: str, data: ReportData) -> Markup:
    here = [x for x in data.levels if x.task == task]
    arms = [a for a in arms_of(data) if any(x.arm == a for x in here)]
    names = list(dict.fromkeys(x.metric for x in here))
    scales = {
        n: figures.Scale.around([v for x in here if x.metric == n for v in _ends(x)]) for n in names
    }
    rows: list[list[Child]] = []
    for arm in arms:
        row: list[Child] = [join([tag("i", class_=f"swatch {figures.arm_class(arm, arms)}"), arm])]
        for name in names:
            found = [x for x in here if (x.arm, x.metric) == (arm, name)]
            row.append(
                join([_level_words(found[0]), _level_mark(found[0], arms, scales[name])])
                if found
                else tag("span", "–", class_="soft")
            )
        rows.append(row)
    headings: list[Child] = ["Arm"]
    for name in names:
        arrow = {1: "higher is better", -1: "lower is better"}.get(metric(name).sign, "")
        unit = ", ".join(part for part in (metric(name).unit, arrow) if part)
        headings.append(join([metric(name).label, tag("span", unit, class_="unit")]))
    sizes = sorted({x.n for x in here})
    caption = join([isolated(task), tag("span", f" · {listed([f'{n:,}' for n in sizes])} held-out "
                                        "examples", class_="soft")])  # fmt: skip
    return tag("div", tag("h3", caption), table(headings, rows, class_="grid"), class_="task")


def _paired(data: ReportData) -> Markup | None:
    if not data.differences:
        return None
    rows: list[list[Child]] = [
        [
            isolated(shortened(x.task, 60)),
            metric(x.metric).label,
            f"{x.arm} vs {x.against}",
            metric(x.metric).change(x.value),
            metric(x.metric).change_interval(x.value, x.low, x.high),
        ]
        for x in data.differences
    ]
    return tag(
        "div",
        tag("h3", "Paired differences"),
        table(["Task", "Metric", "Arms", "Difference", "95 % interval"], rows, class_="plain"),
        class_="task",
    )
