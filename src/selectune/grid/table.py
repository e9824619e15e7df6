"""The table of a comparison: what each method reached on each task, against random and the base."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from selectune.evaluation import Evaluation, Interval, Metric, compare_seeds, together
from selectune.grid.text_table import TextRow, text_lines
from selectune.grid.transfer_table import TransferRow, transfer_lines
from selectune.offsite.table import OffsiteTable
from selectune.pipeline.arms import BASE
from selectune.pipeline.economy import told_fast
from selectune.report.grid_facts import won_lost
from selectune.tables import aligned, signed

RANDOM = "random"
ALL_TASKS = "mean"  # the row over all tasks together
_COLUMNS = (
    "task",
    "method",
    "answer_loss",
    "accuracy",
    "precision",
    "loss_vs_random",
    "accuracy_vs_random",
    "loss_vs_base",
    "learning_rate",
    "epochs",
    "n_examples",
    "n_seeds",
    "seconds_per_step",
    "time_ratio",
    "peak_ratio",
    "seconds",
    "won",
    "lost",
)
_NO_PEAKS = (
    "peak / random is of a GPU alone: on a CPU memory is known of the whole process, which all "
    "trainings share."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One trained method on one task and seed.

    Args:
        answers: to the held-out questions.
        precision: see `Row`.
        n_examples: trained on.
        learning_rate: as used.
        epochs: as used.
        seconds_per_step: training time by optimizer steps.
        seconds: of all that this one model needed: evidence, choice and training.
        peak_bytes: on an accelerator; None on a CPU, where only the whole process is measured.
    """

    answers: Evaluation
    precision: float | None
    n_examples: int
    learning_rate: float
    epochs: int
    seconds_per_step: float
    seconds: float
    peak_bytes: int | None


