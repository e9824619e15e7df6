"""What a grid will train, ask and write, and what that costs, told before any of it is done."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selectune.evaluation.generation import ANSWER_SLACK
from selectune.methods.rules import Budget
from selectune.pipeline.foresee import Outline, outline
from selectune.pipeline.ground import Ground
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.plan import (
    Asked,
    asked_by,
    cost_table,
    evidence_bytes,
    training_bytes,
    view_bytes,
)
from selectune.pipeline.prices import (
    Prices,
    choosing_seconds,
    n_answers,
    pass_price,
    training_seconds,
)
from selectune.pipeline.reselection import n_rescored
from selectune.pipeline.scoring import evidence_steps
from selectune.pipeline.warmup import epochs_run
from selectune.recipe import MatrixMethod, TuneSection
from selectune.recipe.methods import FULL
from selectune.registry import get
from selectune.training.chosen import chosen_method

_PER_SEED = ("warmup", "gradients")  # what a seed has of its own; the rest serves all


@dataclass(frozen=True, slots=True)
class Work:
    """One training of a grid.

    Attributes:
        method: its row.
        tasks: that it is for.
        seed: of the run.
        tuning: how it is trained.
        tested: the tasks that it is asked about; empty where it only helps to choose a setting.
    """

    method: MatrixMethod
    tasks: tuple[str, ...]
    seed: int
    tuning: TuneSection
    tested: tuple[str, ...]


def forecast(ground: Ground, work: Sequence[Work], *, transfers: bool) -> Outcome:
    """Return what a grid will do, as if none of it were done.

    Equal trainings are counted once as far as they are known to be equal: two scorers that choose
    the same examples are found out only later. Projections and making emulators are not priced;
    what runs on an emulator is priced as if it ran on the base, and the gradients of a row with an
    adapter of its own as those of the section adapter.

    Args:
        ground: of one seed.
        work: every training, those that choose settings too.
        transfers: examples are those of a training's own tasks.
    """
    plans = _Plans(ground, transfers)
    trainings = {plans.key(one): one for one in work}
    final = {plans.key(one): one for one in work if one.tested}
    seeds = {one.seed for one in work}
    masks = {plans.mask_key(one): one for one in trainings.values()}
    seconds: dict[str, float] = {}
    n_passes = 0
    grounds = {_own(one.method) for one in work}
    n_warmups = len(seeds) * len(grounds)
    methods = {one.method.name: one.method for one in work}
    for step in plans.steps(methods.values()):
        n = n_warmups if step.startswith(_PER_SEED) else 1
        seconds[step] = n * plans.step(step)
        n_passes += n * step.startswith("gradients")
    if choosing := sum(plans.choosing(one) for one in masks.values()):
        seconds["weights"] = choosing
    seconds["trainings"] = sum(plans.training(one) for one in trainings.values())
    # Equal trainings may be asked about different tasks.
    asked = {(plans.key(one), task): one for one in work for task in one.tested}
    questions = [(one, task) for (_, task), one in asked.items()]
    tested = {task for _, task in questions}
    seconds["evaluation"] = plans.evaluation(questions, tested)
    if ground.recipe.evaluate.generate:
        seconds["answers written"] = plans.writing(questions, tested if transfers else ())
    if ground.texts:
        seconds["text read"] = (1 + len(final)) * plans.reading
    sizes = [sum(plans.outline(one.tuning).trained.values()) for one in trainings.values()]
    keep = max((one.tuning.keep_checkpoints for one in work), default=0)
    rows = {one.method.name: one.tuning for one in work}
    memory = {name: plans.memory(tuning) for name, tuning in rows.items()}
    largest = max(memory, key=lambda name: sum(memory[name].values()))
    read = plans.asked(methods.values())
    views = [view_bytes(ground, one, plans.n_scored) for one in read]
    facts: dict[str, Any] = {
        "cells": sum(bool(one.tested) for one in work),
        "seeds": len(seeds),
        "methods": len(methods),
        "trainings": len(trainings),
        "to_choose_settings": len(trainings.keys() - final.keys()),
        "seconds": {cause: round(value, 1) for cause, value in seconds.items()},
        "largest": largest,
        "memory_bytes": memory[largest] | max(views, key=lambda v: sum(v.values()), default={}),
        "disk_bytes": {
            "adapters": 4 * sum(sizes),
            "checkpoints, of one training at a time": 12 * keep * max(sizes, default=0),
            **evidence_bytes(
                ground,
                {need for one in read for need in one.needs},
                plans.n_scored,
                n_passes=n_passes,
                n_warmups=n_warmups,
            ),
        },
    }
    return Outcome(facts, _lines(facts))


class _Plans:
    """What is needed to price one training after another."""

    def __init__(self, ground: Ground, transfers: bool) -> None:
        self.ground, self.transfers = ground, transfers
        pool = ground.tokens.pool
        self._mean = max(1.0, float(pool.lengths.mean()))
        self.pool_tokens = len(pool) * self._mean
        self._outlines: dict[str, Outline] = {}

    def outline(self, tuning: TuneSection) -> Outline:
        """Return what a training trains; learning rates and epochs do not matter for it."""
        what = tuning.model_dump(mode="json", include={"adapter", "weights"})
        key = json.dumps(what, sort_keys=True)
        if key not in self._outlines:
            self._outlines[key] = outline(self.ground, tuning)
        return self._outlines[key]

    def memory(self, tuning: TuneSection) -> dict[str, int]:
        """Return what a training holds in memory, by cause; the same for every task and seed."""
        return training_bytes(self.ground, tuning, self.outline(tuning))

    @cached_property
    def scored(self) -> Outline:
        """The model that gradients are taken of."""
        return outline(self.ground)

    @property
    def n_scored(self) -> int:
        return sum(self.scored.trained.values())

    @cached_property
    def prices(self) -> Prices:
        return Prices.measured(self.ground, self.scored.n_base)

    @cached_property
    def pass_price(self) -> float:
        return pass_price(self.ground, self.scored, self.prices)

    def asked(self, methods: Iterable[MatrixMethod]) -> list[Asked]:
        """Return what each scorer asks for."""
        recipe = self.ground.recipe
        return [asked_by(recipe, m.method, m.options) for m in methods if m.method != FULL]

    def choice(self, one: Work) -> str:
        """Return what decides which examples a training gets."""
        depends = self.transfers or (
            one.method.method != FULL
            and bool(
                {"gradients", "checkpoints", "hidden_states"}
                & get("data_scorer", one.method.method).needs
            )
        )
        where = one.tasks if depends else ()
        select = None if one.method.select is None else one.method.select.model_dump()
        told = [one.method.method, dict(one.method.options), where, _own(one.method), select]
        return json.dumps(told, sort_keys=True)

    def key(self, one: Work) -> str:
        method = chosen_method(one.tuning)
        aims = one.tasks if method is not None and method.reads_target else ()
        return json.dumps([self.choice(one), one.tuning.model_dump(mode="json"), aims, one.seed])

    def mask_key(self, one: Work) -> str:
        weights = one.tuning.weights
        told = (
            None if weights is None else weights.model_dump(mode="json", exclude={"route", "form"})
        )
        return json.dumps([self.choice(one), told, one.seed])

    def n_chosen(self, method: MatrixMethod) -> int:
        """Return how many examples a row's budget keeps."""
        pool, usual = self.ground.tokens.pool, self.ground.recipe.select
        section = usual if method.select is None else method.select.over(usual)
        budget = Budget.of(section.budget, len(pool), int(pool.lengths.sum()))
        return budget.examples or round((budget.tokens or 0) / self._mean)

    def examples(self, one: Work) -> tuple[int, float]:
        """Return how many examples a training gets, and their tokens together."""
        prepared = self.ground.prepared
        ids = [t.id for t in self.ground.tokens.pool]
        if self.transfers:
            own = {e.source for task in one.tasks for e in prepared.targets[task]}
            ids = [i for i in ids if prepared.sources[i] in own]
        lengths = [len(self.ground.tokens.by_id[i].input_ids) for i in ids]
        n = len(ids) if one.method.method == FULL else min(len(ids), self.n_chosen(one.method))
        return n, n * sum(lengths) / max(1, len(lengths))

    def training(self, one: Work) -> float:
        n, tokens = self.examples(one)
        found = self.outline(one.tuning)
        seconds = training_seconds(self.ground, one.tuning, found, self.prices, tokens)
        again = n_rescored(one.tuning, one.method.method, n, len(self.ground.tokens.pool))
        return seconds + again * tokens / max(1, n) * self.prices.gradient(trains_weights=False)

    def choosing(self, one: Work) -> float:
        n, tokens = self.examples(one)
        found = self.outline(one.tuning)
        return choosing_seconds(self.ground, one.tuning, found, self.prices, n, tokens / max(1, n))

    def steps(self, methods: Iterable[MatrixMethod]) -> list[str]:
        """Return the steps that gather what all scorers read, each once."""
        recipe = self.ground.recipe
        found: dict[str, None] = {}
        for method in methods:
            if method.method != FULL:
                steps = evidence_steps(recipe, method.method, dict(method.options))
                found |= dict.fromkeys(steps)
        is_warm = recipe.model.adapter is not None
        return [step for step in found if not (is_warm and step == "warmup")]

    def step(self, name: str) -> float:
        """Return the seconds of one such step, for one seed."""
        recipe = self.ground.recipe
        if name == "warmup":
            gradient = self.prices.gradient(trains_weights=recipe.adapter.kind == "full")
            return recipe.warmup.fraction * epochs_run(self.ground) * self.pool_tokens * gradient
        is_pass = name.startswith("gradients")
        return self.pool_tokens * (self.pass_price if is_pass else self.prices.forward)

    def evaluation(self, questions: Iterable[tuple[Work, str]], tasks: Iterable[str]) -> float:
        """Return what ranking the options of held-out questions costs, of models and of the base.

        Args:
            questions: each training with a task that its model is asked about.
            tasks: that the base is asked about.
        """
        heldout, limit = self.ground.prepared.heldout, self.ground.recipe.evaluate.limit
        answers = {task: n_answers(examples, limit) for task, examples in heldout.items()}
        n = sum(answers[task] for task in tasks)
        for one, task in questions:
            # The emulator is asked too, about what it trained for.
            is_asked_twice = one.method.emulate is not None and task in one.tasks
            n += answers[task] * (2 if is_asked_twice else 1)
        return n * float(self.ground.tokens.pool.lengths.mean()) * self.prices.forward

    def writing(self, questions: Iterable[tuple[Work, str]], tasks: Iterable[str]) -> float:
        """Return what answers in own words cost, each as long as it may become.

        Args:
            questions: as for `evaluation`.
            tasks: likewise.
        """
        heldout, limit = self.ground.prepared.heldout, self.ground.recipe.evaluate.limit
        asked = {
            task: sum(bool(e.options) for e in list(examples)[:limit])
            for task, examples in heldout.items()
        }
        n = sum(asked[task] for task in tasks) + sum(asked[task] for _, task in questions)
        mean = float(self.ground.tokens.pool.lengths.mean())
        return n * (mean + ANSWER_SLACK) * self.prices.forward

    @property
    def reading(self) -> float:
        """What one model's reading of the plain text costs."""
        texts = self.ground.texts[: self.ground.recipe.evaluate.limit]
        tokens = sum(len(ids) for ids in self.ground.tokenizer(texts)["input_ids"])
        return tokens * self.prices.forward


def _own(method: MatrixMethod) -> str:
    """Return what a row has of its own before it trains."""
    return method.model_dump_json(include={"warmup", "adapter", "emulate"})


def _lines(facts: Mapping[str, Any]) -> list[str]:
    choosing = facts["to_choose_settings"]
    some = f", {choosing} of them to choose settings" if choosing else ""
    parts = f"{facts['methods']} methods and {facts['seeds']} seeds"
    return [
        f"grid        {facts['cells']} cells of {parts}",
        f"trainings   at most {facts['trainings']}{some}",
        f"largest     {facts['largest']}, which the memory is of",
        *cost_table("memory", facts["memory_bytes"], 1 << 20, "MB"),
        *cost_table("disk", facts["disk_bytes"], 1 << 20, "MB"),
        *cost_table("time", facts["seconds"], 60, "min"),
    ]
