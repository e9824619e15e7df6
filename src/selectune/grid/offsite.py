"""Rows that a data owner would tune: on an emulator of the base, and plugged into it afterwards.

shared/emulator/<digest>/package, owner    an emulator, made once for all rows and seeds
shared/plugin/<digest>/                    what one training on it sends back

A recipe counts layers as its base does. An emulator may have fewer: what trains is renumbered when
it is there (`Made`), so that a grid can be planned, and refused, before any is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from selectune.adapters import load_tuned
from selectune.digests import digest
from selectune.errors import ConfigError
from selectune.evaluation import Evaluation, Metric
from selectune.files import MANIFEST, is_complete, sha256_file
from selectune.grid.table import Cells
from selectune.models import (
    Base,
    blocks,
    choose_device,
    choose_precision,
    load_base,
    model_is_package,
)
from selectune.offsite.emulate import OWNER, PACKAGE
from selectune.offsite.emulator import original_name
from selectune.offsite.layout import Layout
from selectune.offsite.manifests import OwnerRecord, Terms
from selectune.offsite.package import KIND, OWNER_KIND
from selectune.offsite.plugin import plug, read_owner
from selectune.offsite.plugin_files import KIND as PLUGIN
from selectune.offsite.plugin_saving import save_plugin
from selectune.offsite.table import Offsite, OffsiteTable, offsite_table
from selectune.pipeline.answered import Questions, Respondent, rank_options
from selectune.pipeline.arms import TunedArm
from selectune.pipeline.emulation import Emulation
from selectune.pipeline.ground import Ground
from selectune.pipeline.prepare import DemoNames
from selectune.progress import Progress, Silent
from selectune.recipe import (
    AdapterSection,
    EmulateSection,
    MatrixMethod,
    OwnerRecipe,
    Recipe,
    TuneChoice,
    TuneSection,
)
from selectune.recipe.package import Limits, fitted, limited
from selectune.report.emulator_facts import EmulatorFacts
from selectune.report.emulator_frontier import write_frontier

ByTask = Mapping[str, Evaluation]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """An emulator that is there.

    Attributes:
        package: as the data owner has it.
        owner: what the model's owner keeps.
        record: read from there.
    """

    package: Path
    owner: Path
    record: OwnerRecord

    def adapter(self, section: AdapterSection) -> AdapterSection:
        """Return an adapter section with the base's layers counted as in the emulator."""
        if section.layers is None:
            return section
        return section.model_copy(update={"layers": [self._place[j] for j in section.layers]})

    def tuning(self, section: TuneSection) -> TuneSection:
        """Return the same of what is tuned; single weights are named in full by now."""
        changes: dict[str, Any] = {}
        if section.adapter is not None:
            changes["adapter"] = self.adapter(section.adapter)
        if section.weights is not None:
            own = {
                original_name(name, self.record.blocks, self.record.positions): name
                for name in self.record.adapter
            }
            names = [own[name] for name in section.weights.options["eligible"]]
            options = {**section.weights.options, "eligible": names}
            changes["weights"] = section.weights.model_copy(update={"options": options})
        return section.model_copy(update=changes)

    @property
    def _place(self) -> dict[int, int]:
        return {self.record.positions[i]: i for i in self.record.adapter_layers}


