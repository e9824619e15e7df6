"""The warm-up, and the checkpoints at which gradients are taken.

One training serves all scorers of a run: `gist` and its like read the end of epoch
`warmup.epochs`, `less` and `tracin` the end of every epoch up to their own last one. Who names an
adapter (`model.adapter`) brings checkpoints instead.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from selectune.adapters import add_adapter, load_adapter
from selectune.errors import ConfigError
from selectune.files import KillPoint, kill_point, open_dir
from selectune.files.disk import remove
from selectune.gradients.adam import Moments
from selectune.methods.evidence import ReadsCheckpoints
from selectune.models import Base
from selectune.pipeline.ground import Ground, digest
from selectune.recipe import Recipe, TuneSection
from selectune.recipe.methods import FULL, PLAIN
from selectune.registry import Entry, get
from selectune.training.checkpoints import KIND
from selectune.training.overlap import UntilOverlap
from selectune.training.trainer_folder import (
    TrainerCheckpoint,
    checkpoint_folders,
    put_weights,
    read_moments,
    trainer_checkpoints,
)


def scorers(recipe: Recipe) -> Iterator[tuple[Entry, Mapping[str, Any]]]:
    """Yield the data scorers that a recipe names, with their options."""
    named: list[tuple[str, Mapping[str, Any]]] = [
        (row, {}) if isinstance(row, str) else (row.method, row.options)
        for row in (recipe.matrix.methods if recipe.matrix else ())
    ]
    if recipe.matrix is None:
        named = [(recipe.score.method, recipe.score.options)]
        named += [(name, {}) for name in recipe.tune.controls]
    for name, options in named:
        if name not in (FULL, PLAIN):
            yield get("data_scorer", name), options


def epochs_read(recipe: Recipe, options: ReadsCheckpoints) -> int:
    """Return how many epochs of the warm-up a scorer reads.

    Raises:
        ConfigError: more than the schedule has.
    """
    section = recipe.warmup
    n = section.schedule_epochs if options.epochs is None else options.epochs
    if n > section.schedule_epochs:
        raise ConfigError(
            f"{n} checkpoints of a warm-up of {section.schedule_epochs} epochs",
            where="score.options.epochs",
            why="there is one checkpoint per epoch, and warmup.schedule_epochs epochs",
            do=f"use at most {section.schedule_epochs}, or raise warmup.schedule_epochs",
        )
    return n


def checkpoint_epochs(recipe: Recipe) -> int:
    """Return how many epochs have to end in a checkpoint, for all scorers of a recipe together.

    Returns:
        0 where none of them reads checkpoints, or the user's own are read.

    Raises:
        ConfigError: a scorer reads more than the schedule has, or its options are wrong.
    """
    if recipe.model.adapter is not None:
        return 0
    return max(
        (
            epochs_read(recipe, entry.parse(dict(options)))
            for entry, options in scorers(recipe)
            if "checkpoints" in entry.needs
        ),
        default=0,
    )


def epochs_needed(recipe: Recipe, name: str, options: Mapping[str, Any]) -> int:
    """Return how many epochs of the warm-up a scorer needs by itself.

    Args:
        recipe: of the run.
        name: of the scorer.
        options: its options, as the recipe gives them.
    """
    entry = get("data_scorer", name)
    if "checkpoints" not in entry.needs or recipe.model.adapter is not None:
        return recipe.warmup.epochs
    return max(recipe.warmup.epochs, epochs_read(recipe, entry.parse(dict(options))))


def epochs_run(ground: Ground) -> int:
    """Return how many epochs the warm-up of a run takes."""
    return max(ground.recipe.warmup.epochs, _kept(ground))


def keep_epochs(ground: Ground, n: int) -> None:
    """Let at least n epochs of the warm-up end in a checkpoint that is kept."""
    ground.checkpoint_epochs = max(_kept(ground), n)


def _kept(ground: Ground) -> int:
    if ground.checkpoint_epochs is None:
        ground.checkpoint_epochs = checkpoint_epochs(ground.recipe)
    return ground.checkpoint_epochs


def warmup_ids(ground: Ground) -> list[str]:
    """Return the random share of the pool that the adapter is warmed up on, in drawn order."""
    seed = ground.recipe.seed
    drawn = sorted(
        (hashlib.sha256(f"warmup:{seed}:{t.id}".encode()).digest(), t.id)
        for t in ground.tokens.pool
    )
    n = max(1, round(ground.recipe.warmup.fraction * len(drawn)))
    return [example_id for _, example_id in drawn[:n]]


def n_warmup_steps(ground: Ground) -> int:
    """Return how many steps lead to the adapter at which gradients are taken, at most."""
    tuning = ground.recipe.tune
    per_epoch = -(-len(warmup_ids(ground)) // (tuning.batch_size * tuning.accumulation))
    return per_epoch * ground.recipe.warmup.epochs


class Warmed:
    """A model that can be put at each checkpoint of its training.

    Args:
        model: trainable as the recipe says.
        checkpoints: oldest first; empty where nothing was trained.
        is_ours: whether a manifest of ours seals them.
    """

    def __init__(
        self, model: nn.Module, checkpoints: list[TrainerCheckpoint], *, is_ours: bool
    ) -> None:
        self.model, self.checkpoints, self._is_ours = model, checkpoints, is_ours

    def at(self, k: int) -> nn.Module:
        """Return the model with the weights of checkpoint k.

        Raises:
            CorruptFileError: the checkpoint is not what its manifest says.
        """
        put_weights(self.model, self._checked(k))
        return self.model

    def moments(self, k: int) -> dict[str, Moments]:
        """Return Adam's moments at checkpoint k.

        Raises:
            ConfigError: they were not kept.
        """
        return read_moments(self.model, self._checked(k))

    def _checked(self, k: int) -> Path:
        path = self.checkpoints[k].path
        if self._is_ours:
            open_dir(path, kind=KIND)
        return path


def n_checkpoints(recipe: Recipe, options: ReadsCheckpoints) -> int:
    """Return at how many checkpoints a scorer takes gradients.

    Raises:
        ConfigError: more than there are.
    """
    if recipe.model.adapter is None:
        return epochs_read(recipe, options)
    return len(checkpoint_folders(recipe.model.adapter, options.epochs))


def own_checkpoints(ground: Ground, base: Base, n: int) -> Warmed:
    """Return the first n checkpoints of the user's own training, which `model.adapter` names."""
    adapter = ground.recipe.model.adapter
    assert adapter is not None
    found = trainer_checkpoints(adapter, n)
    return Warmed(load_adapter(base, found[0].path), found, is_ours=False)


