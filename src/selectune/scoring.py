"""Warm-up, gradient pass and scorers: from a pool to one table of scores."""

import hashlib
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from selectune.adapters import adapter_fingerprint, add_adapter, load_adapter
from selectune.errors import IncompatibleRunError, SelectionError
from selectune.files import KillPoint, kill_point, open_dir, staged
from selectune.gradients.engine import GradientEngine, pool_losses
from selectune.gradients.store import GradientStore, StoredPool, Target
from selectune.ground import Ground, digest
from selectune.methods.evidence import Evidence
from selectune.models import Base, trainable_fingerprint
from selectune.recipe import Recipe
from selectune.registry import Entry, get
from selectune.selection import Scores


def warmup_ids(ground: Ground) -> list[str]:
    """Return the random share of the pool that the adapter is warmed up on, in drawn order."""
    seed = ground.recipe.seed
    drawn = sorted(
        (hashlib.sha256(f"warmup:{seed}:{t.id}".encode()).digest(), t.id)
        for t in ground.tokens.pool
    )
    n = max(1, round(ground.recipe.warmup.fraction * len(drawn)))
    return [example_id for _, example_id in drawn[:n]]


def warmed_model(ground: Ground, base: Base) -> nn.Module:
    """Return the model at the checkpoint where gradients are taken, trainable as the recipe says.

    That is the user's own adapter, or the adapter after its warm-up, or at its start where
    `warmup.epochs` is 0.
    """
    recipe = ground.recipe
    if recipe.model.adapter is not None:
        return load_adapter(base, recipe.model.adapter)
    model = add_adapter(base.model, recipe.adapter, seed=recipe.seed)
    if recipe.warmup.epochs == 0:
        return model
    ids = warmup_ids(ground)
    # Plainly: scores are about the examples, not about how they will be trained on.
    options = recipe.tune.of_section_adapter().model_copy(
        update={"epochs": recipe.warmup.schedule_epochs}
    )
    fingerprint = digest(
        {
            "base": base.fingerprint,
            "adapter": recipe.adapter.model_dump(),
            "warmup": recipe.warmup.model_dump(),
            "pool": ground.tokens.fingerprint,
            "seed": recipe.seed,
        }
    )
    path = ground.place("warmup", "warmup", digest({"w": fingerprint, "t": options.model_dump()}))
    items = [ground.tokens.by_id[i] for i in ids]
    result = ground.train(
        base,
        model,
        items,
        options,
        path=path,
        fingerprint=fingerprint,
        name="warm-up",
        stop_after_epochs=recipe.warmup.epochs,
    )
    kill_point(KillPoint.WARMUP_DONE)
    ground.costs["warmup"] = {"seconds": result.seconds, "peak_bytes": result.peak_bytes}
    return model


def gradient_store(ground: Ground) -> StoredPool:
    """Run, resume or read the gradient pass over the pool, for the targets of all tasks."""
    if ground.stored is None:
        ground.stored = _gradient_store(ground)
    return ground.stored


def _gradient_store(ground: Ground) -> StoredPool:
    recipe = ground.recipe
    base = ground.base()
    model = warmed_model(ground, base)
    identity = {
        "base": base.fingerprint,
        "adapter": trainable_fingerprint(model),
        **_untold_by_weights(recipe),
        "tokens": ground.tokens.fingerprint,
        "precision": base.precision,
        "token_budget": recipe.score.token_budget,
        "shard_examples": recipe.score.shard_examples,
        "loss": "mean over target tokens",
    }
    path = ground.place("store", "store", digest(identity))
    store = GradientStore(path, identity)
    if store.is_stale():
        shutil.rmtree(path)
    if store.is_complete():
        ground.recall("gradients", path)
        return store.load(targets(ground))
    engine = GradientEngine(model, precision=base.precision)
    with ground.charge("gradients", path):
        return store.compute(
            engine,
            ground.tokens.pool,
            targets(ground),
            pad_id=base.pad_id,
            token_budget=recipe.score.token_budget,
            shard_examples=recipe.score.shard_examples,
            progress=ground.progress,
        )