Cells = Mapping[tuple[str, str, int], Cell]  # by task, method and seed


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one task, over all seeds.

    Args:
        task: the target task, or "mean" for all of them together.
        method: its name in the table.
        answer_loss: nats per token of the right answer, held-out, mean over seeds.
        accuracy: share of held-out questions, length-normalised; None without options.
        precision: share of the selection that comes from the target's own source; None where the
            pool has no such source.
        loss_vs_random: answer loss less that of random, paired by example and seed.
        accuracy_vs_random: the same for accuracy.
        loss_vs_base: the same against the untouched base.
        learning_rate: as used.
        epochs: as used.
        n_examples: trained on.
        n_seeds: behind the numbers.
        per_seed: answer loss of each seed, in the order of `matrix.seeds`.
        seconds_per_step: of training, mean over seeds; None for the base.
        time_ratio: the same by that of random.
        peak_ratio: memory in training by that of random; None on a CPU.
        seconds: of all that one model needed, as if nothing were shared, mean over seeds and tasks;
            None for the base.
        won: tasks of the row on which the method's answer loss is below that of random, 95 %
            interval and all; None for base and random.
        lost: the same above it.
    """

    task: str
    method: str
    answer_loss: float
    accuracy: float | None
    precision: float | None
    loss_vs_random: Interval | None
    accuracy_vs_random: Interval | None
    loss_vs_base: Interval | None
    learning_rate: float | None
    epochs: int | None
    n_examples: int
    n_seeds: int
    per_seed: tuple[float, ...]
    seconds_per_step: float | None = None
    time_ratio: float | None = None
    peak_ratio: float | None = None
    seconds: float | None = None
    won: int | None = None
    lost: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {k: v.to_json() if isinstance(v, Interval) else v for k, v in plain.items()}


@dataclass(frozen=True, slots=True)
class ComparisonTable:
    """The result of a grid.

    Args:
        rows: by task, then by method.
        out: where `table.json`, `table.csv` and `table.md` lie.
        costs: seconds of each shared piece, by seed and step.
        tried: answer loss on the targets held aside, by method, tasks and setting; None where
            training failed.
        transfers: what tuning on one task did to the others, where that was asked for.
        texts: what it did to plain text, where the recipe names one.
        fast: with `score.fast`, how alike the ranks of a probe are, by method, tasks and seed.
        offsite: what tuning on emulators won, by metric, where rows have one.
        emulators: what their owner knows of them, by row.
    """

    rows: tuple[Row, ...]
    out: Path
    costs: Mapping[str, Any]
    tried: Sequence[Mapping[str, Any]] = ()
    transfers: Sequence[TransferRow] = ()
    texts: Sequence[TextRow] = ()
    fast: Sequence[Mapping[str, Any]] = ()
    offsite: Sequence[OffsiteTable] = ()
    emulators: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        rows = [row.to_json() for row in self.rows]
        found = {"rows": rows, "costs": dict(self.costs), "tried": [dict(t) for t in self.tried]}
        if self.transfers:
            found["transfer"] = [row.to_json() for row in self.transfers]
        if self.texts:
            found["text"] = [row.to_json() for row in self.texts]
        if self.fast:
            found["fast"] = [dict(one) for one in self.fast]
        if self.offsite:
            tables = [table.to_json() for table in self.offsite]
            found["offsite"] = {"tables": tables, "emulators": dict(self.emulators)}
        return found

    def lines(self) -> list[str]:
        """Return the tables, and where they lie."""
        files = ", ".join(str(self.out / name) for name in ("table.md", "table.json"))
        return [*self.tables(), "", f"table: {files}", f"report: {self.out / 'report.html'}"]

    def tables(self) -> list[str]:
        """Return it as Markdown tables, widths aligned."""
        head = (
            "task", "method", "answer loss", "accuracy", "precision", "loss - random [95 %]",
            "won : lost", "accuracy - random [95 %]", "loss - base [95 %]", "lr", "epochs",
            "s / model", "s / step", "time / random", "peak / random",
        )  # fmt: skip
        body = [
            (
                row.task,
                row.method,
                f"{row.answer_loss:.3f}",
                "-" if row.accuracy is None else f"{row.accuracy:.3f}",
                "-" if row.precision is None else f"{row.precision:.2f}",
                _told(row.loss_vs_random),
                "-" if row.won is None else f"{row.won} : {row.lost}",
                _told(row.accuracy_vs_random),
                _told(row.loss_vs_base),
                "-" if row.learning_rate is None else f"{row.learning_rate:g}",
                "-" if row.epochs is None else str(row.epochs),
                "-" if row.seconds is None else f"{row.seconds:.1f}",
                _short(row.seconds_per_step),
                _short(row.time_ratio),
                _short(row.peak_ratio),
            )
            for row in self.rows
        ]
        lines = aligned(head, body)
        if all(row.peak_ratio is None for row in self.rows):
            lines += ["", _NO_PEAKS]
        if self.fast:
            lines += ["", *fast_lines(self.fast)]
        if self.transfers:
            lines += ["", *transfer_lines(self.transfers)]
        if self.texts:
            lines += ["", *text_lines(self.texts)]
        for table in self.offsite:
            lines += ["", *table.lines()]
        return lines

    def to_csv(self) -> str:
        """Return it as CSV, an interval as three columns."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        names: list[str] = []
        for name in _COLUMNS:
            is_interval = "_vs_" in name
            names += [name, f"{name}_low", f"{name}_high"] if is_interval else [name]
        writer.writerow(names)
        for row in self.rows:
            cells: list[Any] = []
            for name in _COLUMNS:
                value = getattr(row, name)
                if "_vs_" not in name:
                    cells.append(value)
                elif value is None:
                    cells += ["", "", ""]
                else:
                    cells += value.ends
            writer.writerow(cells)
        return sink.getvalue()