def warmed_model(ground: Ground, base: Base) -> nn.Module:
    """Return the model at the checkpoint where gradients are taken, trainable as the recipe says.

    That is the user's own adapter, or the adapter after its warm-up, or at its start where
    `warmup.epochs` is 0.
    """
    recipe = ground.recipe
    if recipe.model.adapter is not None:
        return load_adapter(base, recipe.model.adapter)
    if recipe.warmup.epochs == 0:
        return add_adapter(base.model, recipe.adapter, seed=recipe.seed)
    if _kept(ground):
        return warm_up(ground, base).at(recipe.warmup.epochs - 1)
    return warm_up(ground, base).model


def warmup_tuning(recipe: Recipe) -> TuneSection:
    """Return how the adapter of a recipe is warmed up.

    Plainly: scores are about the examples, not about how they will be trained on.
    """
    section = recipe.warmup
    rate = recipe.tune.learning_rate if section.learning_rate is None else section.learning_rate
    changes = {"epochs": section.schedule_epochs, "learning_rate": rate}
    return recipe.tune.of_section_adapter().model_copy(update=changes)


def warm_up(ground: Ground, base: Base) -> Warmed:
    """Train the adapter on its share of the pool, resume, or read what is finished.

    Returns:
        The model at the last epoch; its checkpoints, one per epoch, where a scorer reads them.

    Raises:
        CorruptFileError: a checkpoint is damaged.
    """
    recipe = ground.recipe
    model = add_adapter(base.model, recipe.adapter, seed=recipe.seed)
    n_epochs, keeps = epochs_run(ground), _kept(ground) > 0
    options = warmup_tuning(recipe)
    if keeps:
        options = options.model_copy(update={"save_every": None, "keep_checkpoints": n_epochs})
    fingerprint = digest(
        {
            "base": base.fingerprint,
            "adapter": recipe.adapter.model_dump(),
            "warmup": recipe.warmup.model_dump(),
            "pool": ground.tokens.fingerprint,
            "seed": recipe.seed,
            "tasks": None
            if recipe.warmup.until == "epochs"
            else {task: len(tokens) for task, tokens in ground.tokens.targets.items()},
        }
    )
    path = ground.place("warmup", "warmup", digest({"w": fingerprint, "t": options.model_dump()}))
    items = [ground.tokens.by_id[i] for i in warmup_ids(ground)]
    n_steps = -(-len(items) // (options.batch_size * options.accumulation))
    with ground.making(path / "adapter"):
        if keeps and _lacks_checkpoints(path, n_steps, n_epochs):
            remove(path)  # of a run whose scorers read none
        result = ground.train(
            model,
            items,
            options,
            path=path,
            fingerprint=fingerprint,
            name="warm-up",
            target=[t for tokens in ground.tokens.targets.values() for t in tokens],
            stop_after_epochs=n_epochs,
            method=_until_overlap(ground, path / "directions"),
        )
        shutil.rmtree(path / "directions", ignore_errors=True)
        kill_point(KillPoint.WARMUP_DONE)
    ground.costs["warmup"] = {"seconds": result.seconds, "peak_bytes": result.peak_bytes}
    if result.records:
        found = [
            facts["overlap"] for _, facts in result.records if facts.get("overlap") is not None
        ]
        ground.costs["warmup"] |= {"n_steps": result.n_steps, "overlaps": found}
    return Warmed(model, trainer_checkpoints(path) if keeps else [], is_ours=True)


def _until_overlap(ground: Ground, folder: Path) -> UntilOverlap | None:
    """Return what ends the warm-up early, None where it has a fixed length."""
    section = ground.recipe.warmup
    if section.until == "epochs":
        return None
    return UntilOverlap(
        every=section.overlap_every,
        above=section.overlap,
        times=section.overlap_times,
        tasks=tuple(task for task, tokens in ground.tokens.targets.items() for _ in tokens),
        folder=folder,
    )


def _lacks_checkpoints(path: Path, n_steps: int, n_epochs: int) -> bool:
    """Return whether a training has gone past the end of an epoch without keeping it."""
    is_done = (path / "adapter").exists()
    there = {p.name for p in path.glob("checkpoint-*")}
    last = n_epochs * n_steps if is_done else max((int(n[11:]) for n in there), default=0)
    return any(f"checkpoint-{end}" not in there for end in range(n_steps, last + 1, n_steps))
