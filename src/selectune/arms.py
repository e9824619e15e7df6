"""The arms of a run: the selection, its controls and the base; each tuned, then evaluated."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from selectune.adapters import add_adapter, load_tuned
from selectune.data import Example, near_duplicates
from selectune.evaluation import Evaluation, evaluate
from selectune.files import KillPoint, kill_point, open_dir, staged
from selectune.ground import Ground, digest
from selectune.methods.rules import Budget, select, target_columns
from selectune.models import Base
from selectune.recipe import TuneSection
from selectune.recipe_methods import FULL
from selectune.registry import get
from selectune.scoring import score_pool
from selectune.selection import Scores, Selection
from selectune.training import TuneResult
from selectune.training.chosen import chosen_method, fingerprint_of

SELECTED = "selected"
BASE = "base"


@dataclass(frozen=True, slots=True)
class TunedArm:
    """An arm that has been trained."""

    name: str
    path: Path
    n_examples: int
    result: TuneResult


def choose(ground: Ground, scores: Scores, fingerprint: str) -> Selection:
    """Fill the recipe's budget from scores.

    Raises:
        SelectionError: the budget, a quota or the rule cannot be met.
    """
    section = ground.recipe.select
    rule = section.rule
    if scores.method != ground.recipe.score.method and not target_columns(scores):
        rule = "topk"  # a control that does not look at the targets has no turns to give them
    by_id = {e.id: e for e in ground.prepared.candidates}
    lengths = {t.id: len(t.input_ids) for t in ground.tokens.pool}
    return select(
        scores,
        get("selection_rule", rule, where="select.rule"),
        Budget.of(section.budget, len(scores)),
        sources={i: by_id[i].source for i in scores.ids},
        n_tokens=lengths,
        quotas=section.quotas,
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
    ground: Ground, name: str, selection: Selection, *, tuning: TuneSection | None = None
) -> TunedArm:
    """Train a fresh adapter on a selection, or resume, or read what is finished.

    Args:
        ground: of the run.
        name: of the arm.
        selection: what to train on.
        tuning: how; None for the recipe's `tune` section.

    Raises:
        TrainingError: the loss is not a number, or nothing moved.
        IncompatibleRunError: the arm's folder holds other work.
    """
    recipe = ground.recipe
    options = tuning or recipe.tune
    base = ground.base()
    model = add_adapter(base.model, recipe.adapter, seed=recipe.seed)
    target = [t for task in ground.tasks for t in ground.tokens.targets[task]]
    # In the pool's order: equal sets train equally, whatever ranked them.
    chosen = set(selection.ids)
    items = [t for t in ground.tokens.pool if t.id in chosen]
    fingerprint = digest(
        {
            "base": base.fingerprint,
            "adapter": recipe.adapter.model_dump(),
            "examples": hashlib.sha256("\n".join(t.id for t in items).encode()).hexdigest(),
            "tokens": ground.tokens.fingerprint,
        }
    )
    # Only what the method reads: equal trainings for several tasks are one.
    method = chosen_method(options)
    seen = fingerprint_of(target) if method is not None and method.reads_target else None
    everything = digest(
        {"f": fingerprint, "t": options.model_dump(), "s": recipe.seed, "target": seen}
    )
    path = ground.place("tune", f"tune/{name}", everything)
    result = ground.train(
        base,
        model,
        items,
        options,
        path=path,
        fingerprint=fingerprint,
        name=name,
        target=target,
    )
    ground.costs[f"tune {name}"] = {"seconds": result.seconds, "peak_bytes": result.peak_bytes}
    return TunedArm(name, result.path, len(items), result)


def evaluate_arm(
    ground: Ground, name: str, path: Path | None, questions: Mapping[str, Sequence[Example]]
) -> dict[str, Evaluation]:
    """Return an arm's answers to held-out examples, by task.

    Args:
        ground: of the run.
        name: of the arm, for progress and prices.
        path: of the tuned adapter; None for the untouched base.
        questions: examples by task.
    """
    recipe, section = ground.recipe, ground.recipe.evaluate
    loaded: tuple[Base, nn.Module] | None = None
    found: dict[str, Evaluation] = {}
    for task, examples in questions.items():
        asked = list(examples)[: section.limit]
        fingerprint = digest(
            {
                "model": _content(ground, path),
                "ids": [e.id for e in asked],
                "options": [list(e.options) for e in asked],
                "max_length": recipe.data.max_length,
                "dtype": recipe.model.dtype,
                "token_budget": section.token_budget,
            }
        )
        folder = ground.place("evaluation", f"evaluation/{name}-{task}", fingerprint)
        step = f"evaluate {name}"
        if ground.is_done(folder, "evaluation", fingerprint):
            ground.recall(step, folder)
            opened = open_dir(folder, kind="evaluation")
            left_out: list[str] = opened.read_json("left_out.json")
            found[task] = Evaluation(opened.read_table("answers.parquet"), tuple(left_out))
            continue
        if loaded is None:
            base = ground.base()
            loaded = base, base.model if path is None else load_tuned(base, path)
        base, model = loaded
        n = sum(max(1, len(e.options)) for e in asked)
        with (
            ground.charge(step, folder),
            ground.progress.phase(f"evaluate {name} on {task}", n, "answers") as advance,
        ):
            answers = evaluate(
                model,
                asked,
                base.tokenizer,
                max_length=recipe.data.max_length,
                pad_id=base.pad_id,
                device=base.device.type,
                precision=base.precision,
                token_budget=section.token_budget,
                advance=advance,
            )
            with staged(folder, kind="evaluation", meta={"fingerprint": fingerprint}) as stage:
                stage.write_table("answers.parquet", answers.table)
                stage.write_json("left_out.json", list(answers.left_out))
        kill_point(KillPoint.EVALUATE_DONE)
        found[task] = answers
    return found


def _content(ground: Ground, path: Path | None) -> str:
    """Return what stands for a model's weights: the base's name, or the adapter's manifest."""
    if path is None:
        return f"base {ground.base_fingerprint}"
    identity = open_dir(path, kind="adapter").meta["identity"]
    return json.dumps(identity, sort_keys=True)
