"""A grid of runs, one table: methods x target tasks x seeds, base and random always beside.

What cells have in common is done once: one warm-up and one gradient store per seed serve all
scorers and targets, equal selections are trained once, equal models asked once. Every piece lies in
`shared/` under the fingerprint of its inputs, so a killed grid goes on where it stopped.

With `matrix.tune`, learning rate and epochs are chosen for each method and task alike, by the
answer loss on a half of the target examples that the selection does not see; the choice is made on
the first seed and kept for all. Held-out examples are never read for it.
"""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selectune.arms import BASE, FULL, TunedArm, choose, control_selection, evaluate_arm, tune_arm
from selectune.data import Example, content_key
from selectune.errors import ConfigError, DataError
from selectune.evaluation import Evaluation, Interval, Metric, compare_seeds
from selectune.files import lock, sweep, write_file
from selectune.ground import Ground, digest
from selectune.progress import Progress
from selectune.recipe import MatrixMethod, MatrixSection, Recipe
from selectune.record import Record
from selectune.run import together
from selectune.scoring import score_pool
from selectune.selection import Selection

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
)


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
    """

    rows: tuple[Row, ...]
    out: Path
    costs: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"rows": [row.to_json() for row in self.rows], "costs": dict(self.costs)}

    def lines(self) -> list[str]:
        """Return it as a Markdown table, widths aligned."""
        head = (
            "task", "method", "answer loss", "accuracy", "precision", "loss - random [95 %]",
            "accuracy - random [95 %]", "loss - base [95 %]", "lr", "epochs",
        )  # fmt: skip
        body = [
            (
                row.task,
                row.method,
                f"{row.answer_loss:.3f}",
                "-" if row.accuracy is None else f"{row.accuracy:.3f}",
                "-" if row.precision is None else f"{row.precision:.2f}",
                _told(row.loss_vs_random),
                _told(row.accuracy_vs_random),
                _told(row.loss_vs_base),
                "-" if row.learning_rate is None else f"{row.learning_rate:g}",
                "-" if row.epochs is None else str(row.epochs),
            )
            for row in self.rows
        ]
        widths = [max(len(line[k]) for line in (head, *body)) for k in range(len(head))]
        table = [_markdown(line, widths) for line in (head, tuple("-" * w for w in widths), *body)]
        return [*table, "", f"table: {self.out / 'table.md'}, {self.out / 'table.json'}"]

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
                    cells += [value.mean_difference, value.low, value.high]
            writer.writerow(cells)
        return sink.getvalue()


@dataclass(frozen=True, slots=True)
class _Cell:
    """One trained method on one task and seed."""

    answers: Evaluation
    precision: float | None
    n_examples: int
    learning_rate: float
    epochs: int


class _Grid:
    """The state of one comparison."""

    def __init__(
        self, recipe: Recipe, matrix: MatrixSection, out: Path, progress: Progress
    ) -> None:
        self.recipe, self.matrix, self.out, self.progress = recipe, matrix, out, progress
        self.methods = _methods(matrix)
        self._grounds: dict[int, Ground] = {}
        self._aside: dict[str, list[Example]] = {}
        first = self.ground(matrix.seeds[0])
        self.tasks = list(matrix.targets) or list(first.prepared.targets)
        missing = [task for task in self.tasks if task not in first.prepared.heldout]
        if missing:
            raise ConfigError(
                f'task "{missing[0]}" has no held-out examples',
                where="data.heldout",
                why="a comparison is made on held-out examples",
                do=f"add data.heldout.{missing[0]}",
            )

    def ground(self, seed: int) -> Ground:
        """Return the ground of one seed; data and tokens are read once."""
        if seed not in self._grounds:
            recipe = self.recipe.changed({"seed": seed, "matrix": None})
            ground = Ground(
                recipe, self.out, shared=self.out / "shared", tasks=None,
                progress=self.progress,
            )  # fmt: skip
            if self._grounds:
                ground.borrow(next(iter(self._grounds.values())))
            elif self.matrix.tune is not None:
                self._hold_aside(ground)
            self._grounds[seed] = ground
        return self._grounds[seed]

    def _hold_aside(self, ground: Ground) -> None:
        """Take half of each task's targets out of the selection, to choose settings by."""
        kept: dict[str, tuple[Example, ...]] = {}
        for task, examples in ground.prepared.targets.items():
            # By content: equal rows stay on one side.
            keys = sorted({content_key(e.id) for e in examples}, key=_hashed)
            half = len(keys) // 2
            if half == 0:
                raise DataError(
                    f"task {task} has one target example, which cannot be split",
                    where="matrix.tune",
                    why="half of the targets choose the learning rate, half the examples",
                    do="give more target examples, or remove matrix.tune",
                )
            aside = set(keys[:half])
            self._aside[task] = [e for e in examples if content_key(e.id) in aside]
            kept[task] = tuple(e for e in examples if content_key(e.id) not in aside)
        ground.prepared = replace(ground.prepared, targets=kept)

    def select(self, method: MatrixMethod, task: str, seed: int) -> Selection:
        """Return what a method chooses for a task."""
        ground = self.ground(seed)
        if method.method == FULL:
            return control_selection(ground, FULL)
        ground.focus([task])
        return choose(ground, score_pool(ground, method.method, dict(method.options)), "")

    def train(self, selection: Selection, name: str, seed: int, lr: float, epochs: int) -> TunedArm:
        """Tune on a selection with one setting; equal work is found, not repeated."""
        ground = self.ground(seed)
        changed = ground.recipe.changed({"tune.learning_rate": lr, "tune.epochs": epochs})
        return tune_arm(ground.with_recipe(changed), name, selection)

    def settings(self, method: MatrixMethod) -> list[tuple[float, int]]:
        """Return the learning rates and epochs to try for a method."""
        tune = self.recipe.tune
        grid = self.matrix.tune
        rates = grid.learning_rate if grid and grid.learning_rate else [tune.learning_rate]
        epochs = grid.epochs if grid and grid.epochs else [tune.epochs]
        if method.epochs is not None:
            epochs = [method.epochs]
        return list(itertools.product(rates, epochs))

    def setting(self, method: MatrixMethod, task: str) -> tuple[float, int]:
        """Return the setting with the lowest answer loss on the targets held aside."""
        settings = self.settings(method)
        if len(settings) == 1:
            return settings[0]
        seed = self.matrix.seeds[0]
        selection = self.select(method, task, seed)
        ground = self.ground(seed)
        losses: dict[tuple[float, int], float] = {}
        for lr, epochs in settings:
            label = f"{method.name} lr {lr:g} epochs {epochs}"
            arm = self.train(selection, label, seed, lr, epochs)
            questions = {task: self._aside[task]}
            losses[lr, epochs] = evaluate_arm(ground, label, arm.path, questions)[task].answer_loss
        return min(losses, key=lambda key: (losses[key], key))

    def cell(self, method: MatrixMethod, task: str, seed: int) -> _Cell:
        """Select, train and evaluate one cell, or read what is there."""
        lr, epochs = self.setting(method, task)
        selection = self.select(method, task, seed)
        label = f"{method.name} {task} seed {seed}"
        arm = self.train(selection, label, seed, lr, epochs)
        ground = self.ground(seed)
        questions = {task: ground.prepared.heldout[task]}
        answers = evaluate_arm(ground, label, arm.path, questions)[task]
        own = {e.source for e in ground.prepared.targets[task]}
        sources = [ground.prepared.sources[i] for i in selection.ids]
        is_known = bool(own & set(ground.prepared.sources.values()))
        precision = sum(s in own for s in sources) / len(sources) if is_known else None
        return _Cell(answers, precision, arm.n_examples, lr, epochs)


