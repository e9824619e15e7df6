"""What a comparison works with: its grounds, its choices, its trainings, its answers.

What cells have in common is done once: one warm-up and one gradient store per seed serve all
scorers and targets, equal selections are trained once, equal models asked once. Every piece lies in
`shared/` under the fingerprint of its inputs, so a killed grid goes on where it stopped.

With `matrix.tune`, learning rate and epochs are chosen for each method and task alike, by the
answer loss on a half of the target examples that neither selection nor training sees; the choice is
made on the first seed and kept for all. Held-out examples are never read for it. Rows may differ in
how they choose examples, in how they train (`tune`), or in both.

With `matrix.transfer` every model is trained on one task's own examples and tested on all tasks.

Each cell leaves its numbers and a recipe of its own as soon as it is done (`selectune.grid.cells`).
"""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selectune.data import Example, content_key
from selectune.errors import ConfigError, DataError, SelectionError, TrainingError
from selectune.evaluation import Evaluation, Generation
from selectune.evaluation.generic_text import GenericLoss
from selectune.evaluation.transfer import Scoring
from selectune.files import Alone, Hands, KillPoint, kill_point
from selectune.files.disk import remove
from selectune.grid.cells import cell_folder, chosen_scores, replay, write_cell
from selectune.grid.offsite import Emulators, fitted_rows
from selectune.grid.plan import Work, forecast
from selectune.grid.rows import references_of, rows_of
from selectune.grid.table import ALL_TASKS, Cell
from selectune.grid.text_table import TextRow, text_rows
from selectune.grid.transfer_table import TransferRow, transfer_rows
from selectune.models import choose_device
from selectune.pipeline.answered import Respondent, rank_options, read_text, write_answers
from selectune.pipeline.arms import BASE, TunedArm, choose, control_selection, source_of, tune_arm
from selectune.pipeline.foresee import refuse_unworkable
from selectune.pipeline.ground import Ground, digest
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.record import precision_input
from selectune.pipeline.reselection import Source
from selectune.pipeline.scoring import evidence_steps, score_pool, shares_passes
from selectune.pipeline.warmup import checkpoint_epochs, epochs_needed, epochs_run
from selectune.progress import Progress
from selectune.recipe import MatrixMethod, Recipe, TuneSection
from selectune.recipe.methods import FULL
from selectune.recipe.package import fitted
from selectune.selection import Scores, Selection

Tasks = tuple[str, ...]