def fast_lines(fast: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each method: how alike ranks of cheaper passes are to those of full ones.

    Args:
        fast: as a table has it.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for one in fast:
        by_method.setdefault(one["method"], []).append(one)
    lines: list[str] = []
    for method, mine in by_method.items():
        line = f"{method}: {told_fast(min(mine, key=lambda one: one['spearman']))}"
        lines.append(line + (f", the least of {len(mine)} scorings" if len(mine) > 1 else ""))
    return lines


def make_rows(
    cells: Cells,
    bases: Mapping[str, Evaluation],
    *,
    references: Mapping[str, str],
    seeds: Sequence[int],
    n_boot: int,
) -> tuple[Row, ...]:
    """Return the rows of a table, by task and then by method.

    Args:
        cells: what was trained.
        bases: the base's answers, by task.
        references: what each method is compared with, random at its budget; in the table's order.
        seeds: of the cells.
        n_boot: draws behind an interval.
    """
    groups = [(task, [task], bases[task]) for task in bases]
    if len(bases) > 1:
        groups.append((ALL_TASKS, list(bases), together(bases)))
    rows: list[Row] = []
    for name, tasks, base in groups:
        rows.append(_base_row(name, base))
        for method, random in references.items():
            mine = _answers(cells, tasks, method, seeds)
            usual = None if method == random else _answers(cells, tasks, random, seeds)
            row = _row(name, method, mine, usual, base, n_boot)
            rows.append(_with_facts(row, cells, random, tasks, seeds))
    return tuple(_with_wins(row, rows) for row in rows)


def _with_wins(row: Row, rows: Sequence[Row]) -> Row:
    """Return a row with the tasks on which it beats random, or loses to it, beyond doubt."""
    if row.loss_vs_random is None:
        return row
    mine = [row]
    if row.task == ALL_TASKS:  # all of them together is no task
        mine = [r for r in rows if r.method == row.method and r.task != ALL_TASKS]
    won, lost = won_lost(r.loss_vs_random and r.loss_vs_random.ends for r in mine)
    return replace(row, won=won, lost=lost)


def _answers(
    cells: Cells, tasks: Sequence[str], method: str, seeds: Sequence[int]
) -> list[Evaluation]:
    if len(tasks) == 1:
        return [cells[tasks[0], method, seed].answers for seed in seeds]
    return [together({t: cells[t, method, seed].answers for t in tasks}) for seed in seeds]


def _with_facts(
    row: Row, cells: Cells, reference: str, tasks: Sequence[str], seeds: Sequence[int]
) -> Row:
    """Return a row with what was trained and at what price, where its tasks agree on it."""
    mine = [cells[task, row.method, seed] for task in tasks for seed in seeds]
    random = [cells[task, reference, seed] for task in tasks for seed in seeds]
    # Of the first seed: how many examples a budget buys may differ by seed.
    first = [cells[task, row.method, seeds[0]] for task in tasks]
    rates, epochs = {c.learning_rate for c in first}, {c.epochs for c in first}
    sizes = {c.n_examples for c in first}
    precisions = [c.precision for c in mine if c.precision is not None]
    peaks, usual = ([c.peak_bytes for c in group if c.peak_bytes] for group in (mine, random))
    seconds, usual_seconds = (
        float(np.mean([c.seconds_per_step for c in group])) for group in (mine, random)
    )
    return replace(
        row,
        precision=float(np.mean(precisions)) if precisions and len(tasks) == 1 else None,
        learning_rate=rates.pop() if len(rates) == 1 else None,
        epochs=epochs.pop() if len(epochs) == 1 else None,
        n_examples=sizes.pop() if len(sizes) == 1 else 0,
        seconds_per_step=seconds,
        time_ratio=seconds / usual_seconds,
        peak_ratio=max(peaks) / max(usual) if peaks and usual else None,
        seconds=float(np.mean([c.seconds for c in mine])),
    )


def _base_row(task: str, base: Evaluation) -> Row:
    return Row(
        task, BASE, base.answer_loss, base.accuracy, None, None, None, None, None, None, 0, 1,
        (base.answer_loss,),
    )  # fmt: skip


def _row(
    task: str,
    name: str,
    mine: Sequence[Evaluation],
    random: Sequence[Evaluation] | None,
    base: Evaluation,
    n_boot: int,
) -> Row:
    accuracies = [e.accuracy for e in mine]
    has_options = all(a is not None for a in accuracies)

    def against(others: Sequence[Evaluation], metric: Metric) -> Interval:
        pairs = list(zip(mine, others, strict=True))
        return compare_seeds(pairs, n_boot=n_boot, metric=metric)

    losses = tuple(e.answer_loss for e in mine)
    return Row(
        task=task,
        method=name,
        answer_loss=float(np.mean(losses)),
        accuracy=float(np.mean([a for a in accuracies if a is not None])) if has_options else None,
        precision=None,
        loss_vs_random=None if random is None else against(random, "answer_loss"),
        accuracy_vs_random=against(random, "correct_norm")
        if has_options and random is not None
        else None,
        loss_vs_base=against([base] * len(mine), "answer_loss"),
        learning_rate=None,
        epochs=None,
        n_examples=0,
        n_seeds=len(mine),
        per_seed=losses,
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _told(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return signed(interval.mean_difference, interval.low, interval.high)