def compare(recipe: Recipe, *, out: Path, progress: Progress) -> ComparisonTable:
    """Run or resume a grid, and write its table.

    Args:
        recipe: with a `matrix` section.
        out: folder of the grid.
        progress: told of every long step.

    Raises:
        ConfigError: the recipe has no matrix, or a task has no held-out examples.
        IncompatibleRunError: the folder holds a grid of another recipe.
    """
    matrix = recipe.matrix
    if matrix is None:
        raise ConfigError("the recipe has no matrix", where="matrix", do="add matrix.methods")
    with lock(out):
        sweep(out)
        record = Record(out, recipe, allow=("matrix",))
        grid = _Grid(recipe, matrix, out, progress)
        cells: dict[tuple[str, str, int], _Cell] = {}
        bases: dict[str, Evaluation] = {}
        for task in grid.tasks:
            ground = grid.ground(matrix.seeds[0])
            questions = {task: ground.prepared.heldout[task]}
            bases[task] = evaluate_arm(ground, BASE, None, questions)[task]
        for seed, task, method in itertools.product(matrix.seeds, grid.tasks, grid.methods):
            cells[task, method.name, seed] = grid.cell(method, task, seed)
            progress.note(_progress_line(cells, task, method.name, seed, bases[task]))
        costs = {str(seed): dict(grid.ground(seed).costs) for seed in matrix.seeds}
        table = ComparisonTable(_rows(grid, cells, bases), out, costs)
        write_file(out / "table.json", json.dumps(table.to_json(), indent=1).encode())
        write_file(out / "table.csv", table.to_csv().encode())
        write_file(out / "table.md", ("\n".join(table.lines()[:-2]) + "\n").encode())
        files = ["table.json", "table.csv", "table.md"]
        made = digest({"rows": [row.to_json() for row in table.rows]})
        record.write("compare", made, cost={}, files=files, facts={"costs": costs})
        return table


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _methods(matrix: MatrixSection) -> list[MatrixMethod]:
    methods = [
        m if isinstance(m, MatrixMethod) else MatrixMethod(name=m, method=m) for m in matrix.methods
    ]
    if RANDOM not in [m.name for m in methods]:
        methods.insert(0, MatrixMethod(name=RANDOM, method=RANDOM))
    names = [m.name for m in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f'two methods of the matrix are called "{twice[0]}"',
            where="matrix.methods",
            why="a name is a row of the table",
            do="give them different names",
        )
    return methods