class Emulators:
    """The emulators of a grid, what was tuned on them, and what all of these answered.

    Args:
        recipe: of the grid, its rows from `fitted_rows`.
        openly: the ground of a seed; its base is what emulators are made of.
        progress: told of every long step.
    """

    def __init__(self, recipe: Recipe, openly: Ground, progress: Progress) -> None:
        self._recipe, self._openly, self._progress = recipe, openly, progress
        self._made: dict[str, Made] = {}
        # By row and seed, then by task: the answers of the emulator untouched, and tuned.
        self._answers: dict[tuple[str, int], tuple[dict[str, Evaluation], dict[str, Evaluation]]]
        self._answers = {}

    def refuse_unworkable(self, rows: Sequence[MatrixMethod]) -> None:
        """Refuse emulators that cannot be made, before any is.

        Raises:
            SelectuneError: as `Emulation.plan`.
        """
        for row in rows:
            if row.emulate is not None:
                _emulation(self._recipe, row.emulate, Path(), self._progress).plan()

    def of(self, row: MatrixMethod) -> Made:
        """Return the emulator of a row: made, gone on with, or found."""
        section = _section(row)
        asked = section.model_dump_json()
        if asked not in self._made:
            model = self._recipe.model
            emulation = _emulation(self._recipe, section, Path(), self._progress)
            facts = {
                "base": self._openly.base_fingerprint,
                "emulate": section.model_dump(mode="json"),
                "precision": choose_precision(model.dtype, choose_device(model.device)),
                "seed": self._recipe.seed,
                **emulation.inputs,
            }
            out = self._openly.place("emulator", "emulator", digest(facts))
            package, owner = out / PACKAGE, out / OWNER
            with self._openly.making(out):
                if not (is_complete(package, KIND) and is_complete(owner, OWNER_KIND)):
                    self._progress.note(f"the emulator of {row.name} is made")
                    _emulation(self._recipe, section, out, self._progress).emulate()
            self._made[asked] = Made(package, owner, read_owner(owner))
        return self._made[asked]

    def recipe(self, row: MatrixMethod) -> Recipe:
        """Return the data owner's recipe: the emulator is its base, and the row what it tunes."""
        made, recipe = self.of(row), self._recipe
        adapter = _counted(recipe.adapter, made.record.n_layers)
        changes = {
            "model": recipe.model.model_copy(update={"base": str(made.package), "revision": None}),
            "adapter": made.adapter(adapter),
            "tune": made.tuning(_tuning(recipe, row)),
            "matrix": None,
        }
        return fitted(recipe.model_copy(update=changes))

    def plugged(self, ground: Ground, row: MatrixMethod, arm: TunedArm, label: str) -> Respondent:
        """Return the base with what was tuned in it.

        Args:
            ground: of the row.
            row: with an emulator.
            arm: tuned on it.
            label: of the cell, for progress and prices.
        """
        made, openly = self.of(row), self._openly

        @cache
        def load() -> tuple[Base, nn.Module]:
            # A plugin fits the weights as they are stored; asked is the base as the grid holds it.
            base = openly.base()
            section = openly.assets.model.model_copy(update={"device": "cpu"})
            original = load_base(section, adapter=AdapterSection(), as_stored=True).model
            plug(original, _plugin(ground, made, arm), made.owner)
            base.model.load_state_dict(original.state_dict())
            return base, base.model

        layers = [made.record.positions[i] for i in made.record.adapter_layers]
        return Respondent(label, arm.path, load, f"{openly.base_fingerprint} at {layers}")

    def ask(
        self,
        ground: Ground,
        row: MatrixMethod,
        arm: TunedArm,
        questions: Questions,
        *,
        label: str,
        seed: int,
    ) -> ByTask:
        """Ask an emulator, untouched and tuned, and return what the tuned one answers.

        Args:
            ground: of the row.
            row: with an emulator.
            arm: tuned on it.
            questions: of the tasks that it was tuned for.
            label: of the cell, for progress and prices.
            seed: of the run.
        """
        models = (f"emulator of {row.name}", None), (f"{label}, emulator", arm.path)
        untouched, tuned = (
            rank_options(ground, Respondent.arm(ground, name, path), questions)
            for name, path in models
        )
        kept = self._answers.setdefault((row.name, seed), ({}, {}))
        kept[0].update(untouched)
        kept[1].update(tuned)
        return tuned

    def tables(
        self, rows: Sequence[MatrixMethod], cells: Cells, bases: ByTask, *, n_boot: int
    ) -> list[OffsiteTable]:
        """Return what tuning on emulators won, by answer loss, and by accuracy where there is one.

        A row in the open that chooses and trains the same stands beside: FT-adapter where it trains
        the same layers, FT where it trains all of them.

        Args:
            rows: of the grid.
            cells: what was trained, by task, row and seed.
            bases: the base's answers, by task.
            n_boot: draws behind an interval.
        """
        emulated = [row for row in rows if row.emulate is not None]
        if not emulated:
            return []

        def of(name: str, seed: int) -> ByTask:
            return {task: cells[task, name, seed].answers for task in bases}

        def found(row: MatrixMethod, metric: Metric) -> OffsiteTable:
            seeds = [seed for name, seed in self._answers if name == row.name]
            mine = {
                (row.name, seed): Offsite(*self._answers[row.name, seed], of(row.name, seed))
                for seed in seeds
            }
            whole, only = (
                None if name is None else {seed: of(name, seed) for seed in seeds}
                for name in self._in_the_open(row, rows)
            )
            return offsite_table(
                mine, bases, ft=whole, ft_adapter=only, metric=metric, n_boot=n_boot
            )

        metrics: list[Metric] = ["answer_loss"]
        if all(base.accuracy is not None for base in bases.values()):
            metrics.append("correct_norm")
        return [
            OffsiteTable(m, tuple(one for row in emulated for one in found(row, m).rows))
            for m in metrics
        ]

    def facts(self, rows: Sequence[MatrixMethod]) -> dict[str, Any]:
        """Return what the owner knows of each row's emulator, but scores and spectra."""
        told: dict[str, Any] = {}
        for row in rows:
            if row.emulate is not None:
                made = self.of(row)
                about = {k: v for k, v in made.record.about.items() if k != "layers"}
                told[row.name] = {"package": str(made.package), "owner": str(made.owner), **about}
        return told

    def write_page(
        self, rows: Sequence[MatrixMethod], tables: Sequence[OffsiteTable]
    ) -> Path | None:
        """Write the owner's page on several emulators, and return its path.

        Args:
            rows: of the grid.
            tables: from `tables`.

        Returns:
            None where there are not several, or they were not judged on one probe.
        """
        found = {
            row.name: EmulatorFacts.of(self.of(row).record.model_dump(mode="json"))
            for row in rows
            if row.emulate is not None
        }
        losses = {round(one.quality["losses_nats"]["original"], 6) for one in found.values()}
        if len(found) < 2 or len(losses) > 1:
            return None
        return write_frontier(self._openly.out / "emulators", found, tables[0])

    def _in_the_open(
        self, row: MatrixMethod, rows: Sequence[MatrixMethod]
    ) -> tuple[str | None, str | None]:
        """Return the rows that train all layers of the base, and the same layers, in the open."""
        n_layers = self.of(row).record.n_layers
        mine = _tuning(self._recipe, row)
        whole: str | None = None
        only: str | None = None
        for other in rows:
            if other.emulate is not None or _choice(other) != _choice(row):
                continue
            tuning = _tuning(self._recipe, other)
            adapter = tuning.adapter
            if adapter is None and tuning.weights is None:
                adapter = self._recipe.adapter
            if adapter is None or mine.adapter is None:
                continue
            counted = _counted(adapter, n_layers)
            tuning = tuning.model_copy(update={"adapter": counted})
            if tuning == mine:
                only = other.name
            everywhere = mine.adapter.model_copy(update={"layers": None})
            if tuning == mine.model_copy(update={"adapter": everywhere}):
                whole = other.name
        return whole, only


