"""Scores and selections from Python, for models and data that are already loaded.

A recipe does the same with warm-up, resume, controls and a report: `selectune.pipeline.run.Run`.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selectune.adapters import add_adapter, load_adapter
from selectune.data import Spec, Tokenized, read_examples, tokenize
from selectune.errors import ConfigError, SelectionError, nearest
from selectune.files import is_complete
from selectune.gradients.adam import Moments, adam_steps
from selectune.gradients.engine import GradientEngine, dropout_off, pool_losses
from selectune.gradients.facts import CheckpointFacts, GradientFacts
from selectune.gradients.projection import Projection
from selectune.gradients.states import state_similarity
from selectune.gradients.store import GradientStore, Target
from selectune.gradients.view import View
from selectune.methods.evidence import Evidence, ReadsCheckpoints
from selectune.methods.rules import Budget
from selectune.methods.rules import select as fill
from selectune.models import choose_precision, load_base
from selectune.pipeline.economy import only_layers
from selectune.progress import Silent
from selectune.recipe import AdapterSection, ModelSection
from selectune.registry import get, methods
from selectune.selection import Scores, Selection
from selectune.training.trainer_folder import (
    checkpoint_folders,
    put_weights,
    read_moments,
    set_weights,
    trainer_checkpoints,
    weights_of,
)

_log = logging.getLogger(__name__)


def score(
    method: str,
    model: nn.Module | str | Path,
    pool: Spec,
    target: Spec | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 512,
    token_budget: int = 1024,
    precision: str | None = None,
    layers: str | None = None,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    **options: Any,  # noqa: ANN401
) -> Scores:
    """Score every pool example; higher is better.

    Args:
        method: a data scorer, such as "gist"; `selectune methods` lists them.
        model: a causal LM whose trainable parameters are what gradients are taken of (a peft model
            as it stands), or a path or Hub name, which gets a fresh LoRA r 8,
            or the adapter in `checkpoints`.
        pool: path, Hub name, datasets.Dataset or list of rows.
        target: the few examples that stand for the task; for scorers that need them.
        tokenizer: of the model; None loads it from where the model came from.
        max_length: tokens kept of an example; one without a target token left gets no score.
        token_budget: padded tokens in one batch.
        precision: "float32" or "bfloat16"; None takes the type of the model's weights.
        layers: "top:8" or "top:25%" takes gradients of the last blocks alone, for scorers that take
            any; the backward pass ends there.
        seed: for scorers that draw.
        checkpoints: the output_dir of the transformers.Trainer that trained `model`, or one
            `checkpoint-N` of it, for "less" and "tracin": weights, optimizer state and learning
            rates are read from there. None takes the model as it stands for the only checkpoint.
        options: of the method, such as `rank=9`.

    Raises:
        ConfigError: an unknown method or option, a target is needed and missing, or Adam's state
            is needed and not there.
        IncompatibleRunError: `checkpoints` are of another model.
        DataError: the data cannot be used.
        CoverageError: a trainable parameter would get no gradient per example.
    """
    entry = get("data_scorer", method)
    parsed = entry.parse(options)
    needs_target = not entry.needs.isdisjoint({"gradients", "checkpoints", "hidden_states"})
    if needs_target and target is None:
        raise ConfigError(
            f"{method} needs target examples",
            where="target",
            why="it compares every pool example with the examples of your task",
            do="give target=, a few rows of the task, or use a scorer such as perplexity",
        )
    if checkpoints is not None and "checkpoints" not in entry.needs:
        raise ConfigError(
            "the checkpoints would not be used",
            where="checkpoints",
            why=f"{method} looks at the model as it stands",
            do="remove checkpoints=, or use less or tracin",
        )
    loaded, tokenizer, precision = _loaded(model, tokenizer, precision, seed, checkpoints)
    pad_id = cast("int | None", tokenizer.pad_token_id) or 0
    tokens = tokenize(read_examples(pool), tokenizer, max_length=max_length)
    _tell_cut(tokens, "pool", max_length)
    ids = tuple(t.id for t in tokens)
    if not needs_target:
        losses = None
        if "losses" in entry.needs:
            losses = pool_losses(
                loaded, tokens, pad_id=pad_id, precision=precision, token_budget=token_budget
            )
        return entry.function(Evidence(ids, tokens.n_targets, seed, losses), parsed)
    examples = read_examples(cast("Spec", target), what="target")
    aims = tokenize(examples, tokenizer, max_length=max_length)
    _tell_cut(aims, "target", max_length)
    groups = {e.id: e.group for e in examples}
    evidence = Evidence(ids, tokens.n_targets, seed)
    if "hidden_states" in entry.needs:
        states = state_similarity(
            loaded,
            tokens,
            list(aims),
            groups=[groups[t.id] for t in aims],
            pad_id=pad_id,
            precision=precision,
            token_budget=token_budget,
        )
        return entry.function(replace(evidence, states=states), parsed)

    def gradients(view: View, moments: Mapping[str, Moments] | None = None) -> GradientFacts:
        with (
            tempfile.TemporaryDirectory(prefix="selectune-") as folder,
            dropout_off(loaded),
            only_layers(loaded, layers),
        ):
            stored = GradientStore(Path(folder) / "store", {}).compute(
                GradientEngine(loaded, precision=precision),
                tokens,
                [Target(t, "target", groups[t.id]) for t in aims],
                pad_id=pad_id,
                token_budget=token_budget,
                shard_examples=len(tokens),
                progress=Silent(),
                adam=adam_steps(view, moments),
                projection=Projection.of(view.projection, seed, precision),
            )
        return stored.facts

    if "gradients" in entry.needs:
        return entry.function(replace(evidence, gradients=gradients(View())), parsed)
    passes = _at_checkpoints(loaded, parsed, checkpoints, gradients)
    return entry.function(replace(evidence, checkpoints=passes), parsed)


def rescore(
    method: str,
    run: str | Path,
    *,
    groups: Mapping[str, str] | None = None,
    task: str | None = None,
    targets: Sequence[str] | None = None,
    **options: Any,  # noqa: ANN401
) -> Scores:
    """Score a pool anew from what a gradient pass left behind: no model, no data, no gradient.

    Args:
        method: a scorer that reads the gradients of one checkpoint, such as "gist".
        run: the folder of a run, or the store in it.
        groups: subtasks by target id, for aggregates over subtasks; a target that is not named
            keeps its own.
        task: the target task whose targets count; None takes those of all tasks together.
        targets: ids of those that count, in any order; None takes all of the task's.
        options: of the method, such as `aggregate="max_subtask_mean"`.

    Raises:
        ConfigError: an unknown method, option, target or task, no target left, a method that reads
            more than that, or no finished pass in the folder.
        CorruptFileError: a part of the pass is damaged.
    """
    entry = get("data_scorer", method)
    parsed = entry.parse(options)
    if set(entry.needs) != {"gradients"}:
        known = [e.name for e in methods("data_scorer") if set(e.needs) == {"gradients"}]
        raise ConfigError(
            f"{method} cannot be scored from a store",
            where="method",
            why="a store holds the gradients of one checkpoint and nothing else",
            do=f"use {' or '.join(known)}, or `score`",
        )
    home = Path(run)
    path = home if (home / "pool").exists() else home / "store"
    if not is_complete(path / "pool", kind="pool"):
        raise ConfigError(
            "there is no finished gradient pass",
            where=str(home),
            why=f"{path / 'pool'} does not hold the end of one",
            do="give the folder of a run that `selectune score` has finished, or its store",
        )
    stored = GradientStore.finished(path).read_again(groups)
    _refuse_unknown("target", sorted(groups or ()), stored.facts.target_ids, "groups")
    _refuse_unknown("task", [] if task is None else [task], stored.tasks, "task")
    facts = stored.facts if task is None else stored.of_task(task)
    if targets is not None:
        _refuse_unknown("target", targets, facts.target_ids, "targets")
        if not targets:
            raise ConfigError(
                "no target is left to score by",
                where="targets",
                why="the list of their ids is empty",
                do="name some, or leave targets out for all of them",
            )
        kept = frozenset(targets)
        facts = facts.of([j for j, i in enumerate(facts.target_ids) if i in kept])
    return entry.function(Evidence(stored.ids, stored.n_target_tokens, gradients=facts), parsed)


def _refuse_unknown(what: str, given: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(
                f'"{name}" is no {what} of this pass',
                where=where,
                why=f"it was made for {len(set(known))} of them",
                do=nearest(name, known),
            )


def _at_checkpoints(
    model: nn.Module,
    reading: ReadsCheckpoints,
    checkpoints: str | Path | None,
    gradients: Callable[[View, Mapping[str, Moments] | None], GradientFacts],
) -> tuple[CheckpointFacts, ...]:
    """Return a gradient pass at each checkpoint of a Trainer; the model is put back as it was."""
    view = reading.view
    if checkpoints is None:
        if view.adam != "none":
            raise ConfigError(
                "the moments of Adam are needed, and there are none",
                where="checkpoints",
                why="pool gradients are compared as the steps that Adam would take",
                do="give checkpoints=, the output_dir of the Trainer that trained this model, or "
                'use adam="none"; a recipe does the warm-up by itself',
            )
        return (CheckpointFacts(gradients(view, None), 1.0),)
    found = trainer_checkpoints(checkpoints, reading.epochs)
    before = {name: t.detach().clone() for name, t in weights_of(model).items()}
    passes: list[CheckpointFacts] = []
    try:
        for checkpoint in found:
            put_weights(model, checkpoint.path)
            moments = None if view.adam == "none" else read_moments(model, checkpoint.path)
            passes.append(CheckpointFacts(gradients(view, moments), checkpoint.learning_rate))
    finally:
        set_weights(model, before)
    return tuple(passes)


def select(
    scores: Scores,
    budget: float | int | str = 0.05,
    *,
    rule: str = "topk",
    sources: Mapping[str, str] | None = None,
    n_tokens: Mapping[str, int] | None = None,
    quotas: Mapping[str, tuple[float, float]] | None = None,
) -> Selection:
    """Choose examples by their scores.

    Args:
        scores: what `score` returned.
        budget: a share (0.05), a number of examples (500) or of tokens ("20000 tokens").
        rule: a selection rule, such as "topk" or "round_robin".
        sources: each example's source by id, for quotas.
        n_tokens: each example's length by id, for a budget in tokens.
        quotas: source -> least and most share of the selection.

    Raises:
        ConfigError: an unknown rule.
        SelectionError: the budget or a quota cannot be met.
    """
    if isinstance(budget, str) and n_tokens is None:
        raise SelectionError(
            "a budget in tokens needs the examples' lengths",
            where="n_tokens",
            do="give n_tokens={id: tokens}, or a budget as a share or a count",
        )
    return fill(
        scores,
        get("selection_rule", rule),
        Budget.of(budget, len(scores)),
        sources=sources or dict.fromkeys(scores.ids, ""),
        n_tokens=n_tokens or dict.fromkeys(scores.ids, 1),
        quotas=quotas,
    )


def _tell_cut(tokens: Tokenized, what: str, max_length: int) -> None:
    if tokens.n_truncated:
        _log.warning(
            "%d %s examples were cut to %d tokens; %d kept no target token and are left out: "
            "raise max_length",
            tokens.n_truncated, what, max_length, len(tokens.empty_ids),
        )  # fmt: skip


def _loaded(
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    precision: str | None,
    seed: int,
    checkpoints: str | Path | None,
) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    if not isinstance(model, nn.Module):
        asked = ModelSection(base=str(model), dtype=cast("Any", precision or "auto"))
        base = load_base(asked, adapter=AdapterSection())
        if checkpoints is not None:
            adapted = load_adapter(base, checkpoint_folders(checkpoints)[0])
        else:
            section = AdapterSection(modules="all-linear")
            adapted = add_adapter(base.model, section, seed=seed)
        return adapted, tokenizer or base.tokenizer, base.precision
    held = next(p for p in model.parameters() if p.is_floating_point()).dtype
    if tokenizer is None:
        name = str(cast("Any", model).config.name_or_path)
        tokenizer = cast(
            "PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        )
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    found = precision or names.get(held, "float32")
    device = next(model.parameters()).device
    return model, tokenizer, choose_precision(found, device)
