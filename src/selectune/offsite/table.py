"""What offsite tuning gave away and what it won, for several compressors at one table.

    ZS              the full model, untouched          FT          all of it, tuned
    emulator ZS     the emulator, untouched            FT-adapter  it, only its adapter layers tuned
    EFT             the emulator, its adapter tuned    PI          the full model with that adapter
    Delta           PI - EFT

A bad emulator buys Delta cheaply: it stands beside PI, ZS and what tuning in the open reaches. By
accuracy, Delta and PI - ZS are wanted above zero; by answer loss, below.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selectune.errors import DataError
from selectune.evaluation import Evaluation, Interval, Metric, compare_seeds, together
from selectune.tables import aligned, signed

ByTask = Mapping[str, Evaluation]
ALL_TASKS = "all"
_POINTS = 100  # shares are told in points; losses in nats, as they are
_PERCENT = frozenset({"correct_norm", "correct_raw"})


@dataclass(frozen=True, slots=True)
class Offsite:
    """One compressor, at one size, with one seed.

    Attributes:
        emulator: the untouched emulator's answers, by task.
        tuned: those of the emulator with its tuned adapter (EFT).
        plugged: those of the full model with that adapter (PI).
    """

    emulator: ByTask
    tuned: ByTask
    plugged: ByTask


@dataclass(frozen=True, slots=True)
class OffsiteRow:
    """One compressor on one task, over its seeds; accuracies in points, losses in nats per token.

    Attributes:
        method: what the table calls the compressor.
        task: a task, or "all".
        n_seeds: that the means are over.
        zs: the full model, untouched.
        ft: all of it tuned; None where that was not run.
        ft_adapter: only its adapter layers tuned, likewise.
        emulator_zs: the emulator, untouched.
        eft: with its tuned adapter.
        pi: the full model with that adapter.
        delta: PI - EFT.
        gain: PI - ZS.
        lost: PI - FT-adapter, None without it.
    """

    method: str
    task: str
    n_seeds: int
    zs: float
    ft: float | None
    ft_adapter: float | None
    emulator_zs: float
    eft: float
    pi: float
    delta: Interval
    gain: Interval
    lost: Interval | None


@dataclass(frozen=True, slots=True)
class OffsiteTable:
    """Rows, all by one metric.

    Attributes:
        metric: what was measured.
        rows: by method, then task; "all" first where there are several tasks.
    """

    metric: Metric
    rows: tuple[OffsiteRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"metric": self.metric, "rows": [asdict(row) for row in self.rows]}

    def to_csv(self) -> str:
        """Return one line per row, the ends of intervals in columns of their own."""
        out = io.StringIO()
        names = ["delta", "gain", "lost"]
        plain = [name for name in OffsiteRow.__slots__ if name not in names]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*plain, *(f"{n}{end}" for n in names for end in ("", "_low", "_high"))])
        for row in self.rows:
            ends: list[float | None] = []
            for name in names:
                one: Interval | None = getattr(row, name)
                ends += [None] * 3 if one is None else [one.mean_difference, one.low, one.high]
            writer.writerow([getattr(row, name) for name in plain] + ends)
        return out.getvalue()

    def lines(self) -> list[str]:
        """Return it as a Markdown table."""
        head = ["method", "task", "seeds", "ZS", "FT", "FT-adapter", "emulator ZS", "EFT", "PI",
                "Δ = PI − EFT", "PI − ZS", "PI − FT-adapter"]  # fmt: skip
        digits = 1 if self.metric in _PERCENT else 3
        return aligned(head, [_cells(row, digits) for row in self.rows])


def offsite_table(
    cells: Mapping[tuple[str, int], Offsite],
    zs: ByTask,
    *,
    ft: Mapping[int, ByTask] | None = None,
    ft_adapter: Mapping[int, ByTask] | None = None,
    metric: Metric = "correct_norm",
    n_boot: int = 10_000,
) -> OffsiteTable:
    """Return the table of several compressors.

    Args:
        cells: by method and seed.
        zs: the untouched full model's answers.
        ft: those of the model that was tuned whole, by seed.
        ft_adapter: those of the model of which only the adapter layers were tuned, by seed.
        metric: "correct_norm" or "correct_raw" in points, "answer_loss" in nats.
        n_boot: bootstrap draws behind an interval.

    Raises:
        DataError: nothing to show, a seed of a method has no counterpart in the open, or two models
            did not answer the same questions.
    """
    if not cells:
        raise DataError("there is nothing to show", where="cells", do="tune one emulator at least")
    methods = list(dict.fromkeys(method for method, _ in cells))
    tasks = [*([ALL_TASKS] if len(zs) > 1 else []), *zs]
    rows: list[OffsiteRow] = []
    for method in methods:
        found = {seed: cell for (name, seed), cell in cells.items() if name == method}
        rows += [_row(method, task, found, zs, ft, ft_adapter, metric, n_boot) for task in tasks]
    return OffsiteTable(metric, tuple(rows))


def _row(
    method: str,
    task: str,
    cells: Mapping[int, Offsite],
    zs: ByTask,
    ft: Mapping[int, ByTask] | None,
    ft_adapter: Mapping[int, ByTask] | None,
    metric: Metric,
    n_boot: int,
) -> OffsiteRow:
    scale = _POINTS if metric in _PERCENT else 1

    def of(answers: ByTask) -> Evaluation:
        return together(answers) if task == ALL_TASKS else answers[task]

    def mean(several: Sequence[Evaluation]) -> float:
        values = [_value(one, metric) for one in several]
        return scale * sum(values) / len(values)

    def minus(a: Sequence[Evaluation], b: Sequence[Evaluation]) -> Interval:
        pairs = list(zip(a, b, strict=True))
        found = compare_seeds(pairs, n_boot=n_boot, metric=metric)
        return _scaled(found, scale)

    def openly(runs: Mapping[int, ByTask] | None, what: str) -> list[Evaluation] | None:
        if runs is None:
            return None
        missing = [seed for seed in cells if seed not in runs]
        if missing:
            raise DataError(
                f"{method} has the seed {missing[0]}, and {what} has not",
                where=what,
                why="differences are paired by seed",
                do=f"run {what} with every seed, or leave it out",
            )
        return [of(runs[seed]) for seed in cells]

    emulators, efts, pis = (
        [of(getattr(cell, name)) for cell in cells.values()]
        for name in ("emulator", "tuned", "plugged")
    )
    whole, only = openly(ft, "ft"), openly(ft_adapter, "ft_adapter")
    own = of(zs)
    return OffsiteRow(
        method=method,
        task=task,
        n_seeds=len(cells),
        zs=mean([own]),
        ft=None if whole is None else mean(whole),
        ft_adapter=None if only is None else mean(only),
        emulator_zs=mean(emulators),
        eft=mean(efts),
        pi=mean(pis),
        delta=minus(pis, efts),
        gain=minus(pis, [own] * len(pis)),
        lost=None if only is None else minus(pis, only),
    )


def _value(found: Evaluation, metric: Metric) -> float:
    values = {
        "answer_loss": found.answer_loss,
        "correct_norm": found.accuracy,
        "correct_raw": found.accuracy_raw,
    }
    value = values[metric]
    if value is None:
        raise DataError(
            f"there is nothing to show by {metric}",
            why="no held-out example has options",
            do="use metric=answer_loss",
        )
    return value


def _scaled(found: Interval, scale: int) -> Interval:
    mean, low, high = (scale * x for x in (found.mean_difference, found.low, found.high))
    return Interval(mean, low, high, found.n, found.n_seeds, found.metric)


def _cells(row: OffsiteRow, digits: int) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def interval(found: Interval | None) -> str:
        if found is None:
            return "-"
        return signed(found.mean_difference, found.low, found.high, digits)

    values = (row.zs, row.ft, row.ft_adapter, row.emulator_zs, row.eft, row.pi)
    differences = (row.delta, row.gain, row.lost)
    return [
        row.method,
        row.task,
        str(row.n_seeds),
        *map(number, values),
        *map(interval, differences),
    ]