def fitted_rows(recipe: Recipe) -> Recipe:
    """Return the recipe with what its rows on emulators train written out, as base layers.

    Raises:
        ConfigError: a row trains what cannot be plugged in, or its base is an emulator already.
        SelectionError: there is no such layer.
    """
    matrix = recipe.matrix
    rows = [] if matrix is None else matrix.methods
    emulated = [row for row in rows if not isinstance(row, str) and row.emulate is not None]
    if matrix is None or not emulated:
        return recipe
    if model_is_package(DemoNames().path(recipe.model.base)):
        raise ConfigError(
            "an emulator is not made of an emulator",
            where="matrix.methods",
            why=f"{recipe.model.base} is a package, and a row makes an emulator of model.base",
            do="name the model itself as model.base, or remove emulate from the row",
        )
    bare = _emulation(recipe, _section(emulated[0]), Path(), None).outline()
    rows = [row if isinstance(row, str) else _fitted(recipe, row, bare) for row in rows]
    return recipe.model_copy(update={"matrix": matrix.model_copy(update={"methods": rows})})


def _fitted(recipe: Recipe, row: MatrixMethod, bare: nn.Module) -> MatrixMethod:
    if row.emulate is None:
        return row
    terms = Terms.model_validate_json(row.emulate.terms.model_dump_json())
    n_layers = len(blocks(bare))
    layers = Layout.of(n_layers, row.emulate.adapters).adapters
    limits = Limits(layers, terms, lambda: bare, f'the row "{row.name}" trains an emulator')
    tune = _tuning(recipe, row)
    if tune.adapter is not None:
        tune = tune.model_copy(update={"adapter": _counted(tune.adapter, n_layers)})
    # Whether the recipe names an adapter at all is told from the fields that were set.
    changes: dict[str, Any] = {"tune": tune, "matrix": None}
    if recipe.adapter.layers is not None:
        changes["adapter"] = _counted(recipe.adapter, n_layers)
    alone = limited(recipe.model_copy(update=changes), limits)
    adapter = alone.tune.adapter
    if adapter is None and alone.tune.weights is None:
        adapter = alone.adapter
    own = TuneChoice(
        method=alone.tune.method,
        options=alone.tune.options,
        adapter=adapter,
        weights=alone.tune.weights,
        tokens=alone.tune.tokens,
        reselect_every=alone.tune.reselect_every,
    )
    return row.model_copy(update={"tune": own})


def _emulation(
    recipe: Recipe, section: EmulateSection, out: Path, progress: Progress | None
) -> Emulation:
    owners = OwnerRecipe(output=str(out), seed=recipe.seed, model=recipe.model, emulate=section)
    return Emulation(owners, progress or Silent())


def _plugin(ground: Ground, made: Made, arm: TunedArm) -> Path:
    """Return the folder that the data owner would send back."""
    facts = {"package": made.record.package, "arm": sha256_file(arm.path / MANIFEST)}
    out = ground.place("plugin", f"plugin/{arm.name}", digest(facts))
    with ground.making(out):
        if not is_complete(out, PLUGIN):
            save_plugin(load_tuned(ground.base(), arm.path), made.package, out)
    return out


def _tuning(recipe: Recipe, row: MatrixMethod) -> TuneSection:
    return recipe.tune if row.tune is None else row.tune.over(recipe.tune)


def _choice(row: MatrixMethod) -> dict[str, Any]:
    """Return what decides which examples a row trains on, and how long."""
    return row.model_dump(include={"method", "options", "epochs", "warmup"})


def _counted(section: AdapterSection, n_layers: int) -> AdapterSection:
    """Return an adapter section with its layers counted from the start."""
    if section.layers is None:
        return section
    layers = [j % n_layers if -n_layers <= j < n_layers else j for j in section.layers]
    return section.model_copy(update={"layers": sorted(layers)})


def _section(row: MatrixMethod) -> EmulateSection:
    assert row.emulate is not None
    return row.emulate