# What one cell can fail of while the others can be made.
UNMADE = (SelectionError, TrainingError)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a method chose for some tasks together.

    Attributes:
        selection: the examples.
        scores: of all candidates; None where everything is taken.
        source: what it is chosen by again while a model trains; None where that changes nothing.
    """

    selection: Selection
    scores: Scores | None = None
    source: Source | None = None


class Grid:
    """The state of one comparison.

    Args:
        recipe: with a `matrix` section.
        out: folder of the grid.
        progress: told of every long step.
        hands: who makes what lies in `shared/`; None: this process.

    Raises:
        SelectuneError: the recipe has no matrix, or one that cannot be.
    """

    def __init__(
        self, recipe: Recipe, out: Path, progress: Progress, *, hands: Hands | None = None
    ) -> None:
        recipe = fitted_rows(fitted(recipe))
        if recipe.matrix is None:
            raise ConfigError("the recipe has no matrix", where="matrix", do="add matrix.methods")
        matrix = recipe.matrix
        self.recipe, self.matrix, self.out, self.progress = recipe, matrix, out, progress
        self.hands = hands or Alone()
        self.methods = rows_of(matrix, recipe.select.budget)
        self._grounds: dict[tuple[int, str], Ground] = {}
        self._settings: dict[tuple[str, Tasks], tuple[float, int]] = {}
        self.tried: list[dict[str, Any]] = []
        self.fast: list[dict[str, Any]] = []
        self.away: dict[Scoring, dict[tuple[str, str, str, int], Evaluation | Generation]] = {
            "likelihood": {},
            "generated": {},
        }
        self.read: dict[str, dict[tuple[str, int], GenericLoss]] = {}
        self._aside: dict[str, list[Example]] = {}
        first = self.ground(matrix.seeds[0])
        self.emulators = Emulators(recipe, first, progress)
        self.tasks = list(matrix.targets) or list(first.prepared.targets)
        asked = dict.fromkeys([*self.tasks, *self._elsewhere])
        missing = [task for task in asked if task not in first.prepared.heldout]
        if missing:
            raise ConfigError(
                f'task "{missing[0]}" has no held-out examples',
                where="data.heldout",
                why="a comparison is made on held-out examples",
                do=f"add data.heldout.{missing[0]}",
            )
        self._refuse_collisions()
        if self._is_round_robin and len(self._asked_by_option) < 2:
            progress.note(
                "no table of transfer: it counts right answers, and fewer than two tasks have "
                "options"
            )

    def ground(self, seed: int, method: MatrixMethod | None = None) -> Ground:
        """Return the ground of one seed; data and tokens are read once.

        Args:
            seed: of the run.
            method: a row that may have a warm-up, an adapter or an emulator of its own; None for
                the base with the sections warmup and adapter.
        """
        own = _own(method)
        rows = [m for m in self.methods if _own(m) == own]
        alike = [m for m in rows if method is None or m.select == method.select]
        is_plain = own == _own(None) and (method is None or method.select is None)
        key = seed, "" if is_plain else alike[0].name
        if key not in self._grounds:
            recipe = self.recipe
            if method is not None and method.emulate is not None:
                recipe = self.emulators.recipe(method)
            if method is not None and method.select is not None:
                recipe = recipe.model_copy(update={"select": method.select.over(recipe.select)})
            if method is not None and method.warmup is not None:
                recipe = recipe.model_copy(update={"warmup": method.warmup})
            if method is not None and method.adapter is not None:
                recipe = recipe.model_copy(update={"adapter": method.adapter})
            matrix = self.matrix.model_copy(update={"methods": rows})
            grid = recipe.model_copy(update={"matrix": matrix})
            # Checked already: without the matrix some of it would seem to be for nothing.
            alone = recipe.model_copy(update={"seed": seed, "matrix": None})
            ground = Ground(
                alone, self.out, shared=self.out / "shared", tasks=None,
                progress=self.progress, checkpoint_epochs=checkpoint_epochs(grid), asked=grid,
            )  # fmt: skip
            ground.hands = self.hands
            if self._grounds:
                ground.borrow(next(iter(self._grounds.values())))
            else:
                self.inputs = {
                    "data": ground.prepared.fingerprint,
                    "precision": precision_input(recipe.model),
                }
                if self.matrix.tune is not None:
                    self._hold_aside(ground)
            self._grounds[key] = ground
        return self._grounds[key]

    def training_ground(self, seed: int, method: MatrixMethod) -> Ground:
        """Return where a row trains: not where its gradients are taken, if that is by itself."""
        if method.adapter is None:
            return self.ground(seed, method)
        return self.ground(seed)

    @property
    def costs(self) -> dict[str, Any]:
        """What was worked once for many, by seed, and by row where a ground is its own."""
        return {
            f"{seed} {name}".strip(): dict(ground.costs)
            for (seed, name), ground in self._grounds.items()
        }

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

    def release(self, seed: int) -> None:
        """Let go of the evidence of a seed whose cells are done; it lies on disk."""
        for (own, _), ground in self._grounds.items():
            if own == seed:
                ground.stored = ground.states = None
                ground.passes.clear()

    @property
    def rows(self) -> list[tuple[Tasks, MatrixMethod]]:
        """Each method with the tasks that it is trained for together."""
        return list(itertools.product(self.groups, self.methods))

    @property
    def references(self) -> dict[str, str]:
        """What each row is compared with: random at its budget."""
        return references_of(self.methods, self.recipe.select.budget)

    @property
    def groups(self) -> list[Tasks]:
        """The tasks that share settings, a selection and a training."""
        if self.matrix.tune is not None and self.matrix.tune.choose == "all":
            return [tuple(self.tasks)]
        return [(task,) for task in self.tasks]

    def refuse_unworkable(self) -> None:
        """Refuse trainings and emulators that cannot be, before anything is made."""
        refuse_unworkable(self.ground(self.matrix.seeds[0]), self.tunings)
        self.emulators.refuse_unworkable(self.methods)

    @property
    def tunings(self) -> list[TuneSection]:
        """One way of training for each method."""
        return [self.tuning(method, *self.settings(method)[0]) for method in self.methods]

    def tuning(self, method: MatrixMethod, lr: float, epochs: int) -> TuneSection:
        """Return how a method's row is trained with one setting."""
        tune = self.recipe.tune if method.tune is None else method.tune.over(self.recipe.tune)
        return tune.model_copy(update={"learning_rate": lr, "epochs": epochs})

    def select(self, method: MatrixMethod, tasks: Tasks, seed: int) -> _Choice:
        """Return what a method chooses for some tasks together, and what it chooses by."""
        ground = self.ground(seed, method)
        if method.method == FULL:
            whole = control_selection(ground, FULL)
            return _Choice(self._own(whole, tasks) if self.transfers else whole)
        ground.focus(tasks)
        scores = score_pool(ground, method.method, dict(method.options))
        quotas = self._quotas(tasks) if self.transfers else None
        source = source_of(ground, method.method, method.options, scores=scores, quotas=quotas)
        return _Choice(choose(ground, scores, "", quotas=quotas), scores, source)

    @property
    def transfers(self) -> bool:
        """Whether models are tested on the tasks that they were not trained on."""
        return bool(self.matrix.transfer)

    @property
    def _elsewhere(self) -> Tasks:
        """The tasks that every model is tested on, whatever it was trained on."""
        transfer = self.matrix.transfer
        if isinstance(transfer, bool):
            return tuple(self.tasks) if transfer else ()
        return tuple(transfer)

    def tested(self, tasks: Tasks) -> Tasks:
        """Return what a model that was trained for some tasks is asked about."""
        # In the table's order where all are asked about, as every recipe of a cell has it.
        found = {*tasks, *self._elsewhere}
        return tuple(
            task for task in self.ground(self.matrix.seeds[0]).prepared.targets if task in found
        )

    def _own(self, selection: Selection, tasks: Tasks) -> Selection:
        """Return what of a selection comes from the tasks' own sources."""
        sources = self.ground(self.matrix.seeds[0]).prepared.sources
        own = {source for source, (_, most) in self._quotas(tasks).items() if most}
        return replace(selection, ids=tuple(i for i in selection.ids if sources[i] in own))

    def _quotas(self, tasks: Tasks) -> dict[str, tuple[float, float]]:
        """Return quotas that leave the tasks' own examples alone."""
        prepared = self.ground(self.matrix.seeds[0]).prepared
        own = {e.source for task in tasks for e in prepared.targets[task]}
        known = set(prepared.sources.values())
        if not own & known:
            raise DataError(
                f"the pool has no examples of {', '.join(tasks)} to train on",
                where="matrix.transfer",
                why=f"its sources are {', '.join(sorted(known))}, those of the target "
                f"{', '.join(sorted(own))}",
                do='give pool and target rows the same "source"',
            )
        return {source: (0.0, 1.0 if source in own else 0.0) for source in known}

    def train(
        self,
        method: MatrixMethod,
        tasks: Tasks,
        seed: int,
        setting: tuple[float, int],
        label: str,
    ) -> tuple[_Choice, TunedArm]:
        """Select and tune with one setting; equal work is found, not repeated."""
        choice = self.select(method, tasks, seed)
        ground = self.training_ground(seed, method)
        ground.focus(tasks)
        tuning = self.tuning(method, *setting)
        if method.emulate is not None:
            tuning = self.emulators.of(method).tuning(tuning)
        arm = tune_arm(ground, label, choice.selection, tuning=tuning, source=choice.source)
        # With Adam's state they weigh several times what they led to, and nothing resumes any more.
        with ground.making(arm.path.parent):
            for checkpoint in arm.path.parent.glob("checkpoint-*"):
                remove(checkpoint)
        return choice, arm

    def work(self) -> list[Work]:
        """Return every training, those that choose settings too."""
        first = self.matrix.seeds[0]
        found: list[Work] = []
        for tasks, method in self.rows:
            settings = self.settings(method)
            tunings = [self.tuning(method, *setting) for setting in settings]
            if len(settings) > 1:
                found += [Work(method, tasks, first, tuning, ()) for tuning in tunings]
            found += [
                Work(method, tasks, seed, tunings[0], self.tested(tasks))
                for seed in self.matrix.seeds
            ]
        return found

    def forecast(self) -> Outcome:
        """Return what the whole grid costs, as if none of it were done."""
        ground = self.ground(self.matrix.seeds[0])
        return forecast(ground, self.work(), transfers=self.transfers)

    def settings(self, method: MatrixMethod) -> list[tuple[float, int]]:
        """Return the learning rates and epochs to try for a method."""
        tune = self.recipe.tune
        grid = self.matrix.tune
        rates = grid.learning_rate if grid and grid.learning_rate else [tune.learning_rate]
        epochs = grid.epochs if grid and grid.epochs else [tune.epochs]
        if method.epochs is not None:
            epochs = [method.epochs]
        return list(itertools.product(rates, epochs))

    def setting(self, method: MatrixMethod, tasks: Tasks) -> tuple[float, int]:
        """Return the setting with the lowest answer loss on the targets held aside."""
        if (method.name, tasks) not in self._settings:
            self._settings[method.name, tasks] = self._chosen(method, tasks)
        return self._settings[method.name, tasks]

    def _chosen(self, method: MatrixMethod, tasks: Tasks) -> tuple[float, int]:
        settings = self.settings(method)
        if len(settings) == 1:
            return settings[0]
        losses = {setting: self.trial(method, tasks, setting) for setting in settings}
        self.tried += [
            {
                "method": method.name,
                "tasks": list(tasks),
                "learning_rate": rate,
                "epochs": epochs,
                "answer_loss": loss if math.isfinite(loss) else None,
            }
            for (rate, epochs), loss in losses.items()
        ]
        best = min(losses, key=lambda key: (losses[key], key))
        if not math.isfinite(losses[best]):
            raise TrainingError(
                f"{method.name} trains with no learning rate that was tried",
                where=f"matrix.tune, on {', '.join(tasks)}",
                why="every training ended in numbers that are none, or moved no weight",
                do="give matrix.tune.learning_rate other values, or set model.dtype=float32",
            )
        return best

    def trial(self, method: MatrixMethod, tasks: Tasks, setting: tuple[float, int]) -> float:
        """Return the answer loss that a setting reaches on the targets held aside.

        It is infinite where training fails: such a setting is the worst, and no reason to stop.
        """
        seed, (rate, epochs) = self.matrix.seeds[0], setting
        label = f"{method.name} lr {rate:g} epochs {epochs}"
        try:
            _, arm = self.train(method, tasks, seed, setting, label)
            ground = self.training_ground(seed, method)
            questions = {task: self._aside[task] for task in tasks}
            answers = rank_options(ground, Respondent.arm(ground, label, arm.path), questions)
        except TrainingError as error:
            self.progress.note(f"{label} on {', '.join(tasks)} is out of the race: {error.what}")
            return math.inf
        # Tasks count alike, however many targets they have.
        return float(np.mean([e.answer_loss for e in answers.values()]))

    def gather(self, seed: int) -> None:
        """Take the gradients that the scorers of a seed read, one pass after the other.

        Processes that share a pass have to come to it at the same time, and find it there later.
        """
        for method in self.methods:
            if method.method != FULL and shares_passes(method.method):
                ground = self.ground(seed, method)
                ground.focus(self.groups[0])
                with suppress(*UNMADE):  # told with the cells that want it
                    score_pool(ground, method.method, dict(method.options))

    @property
    def _base(self) -> Respondent:
        return Respondent.arm(self.ground(self.matrix.seeds[0]), BASE, None)

    def bases(self) -> dict[str, Evaluation]:
        """Return what the untouched base answers, by task."""
        ground = self.ground(self.matrix.seeds[0])
        questions = {task: ground.prepared.heldout[task] for task in self.tasks}
        return rank_options(ground, self._base, questions)

    def ask_base(self) -> None:
        """Ask the untouched base all that the tables want of it."""
        self.bases()
        if self.recipe.evaluate.generate and self._is_round_robin:
            self._written_by_base(self._asked_by_option)
        if self.reads_text:
            read_text(self.ground(self.matrix.seeds[0]), self._base)

    def cells(self, method: MatrixMethod, tasks: Tasks, seed: int) -> dict[str, Cell]:
        """Select, train and evaluate for some tasks together, or read what is there."""
        setting = self.setting(method, tasks)
        label = " ".join([method.name, *(tasks if len(tasks) == 1 else ()), f"seed {seed}"])
        choice, arm = self.train(method, tasks, seed, setting, label)
        ground, selection = self.training_ground(seed, method), choice.selection
        prepared = ground.prepared
        if method.emulate is None:
            model = Respondent.arm(ground, label, arm.path)
        else:
            model = self.emulators.plugged(ground, method, arm, label)
        tested = self.tested(tasks)
        questions = {task: prepared.heldout[task] for task in tested}
        answers = rank_options(ground, model, questions)
        self._keep(method, tasks, seed, answers, "likelihood")
        facts: dict[str, Any] = {"likelihood": _told(answers)}
        if method.emulate is not None:
            own = {task: questions[task] for task in tasks}
            tuned = self.emulators.ask(ground, method, arm, own, label=label, seed=seed)
            facts["on_emulator"] = _told(tuned)
        if self.recipe.evaluate.generate:
            written = write_answers(ground, model, questions)
            self._keep(method, tasks, seed, written, "generated")
            facts["generated"] = _told(written)
        if self.reads_text:
            read = read_text(ground, model)
            self.read.setdefault(method.name, {})[tasks[0], seed] = read
            facts["text_nats_per_token"] = read.nats_per_token
        rate, epochs = setting
        seconds = arm.result.seconds / arm.result.n_steps
        about = {"method": method.name, "tasks": tasks, "seed": seed, "learning_rate": rate,
                 "epochs": epochs, "n_examples": arm.n_examples, "seconds_per_step": seconds,
                 "selection": digest({"ids": selection.ids}),
                 "reselected": [asdict(refresh) for refresh in arm.refreshes]}  # fmt: skip
        folder = cell_folder(self.out, method.name, tasks, seed)
        whole, row = self._of_cell(method)
        alone = replay(whole, folder, row, tasks=tasks, tested=tested, seed=seed, setting=setting)
        chosen = None if choice.scores is None else chosen_scores(choice.scores, selection)
        write_cell(folder, {**about, **facts}, alone, chosen)
        kill_point(KillPoint.CELL_DONE)
        if choice.scores is not None and "fast" in choice.scores.about:
            alike = choice.scores.about["fast"]
            told = {key: alike[key] for key in ("settings", "n_probe", "spearman")}
            self.fast.append({"method": method.name, "tasks": list(tasks), "seed": seed, **told})
        sources = [prepared.sources[i] for i in selection.ids]
        known = set(prepared.sources.values())
        found: dict[str, Cell] = {}
        for task in tasks:
            own = {e.source for e in prepared.targets[task]}
            is_known = bool(own & known)
            found[task] = Cell(
                answers[task],
                sum(s in own for s in sources) / len(sources) if is_known else None,
                arm.n_examples,
                *setting,
                seconds_per_step=seconds,
                seconds=arm.result.seconds + self._seconds_before(seed, method, label),
                peak_bytes=arm.result.peak_bytes if self.is_measured else None,
            )
        return found

    def _of_cell(self, method: MatrixMethod) -> tuple[Recipe, MatrixMethod]:
        """Return recipe and row that make a cell anew; on an emulator, the data owner's half."""
        if method.emulate is None:
            return self.recipe, method
        alone = self.emulators.recipe(method).model_copy(update={"matrix": self.matrix})
        return alone, method.model_copy(update={"emulate": None, "tune": None})

    def _seconds_before(self, seed: int, method: MatrixMethod, label: str) -> float:
        """Return what a method's evidence cost, as if no other had shared it."""
        ground = self.ground(seed, method)
        steps = [f"weights {label}"]
        # Beside a scorer of later epochs the warm-up goes on, which is not this one's to pay.
        share = {"warmup": 1.0}
        if method.method != FULL:
            options = dict(method.options)
            steps += evidence_steps(ground.recipe, method.method, options)
            share["warmup"] = epochs_needed(ground.recipe, method.method, options) / max(
                1, epochs_run(ground)
            )
        costs = {**self.training_ground(seed, method).costs, **ground.costs}
        steps += [step for step in costs if re.fullmatch(rf"refresh \d+ {re.escape(label)}", step)]
        return float(sum(costs[s]["seconds"] * share.get(s, 1.0) for s in steps if s in costs))

    def _keep(
        self,
        method: MatrixMethod,
        tasks: Tasks,
        seed: int,
        answers: Mapping[str, Evaluation | Generation],
        scoring: Scoring,
    ) -> None:
        if self.transfers:
            for tested, found in answers.items():
                self.away[scoring][method.name, tasks[0], tested, seed] = found

    def transfer_table(self, bases: Mapping[str, Evaluation]) -> list[TransferRow]:
        """Return what training on one task did to the others; nothing unless asked for."""
        tasks = self._asked_by_option
        if not self._is_round_robin or len(tasks) < 2:
            return []
        untouched: dict[Scoring, Mapping[str, Evaluation | Generation]] = {
            "likelihood": {task: bases[task] for task in tasks}
        }
        if self.recipe.evaluate.generate:
            untouched["generated"] = self._written_by_base(tasks)
        return [
            row
            for scoring, base in untouched.items()
            for row in transfer_rows(
                self.away[scoring],
                base,
                scoring=scoring,
                methods=[method.name for method in self.methods],
                seeds=self.matrix.seeds,
                references=self.references,
                n_boot=self.recipe.evaluate.intervals,
            )
        ]

    def _written_by_base(self, tasks: Sequence[str]) -> dict[str, Generation]:
        ground = self.ground(self.matrix.seeds[0])
        questions = {task: ground.prepared.heldout[task] for task in tasks}
        return write_answers(ground, self._base, questions)

    @property
    def _is_round_robin(self) -> bool:
        """Whether models are tested on the tasks that all of them are trained on."""
        return self.transfers and set(self._elsewhere) == set(self.tasks)

    @property
    def _asked_by_option(self) -> list[str]:
        """The tasks whose held-out questions have options, which can be answered rightly."""
        heldout = self.ground(self.matrix.seeds[0]).prepared.heldout
        limit = self.recipe.evaluate.limit
        return [t for t in self.tasks if any(e.options for e in heldout[t][:limit])]

    def _refuse_collisions(self) -> None:
        """Refuse names that the table needs for itself, and cells that would share a folder."""
        if ALL_TASKS in self.tasks:
            raise ConfigError(
                f'a task is called "{ALL_TASKS}"',
                where="data.target",
                why="that is the row of all tasks together",
                do="give the task another name",
            )
        folders: dict[Path, str] = {}
        for tasks, method in self.rows:
            folder = cell_folder(self.out, method.name, tasks, self.matrix.seeds[0])
            cell = f"{method.name} on {', '.join(tasks)}"
            if folder in folders:
                raise ConfigError(
                    f"two cells would share a folder: {folders[folder]}, and {cell}",
                    where="matrix.methods",
                    why=f"both come out as {folder.name}",
                    do="give a method another name",
                )
            folders[folder] = cell

    @property
    def reads_text(self) -> bool:
        """Whether models read plain text too."""
        return self.recipe.evaluate.text is not None

    def text_table(self) -> list[TextRow]:
        """Return what training did to plain text; nothing unless asked for."""
        if not self.reads_text:
            return []
        return text_rows(
            {method: list(found.values()) for method, found in self.read.items()},
            read_text(self.ground(self.matrix.seeds[0]), self._base),
            references=self.references,
            n_boot=self.recipe.evaluate.intervals,
        )

    @property
    def is_measured(self) -> bool:
        """Whether the memory of one training is known: on a CPU only that of the whole process."""
        return choose_device(self.recipe.model.device).type != "cpu"


def _own(method: MatrixMethod | None) -> tuple[object, ...]:
    """Return what a row has of its own that a ground depends on; of None, nothing."""
    if method is None:
        return None, None, None
    return method.warmup, method.adapter, method.emulate


def _told(answers: Mapping[str, Evaluation | Generation]) -> dict[str, Any]:
    return {task: found.to_json() for task, found in answers.items()}


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
