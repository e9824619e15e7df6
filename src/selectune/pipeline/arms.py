"""The arms of a run: the selection and its controls, each tuned on what was chosen."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selectune.adapters import load_tuned
from selectune.data import Example, Tokens, near_duplicates
from selectune.methods.rules import Budget, select, target_columns
from selectune.models import Base
from selectune.pipeline.economy import only_layers
from selectune.pipeline.equip import Equipped, adapter_of, equip, mask_digest
from selectune.pipeline.ground import Ground, digest
from selectune.pipeline.reselection import Phases, Refresh, Source, reads_the_model, refresh_steps
from selectune.pipeline.scoring import run_economy, score_pool
from selectune.pipeline.token_scoring import keep_tokens
from selectune.recipe import AdapterSection, TuneSection
from selectune.recipe.methods import FULL
from selectune.recipe.package import layers_of
from selectune.registry import get
from selectune.selection import Scores, Selection
from selectune.training import TuneResult
from selectune.training.chosen import chosen_method, fingerprint_of
from selectune.training.tune import Phase
from selectune.weights.mask import WeightMask

SELECTED = "selected"
BASE = "base"


@dataclass(frozen=True, slots=True)
class TunedArm:
    """An arm that has been trained."""

    name: str
    path: Path
    n_examples: int
    result: TuneResult
    mask: WeightMask | None = None  # of single weights that trained
    plane: Mapping[str, Any] | None = None  # where these lie among all
    refreshes: tuple[Refresh, ...] = ()  # new selections that it went on with


def choose(
    ground: Ground,
    scores: Scores,
    fingerprint: str,
    *,
    quotas: Mapping[str, tuple[float, float]] | None = None,
    budget: Budget | None = None,
) -> Selection:
    """Fill the recipe's budget from scores.

    Args:
        ground: of the run.
        scores: of its candidates.
        fingerprint: of what the scores were made from.
        quotas: in place of the recipe's.
        budget: in place of the recipe's.

    Raises:
        SelectionError: the budget, a quota or the rule cannot be met.
    """
    section = ground.recipe.select
    rule = section.rule
    if scores.method != ground.recipe.score.method and not target_columns(scores):
        rule = "topk"  # a control that does not look at the targets has no turns to give them
    by_id = {e.id: e for e in ground.prepared.candidates}
    lengths = {t.id: len(t.input_ids) for t in ground.tokens.pool}
    sources = {i: by_id[i].source for i in scores.ids}
    asked = section.quotas if quotas is None else quotas
    if budget is not None:  # of a shortlist, which need not hold every source
        asked = {name: quota for name, quota in asked.items() if name in set(sources.values())}
    return select(
        scores,
        get("selection_rule", rule, where="select.rule"),
        budget or Budget.of(section.budget, len(scores)),
        sources=sources,
        n_tokens=lengths,
        quotas=asked,
        dropped=ground.dropped,
        is_near=_NearCopies(by_id, scores, section.near_duplicates)
        if section.near_duplicates is not None
        else None,
        fingerprint=fingerprint,
    )


class _NearCopies:
    """Tell, for one candidate after another, which chosen one it nearly equals."""

    def __init__(self, by_id: dict[str, Example], scores: Scores, threshold: float) -> None:
        ordered = [by_id[i] for i in scores.ranking()]
        self._first = near_duplicates(ordered, threshold).matches
        self._chosen: dict[str, str] = {}  # first of a family of copies -> its chosen member

    def __call__(self, example_id: str) -> str | None:
        family = self._first.get(example_id, example_id)
        if family in self._chosen:
            return self._chosen[family]
        self._chosen[family] = example_id
        return None


def control_selection(ground: Ground, name: str) -> Selection:
    """Return what a control trains on: a scorer at the same budget, or the full pool."""
    if name == FULL:
        ids = tuple(t.id for t in ground.tokens.pool)
        universe = frozenset((*ids, *ground.dropped))
        return Selection(ids, universe, about={"method": FULL})
    return choose(ground, score_pool(ground, name, {}), "")


def tune_arm(
    ground: Ground,
    name: str,
    selection: Selection,
    *,
    tuning: TuneSection | None = None,
    source: Source | None = None,
) -> TunedArm:
    """Train a fresh adapter or single weights on a selection; resume, or read what is there.

    Args:
        ground: of the run.
        name: of the arm.
        selection: what to train on.
        tuning: how; None for the recipe's `tune` section.
        source: what the selection was chosen by, for `tune.reselect_every`; None keeps it.

    Raises:
        TrainingError: the loss is not a number, or nothing moved.
        IncompatibleRunError: the arm's folder holds other work.
    """
    recipe = ground.recipe
    options = tuning or recipe.tune
    target = [t for task in ground.tasks for t in ground.tokens.targets[task]]
    # In the pool's order: equal sets train equally, whatever ranked them.
    chosen = set(selection.ids)
    items = [t for t in ground.tokens.pool if t.id in chosen]
    if options.tokens is not None:
        items = keep_tokens(ground, items, options.tokens, name=name)

    def fine_tune() -> nn.Module:
        whole = AdapterSection(kind="full", layers=layers_of(recipe))
        changes = {"adapter": whole, "weights": None}
        everything = options.plainly().model_copy(update=changes)
        arm = tune_arm(ground, f"{name} before its mask", selection, tuning=everything)
        return load_tuned(ground.base(), arm.path)

    def equipped() -> tuple[Base, Equipped]:
        base = ground.base()
        return base, equip(ground, base, items, options, name=name, fine_tune=fine_tune)

    adapter = adapter_of(ground, options)
    held: list[tuple[Base, Equipped]] = []  # taken out by who trains it, who so frees it in the end
    mask, plane = None, None
    if options.weights is not None:  # what trains is only known then
        held.append(equipped())
        mask, plane = held[0][1].mask, held[0][1].plane
    fingerprint = digest(
        {
            "base": ground.base_fingerprint,
            "adapter": None if adapter is None else adapter.model_dump(),
            "mask": mask_digest(mask),
            "examples": hashlib.sha256("\n".join(t.id for t in items).encode()).hexdigest(),
            "tokens": ground.tokens.fingerprint,
        }
    )
    # Only what the method reads: equal trainings for several tasks are one.
    method = chosen_method(options)
    seen = fingerprint_of(target) if method is not None and method.reads_target else None
    facts = {"f": fingerprint, "t": options.model_dump(), "s": recipe.seed, "target": seen}
    if options.tokens is not None:
        facts["tokens"] = fingerprint_of(items)
    everything = digest(facts)
    if source is not None and options.reselect_every is not None:
        everything = digest({"of": everything, "by": _told(ground, source, selection)})

    def train(
        items: list[Tokens], path: Path, phase: Phase | None
    ) -> tuple[Base, nn.Module, TuneResult]:
        base, ready = held.pop() if held else equipped()
        result = ground.train(
            ready.model,
            items,
            options,
            path=path,
            fingerprint=fingerprint,
            name=name,
            target=target,
            phase=phase,
        )
        return base, ready.model, result

    refreshes: list[Refresh] = []
    path = ground.place("tune", f"tune/{name}", everything)
    with ground.making(path):
        if source is None or options.reselect_every is None:
            # Equal work of other arms, and what an earlier process left, is read as it lies.
            found = ground.trained(
                items, options, path=path, fingerprint=fingerprint, target=target
            )
            result = found or train(items, path, None)[2]
        else:
            held.append(equipped())
            with only_layers(held[0][1].model, run_economy(ground).layers):
                pass  # refuses now what the first new selection would stumble over
            step = options.batch_size * options.accumulation
            n_steps = options.epochs * -(-len(items) // step)
            phases = Phases(
                ground,
                ground.place("phases", f"phases/{name}", everything),
                made_from=everything,
                source=source,
                first=selection,
                ends=refresh_steps(options.reselect_every, n_steps),
                name=name,
            )
            result, refreshes = phases.run(train, path)
    ground.costs[f"tune {name}"] = {"seconds": result.seconds, "peak_bytes": result.peak_bytes}
    return TunedArm(name, result.path, len(items), result, mask, plane, tuple(refreshes))


def source_of(
    ground: Ground,
    name: str,
    options: Mapping[str, Any],
    *,
    scores: Scores | None = None,
    quotas: Mapping[str, tuple[float, float]] | None = None,
) -> Source | None:
    """Return what a selection is chosen by again while a model trains on it.

    Args:
        ground: of the run.
        name: of the scorer.
        options: of the scorer.
        scores: its first ones; None to score.
        quotas: in place of the recipe's.

    Returns:
        None where the scorer does not look at what changes.
    """
    if name == FULL or not reads_the_model(name):
        return None
    found = score_pool(ground, name, dict(options)) if scores is None else scores
    return Source(found, options, quotas)


def _told(ground: Ground, source: Source, selection: Selection) -> dict[str, Any]:
    """Return what decides the new selections of a training."""
    return {
        "method": source.scores.method,
        "options": dict(source.options),
        "quotas": None if source.quotas is None else dict(source.quotas),
        "select": ground.recipe.select.model_dump(mode="json"),
        "shortlist": sorted(source.shortlist(selection)),
        "tasks": {task: [t.id for t in ground.tokens.targets[task]] for task in ground.tasks},
        **run_economy(ground).facts,
    }