def _progress_line(
    cells: Mapping[tuple[str, str, int], _Cell], task: str, name: str, seed: int, base: Evaluation
) -> str:
    cell = cells[task, name, seed]
    return (
        f"{task} {name} seed {seed}: answer loss {cell.answers.answer_loss:.3f} "
        f"(base {base.answer_loss:.3f})"
    )


def _rows(
    grid: _Grid,
    cells: Mapping[tuple[str, str, int], _Cell],
    bases: Mapping[str, Evaluation],
) -> tuple[Row, ...]:
    seeds, n_boot = grid.matrix.seeds, grid.recipe.evaluate.intervals
    rows: list[Row] = []
    for task in grid.tasks:
        rows.append(_base_row(task, bases[task]))
        for method in grid.methods:
            mine = [cells[task, method.name, seed] for seed in seeds]
            random = [cells[task, RANDOM, seed].answers for seed in seeds]
            precisions = [c.precision for c in mine if c.precision is not None]
            row = _row(task, method.name, [c.answers for c in mine], random, bases[task], n_boot)
            rows.append(
                replace(
                    row,
                    precision=float(np.mean(precisions)) if precisions else None,
                    learning_rate=mine[0].learning_rate,
                    epochs=mine[0].epochs,
                    n_examples=mine[0].n_examples,
                )
            )
    if len(grid.tasks) > 1:
        base = together(bases)
        rows.append(_base_row(ALL_TASKS, base))
        random = [_all_tasks(grid, cells, RANDOM, seed) for seed in seeds]
        for method in grid.methods:
            mine = [_all_tasks(grid, cells, method.name, seed) for seed in seeds]
            rows.append(_row(ALL_TASKS, method.name, mine, random, base, n_boot))
    return tuple(rows)


def _all_tasks(
    grid: _Grid, cells: Mapping[tuple[str, str, int], _Cell], name: str, seed: int
) -> Evaluation:
    return together({task: cells[task, name, seed].answers for task in grid.tasks})


def _base_row(task: str, base: Evaluation) -> Row:
    return Row(
        task, BASE, base.answer_loss, base.accuracy, None, None, None, None, None, None, 0, 1,
        (base.answer_loss,),
    )  # fmt: skip


def _row(
    task: str,
    name: str,
    mine: Sequence[Evaluation],
    random: Sequence[Evaluation],
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
        loss_vs_random=None if name == RANDOM else against(random, "answer_loss"),
        accuracy_vs_random=against(random, "correct_norm")
        if has_options and name != RANDOM
        else None,
        loss_vs_base=against([base] * len(mine), "answer_loss"),
        learning_rate=None,
        epochs=None,
        n_examples=0,
        n_seeds=len(mine),
        per_seed=losses,
    )


def _told(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    mean, low, high = interval.mean_difference, interval.low, interval.high
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _markdown(line: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