def _untold_by_weights(recipe: Recipe) -> dict[str, Any]:
    """Return what decides gradients beside the weights; a warm-up leaves its mark in them."""
    if recipe.model.adapter is not None:
        return {"adapter_files": adapter_fingerprint(recipe.model.adapter)}
    return {} if recipe.warmup.epochs else {"adapter_section": recipe.adapter.model_dump()}


def targets(ground: Ground) -> list[Target]:
    """Return the targets of all tasks in one list, as the gradient pass takes them."""
    found: list[Target] = []
    for task, tokenized in ground.tokens.targets.items():
        groups = {e.id: e.group for e in ground.prepared.targets[task]}
        found += [Target(tokens, task, groups[tokens.id]) for tokens in tokenized]
    return found


def base_losses(ground: Ground) -> Float[np.ndarray, " n"]:
    """Return the loss of every candidate under the untouched base, in nats per target token."""
    base = ground.base()
    fingerprint = digest(
        {
            "base": base.fingerprint,
            "tokens": ground.tokens.fingerprint,
            "precision": base.precision,
            "token_budget": ground.recipe.score.token_budget,
        }
    )
    path = ground.place("losses", "losses", fingerprint)
    if ground.is_done(path, "losses", fingerprint):
        ground.recall("losses", path)
        return _array(open_dir(path, kind="losses").read_tensors("losses.safetensors")["losses"])
    pool = ground.tokens.pool
    with (
        ground.charge("losses", path),
        ground.progress.phase("base losses", len(pool), "examples") as advance,
    ):
        losses = pool_losses(
            base.model,
            pool,
            pad_id=base.pad_id,
            precision=base.precision,
            token_budget=ground.recipe.score.token_budget,
            advance=advance,
        )
        with staged(path, kind="losses", meta={"fingerprint": fingerprint}) as stage:
            stage.write_tensors("losses.safetensors", {"losses": losses})
    return losses


def _array(values: object) -> np.ndarray:
    return values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def score_pool(ground: Ground, name: str, options: dict[str, object]) -> Scores:
    """Score every candidate with one registered scorer, for every task of the run.

    Raises:
        ConfigError: an unknown scorer or option.
        SelectionError: the scorer cannot say anything with these targets.
    """
    entry = get("data_scorer", name, where="score.method")
    parsed = entry.parse(options, where="score.options")
    pool = ground.tokens.pool
    evidence = Evidence(
        tuple(t.id for t in pool),
        pool.n_targets,
        seed=ground.recipe.seed,
        losses=base_losses(ground) if "losses" in entry.needs else None,
    )
    if "gradients" not in entry.needs:
        return entry.function(evidence, parsed)
    stored = gradient_store(ground)
    if stored.ids != evidence.ids:
        raise IncompatibleRunError("the gradient store holds another pool", where="store")
    by_task = {
        task: _score_task(entry, replace(evidence, gradients=stored.of_task(task)), parsed, task)
        for task in ground.tasks
    }
    return _joined(by_task)


def _score_task(entry: Entry, evidence: Evidence, options: object, task: str) -> Scores:
    try:
        return entry.function(evidence, options)
    except SelectionError as error:
        where = f"target task {task}" + (f", {error.where}" if error.where else "")
        raise SelectionError(error.what, where=where, why=error.why, do=error.do) from error


def _joined(by_task: dict[str, Scores]) -> Scores:
    """Return one table: an example counts for the task that it serves best."""
    first = next(iter(by_task.values()))
    about = {"tasks": {task: dict(scores.about) for task, scores in by_task.items()}}
    if len(by_task) == 1:
        return replace(first, about=about)
    stacked = np.stack([scores.score for scores in by_task.values()])
    best = stacked.argmax(0)
    rows = np.arange(len(first))
    columns = {f"task:{task}": scores.score for task, scores in by_task.items()}
    for name in sorted({name for scores in by_task.values() for name in scores.columns}):
        holders = [scores.columns.get(name) for scores in by_task.values()]
        if all(column is not None for column in holders):
            columns[name] = np.stack([c for c in holders if c is not None])[best, rows]
        else:
            columns[name] = next(column for column in holders if column is not None)
    lists = [scores.best_target for scores in by_task.values()]
    best_target = tuple(lists[k][n] for n, k in enumerate(best)) if all(lists) else ()
    return Scores(first.method, first.ids, stacked.max(0), columns, best_target, about)
