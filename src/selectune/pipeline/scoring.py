"""Gradient passes, states, losses and scorers: from a pool to one table of scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from selectune.adapters import adapter_fingerprint, checkpoints_fingerprint
from selectune.data import Tokens
from selectune.errors import IncompatibleRunError, SelectionError
from selectune.files import open_dir, staged
from selectune.files.disk import remove
from selectune.gradients.adam import Moments, adam_steps
from selectune.gradients.engine import GradientEngine, pool_losses
from selectune.gradients.facts import CheckpointFacts, StateFacts
from selectune.gradients.projection import Projection
from selectune.gradients.states import state_similarity
from selectune.gradients.store import Beside, GradientStore, StoredPool, Target, Worked
from selectune.gradients.view import View
from selectune.methods.evidence import Evidence, ReadsCheckpoints
from selectune.models import Base, fingerprint, trainable_fingerprint
from selectune.pipeline.economy import Economy, economy_of, only_layers, probe_of, told_fast
from selectune.pipeline.ground import Ground, digest
from selectune.pipeline.measure import Measured
from selectune.pipeline.ranks import rank_correlation
from selectune.pipeline.warmup import (
    Warmed,
    checkpoint_epochs,
    keep_epochs,
    n_checkpoints,
    own_checkpoints,
    scorers,
    warm_up,
    warmed_model,
)
from selectune.recipe import Recipe
from selectune.registry import Entry, Need, get
from selectune.selection import Scores

_STEPS: dict[Need, str] = {"losses": "losses", "hidden_states": "states"}


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One gradient pass over the pool, for the targets of all tasks: to run, to share, to read.

    Args:
        ground: of the run.
        base: the model's base.
        model: at the checkpoint where gradients are taken.
        untold: what decides gradients and leaves no mark in the weights.
        view: how pool gradients are looked at.
        moments: Adam's, where the view asks for them.
        label: what the pass is called.
        economy: what it leaves out.
        probe: the few examples that it is made for; empty for the whole pool.
        beside: passes of other looks at the same gradients, which are made with this one.
    """

    ground: Ground
    base: Base
    model: nn.Module
    untold: Mapping[str, Any]
    view: View = field(default_factory=View)
    moments: Mapping[str, Moments] | None = None
    label: str = ""
    economy: Economy = field(default_factory=Economy)
    probe: tuple[Tokens, ...] = ()
    beside: tuple["_Pass", ...] = ()

    def run(self) -> StoredPool:
        """Do what is missing, beside others or alone, and read the whole."""
        store, path = self._fresh()
        if not store.is_complete():
            others = [(one, *one._fresh()) for one in self.beside]
            missing = [(one, other, to) for one, other, to in others if not other.is_complete()]
            # What each would have cost alone.
            prices = [path, *(to for *_, to in missing)]
            self._priced(store, prices, [(one, other) for one, other, _ in missing])
        self.ground.recall(self._step, path)
        return store.load(targets(self.ground))

    def share(self) -> tuple[Worked, StoredPool | None]:
        """Do this process's part; return how far the pass is, and the pass once it is complete.

        Raises:
            IncompatibleRunError: the folder holds a pass of other inputs. Others may be using it,
                so it is not removed.
        """
        store, path = self._store()
        worked = self._priced(store, [path])
        if not worked.is_complete:
            return worked, None
        self.ground.recall(self._step, path)
        return worked, store.load(targets(self.ground))

    def _priced(
        self,
        store: GradientStore,
        paths: Sequence[Path],
        beside: Sequence[tuple["_Pass", GradientStore]] = (),
    ) -> Worked:
        """Work, and keep what that cost beside some results."""
        hands = self.ground.hands
        waited = hands.waited
        with Measured() as measured:
            worked = self._work(store, beside)
        measured.seconds -= hands.waited - waited
        if worked.n_computed or not hands.name:  # else the rest was others'
            for path in paths:
                self.ground.keep_price(path, measured, is_part=True)
        return worked

    def _fresh(self) -> tuple[GradientStore, Path]:
        """Return the store and its folder, without what was made of other inputs."""
        store, path = self._store()
        if store.is_stale():
            self.ground.forget(path)
        return store, path

    @property
    def _step(self) -> str:
        kind = "probe" if self.probe else "gradients"
        return f"{kind} {self.label}".strip()

    def _store(self) -> tuple[GradientStore, Path]:
        recipe, projection = self.ground.recipe, self._projection()
        seen: dict[str, Any] = {}
        if self.moments is not None:
            tensors = {f"{n}.m": x.m for n, x in self.moments.items()}
            tensors |= {f"{n}.v": x.v for n, x in self.moments.items()}
            rest = {n: [x.n_steps, *x.betas, x.eps] for n, x in self.moments.items()}
            moments = digest({"t": fingerprint(tensors), "r": rest})
            seen = {"adam": self.view.adam, "moments": moments}
        if projection is not None:
            seen |= {"projection": self.view.projection, "projection_seed": projection.seed}
        identity = {
            "base": self.base.fingerprint,
            "adapter": trainable_fingerprint(self.model),
            **self.untold,
            **seen,
            "tokens": self.ground.tokens.fingerprint,
            **self.economy.facts,
            "precision": self.economy.precision_on(self.base),
            "token_budget": recipe.score.token_budget,
            "shard_examples": recipe.score.shard_examples,
            "loss": "mean over target tokens",
        }
        if self.probe:
            identity["probe"] = digest({"ids": [t.id for t in self.probe]})
        kind = "probe" if self.probe else "store"
        name = f"{kind}-{self.label}" if self.label else kind
        path = self.ground.place("store", name, digest(identity))
        return GradientStore(path, identity), path

    def _work(
        self, store: GradientStore, beside: Sequence[tuple["_Pass", GradientStore]] = ()
    ) -> Worked:
        section, economy = self.ground.recipe.score, self.economy
        with only_layers(self.model, economy.layers):
            return store.work(
                GradientEngine(self.model, precision=economy.precision_on(self.base)),
                economy.shortened(self.probe or self.ground.tokens.pool),
                _shortened_targets(self.ground, economy),
                pad_id=self.base.pad_id,
                token_budget=section.token_budget,
                shard_examples=section.shard_examples,
                progress=self.ground.progress,
                adam=adam_steps(self.view, self.moments),
                projection=self._projection(),
                hands=self.ground.hands,
                beside=[
                    Beside(other, adam_steps(one.view, one.moments), one._projection())
                    for one, other in beside
                ],
            )

    def _projection(self) -> Projection | None:
        return Projection.of(
            self.view.projection,
            self.ground.recipe.seed,
            self.economy.precision_on(self.base),
        )


def gradient_store(ground: Ground) -> StoredPool:
    """Run, resume or read the gradient pass over the pool, for the targets of all tasks."""
    if ground.stored is None:
        ground.stored = _plain_pass(ground).run()
    return ground.stored


def _plain_pass(ground: Ground) -> _Pass:
    recipe = ground.recipe
    if recipe.model.adapter is None and recipe.warmup.epochs and checkpoint_epochs(ground.asked):
        base = ground.base()
        warmed, k = warm_up(ground, base), recipe.warmup.epochs
        one = _Pass(ground, base, warmed.at(k - 1), {}, economy=run_economy(ground))
        return replace(one, beside=_beside(one, warmed, k))
    return _Pass(ground, *scored_model(ground), economy=run_economy(ground))


def run_economy(ground: Ground) -> Economy:
    """Return what the gradient passes of a run leave out."""
    return economy_of(ground.recipe.score, ground.tokens.pool.lengths)


def scored_model(ground: Ground) -> tuple[Base, nn.Module, dict[str, Any]]:
    """Return the model at the checkpoint where gradients are taken.

    Returns:
        Its base, the model itself, and what decides gradients and leaves no mark in the weights.
    """
    recipe = ground.recipe
    base = ground.base()
    model = warmed_model(ground, base)
    untold: dict[str, Any] = {}
    if recipe.model.adapter is not None:
        untold = {"adapter_files": adapter_fingerprint(recipe.model.adapter)}
    elif not recipe.warmup.epochs:
        untold = {"adapter_section": recipe.adapter.model_dump()}
    return base, model, untold


def checkpoint_stores(ground: Ground, reading: ReadsCheckpoints) -> list[tuple[StoredPool, float]]:
    """Run, resume or read a gradient pass at each checkpoint, for the targets of all tasks.

    Args:
        ground: of the run.
        reading: which checkpoints, and how pool gradients are looked at.

    Returns:
        The passes, oldest checkpoint first, each with the mean learning rate that led to it.

    Raises:
        ConfigError: there are fewer checkpoints, or Adam's moments were not kept.
    """
    n, view = n_checkpoints(ground.recipe, reading), reading.view
    if (n, view) not in ground.passes:
        found = [(one.run(), rate) for one, rate in _checkpoint_passes(ground, n, view)]
        ground.passes[n, view] = found
    return ground.passes[n, view]


def _checkpoint_passes(ground: Ground, n: int, view: View) -> Iterator[tuple[_Pass, float]]:
    """Yield the pass at each checkpoint with its learning rate, oldest first.

    They share one model, which goes on to the next checkpoint: be done with one before asking on.
    """
    recipe = ground.recipe
    own = recipe.model.adapter
    base = ground.base()
    if own is None:
        keep_epochs(ground, n)
        warmed = warm_up(ground, base)
    else:
        warmed = own_checkpoints(ground, base, n)
    for k, checkpoint in enumerate(warmed.checkpoints[:n], start=1):
        one = _Pass(
            ground,
            base,
            warmed.at(k - 1),
            {} if own is None else {"adapter_files": checkpoints_fingerprint(checkpoint.path)},
            view,
            None if view.adam == "none" else warmed.moments(k - 1),
            _label(recipe, k, n, view),
            run_economy(ground),
        )
        yield replace(one, beside=_beside(one, warmed, k)), checkpoint.learning_rate


def _beside(one: _Pass, warmed: Warmed, k: int) -> tuple[_Pass, ...]:
    """Return the other passes at checkpoint `k` that scorers of the recipe will read."""
    recipe = one.ground.recipe
    is_ours = recipe.model.adapter is None
    looks: dict[str, View] = {}
    for entry, options in scorers(one.ground.asked):
        if "checkpoints" in entry.needs:
            reading: ReadsCheckpoints = entry.parse(dict(options))
            n = n_checkpoints(recipe, reading)
            if k <= n:
                looks[_label(recipe, k, n, reading.view)] = reading.view
        elif "gradients" in entry.needs and k == recipe.warmup.epochs and is_ours:
            looks[""] = View()
    return tuple(
        replace(
            one,
            view=view,
            moments=None if view.adam == "none" else warmed.moments(k - 1),
            label=label,
        )
        for label, view in looks.items()
        if label != one.label
    )


def shares_passes(name: str) -> bool:
    """Return whether a scorer takes gradients, which several processes can share."""
    return bool({"gradients", "checkpoints"} & set(get("data_scorer", name).needs))


def share_passes(ground: Ground, name: str, options: dict[str, object]) -> Worked:
    """Do this process's part of the gradient passes that a scorer reads.

    Args:
        ground: of the run; its `hands` say what is this process's.
        name: of a scorer that takes gradients.
        options: its options, as the recipe gives them.

    Returns:
        How far all passes together are.
    """
    entry = get("data_scorer", name, where="score.method")
    found: list[Worked] = []
    if "gradients" in entry.needs:
        worked, ground.stored = _plain_pass(ground).share()
        found.append(worked)
    else:
        reading: ReadsCheckpoints = entry.parse(options, where="score.options")
        n, view = n_checkpoints(ground.recipe, reading), reading.view
        passes: list[tuple[StoredPool, float]] = []
        for one, rate in _checkpoint_passes(ground, n, view):
            worked, stored = one.share()
            found.append(worked)
            if stored is not None:
                passes.append((stored, rate))
        if len(passes) == len(found):
            ground.passes[n, view] = passes
    return Worked(
        sum(w.n_computed for w in found),
        sum(w.n_done for w in found),
        sum(w.n_shards for w in found),
    )


def _label(recipe: Recipe, k: int, n: int, view: View) -> str:
    """Return what the pass at checkpoint `k` of `n` is called."""
    # The pass that other scorers take at the one checkpoint they read has no name of its own.
    is_theirs = n == 1 if recipe.model.adapter is not None else k == recipe.warmup.epochs
    if is_theirs and view.is_plain:
        return ""
    parts = [part.replace(":", "-") for part in (view.adam, view.projection) if part != "none"]
    return "-".join([str(k), *parts])


def evidence_steps(recipe: Recipe, name: str, options: dict[str, object]) -> list[str]:
    """Return the steps that gather what a scorer reads, as `Ground.costs` calls them.

    Args:
        recipe: of the run.
        name: of the scorer.
        options: its options, as the recipe gives them.
    """
    entry = get("data_scorer", name, where="score.method")
    found = [step for need, step in _STEPS.items() if need in entry.needs]
    labels: list[str] = [""] if "gradients" in entry.needs else []
    if "checkpoints" in entry.needs:
        reading: ReadsCheckpoints = entry.parse(options, where="score.options")
        n = n_checkpoints(recipe, reading)
        labels = [_label(recipe, k, n, reading.view) for k in range(1, n + 1)]
    if labels:
        found += ["warmup", *(f"gradients {label}".strip() for label in labels)]
    return found


def targets(ground: Ground) -> list[Target]:
    """Return the targets of all tasks in one list, as the gradient pass takes them."""
    found: list[Target] = []
    for task, tokenized in ground.tokens.targets.items():
        groups = {e.id: e.group for e in ground.prepared.targets[task]}
        found += [Target(tokens, task, groups[tokens.id]) for tokens in tokenized]
    return found


def _shortened_targets(ground: Ground, economy: Economy) -> list[Target]:
    aims = targets(ground)
    short = economy.shortened([t.tokens for t in aims])
    return [replace(t, tokens=own) for t, own in zip(aims, short, strict=True)]


def hidden_states(ground: Ground) -> StateFacts:
    """Return how alike candidates and the targets of all tasks are, under the untouched base."""
    if ground.states is None:
        ground.states = _hidden_states(ground)
    return ground.states


def _hidden_states(ground: Ground) -> StateFacts:
    base = ground.base()
    made_from = _of_base(ground, base)
    path = ground.place("states", "states", made_from)
    aims, pool = targets(ground), ground.tokens.pool
    with ground.making(path):
        if not ground.is_done(path, "states", made_from):
            with (
                ground.charge("states", path),
                ground.progress.phase("hidden states", len(pool), "examples") as advance,
            ):
                facts = state_similarity(
                    base.model,
                    pool,
                    [t.tokens for t in aims],
                    groups=[t.group for t in aims],
                    pad_id=base.pad_id,
                    precision=base.precision,
                    token_budget=ground.recipe.score.token_budget,
                    advance=advance,
                )
                with staged(path, kind="states", meta={"fingerprint": made_from}) as stage:
                    cosines = {"weighted": facts.weighted, "mean": facts.mean}
                    stage.write_tensors("cosines.safetensors", cosines)
            return facts
    ground.recall("states", path)
    read = open_dir(path, kind="states").read_tensors("cosines.safetensors")
    return StateFacts(
        _array(read["weighted"]),
        _array(read["mean"]),
        tuple(t.tokens.id for t in aims),
        tuple(t.group for t in aims),
    )


def _of_base(ground: Ground, base: Base) -> str:
    """Return a fingerprint of what decides a forward pass of the untouched base over the data."""
    return digest(
        {
            "base": base.fingerprint,
            "tokens": ground.tokens.fingerprint,
            "precision": base.precision,
            "token_budget": ground.recipe.score.token_budget,
        }
    )


def base_losses(ground: Ground) -> Float[np.ndarray, " n"]:
    """Return the loss of every candidate under the untouched base, in nats per target token."""
    base = ground.base()
    made_from = _of_base(ground, base)
    path = ground.place("losses", "losses", made_from)
    pool = ground.tokens.pool
    with ground.making(path):
        if not ground.is_done(path, "losses", made_from):
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
                with staged(path, kind="losses", meta={"fingerprint": made_from}) as stage:
                    stage.write_tensors("losses.safetensors", {"losses": losses})
    ground.recall("losses", path)
    return _array(open_dir(path, kind="losses").read_tensors("losses.safetensors")["losses"])


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
    by_task = dict.fromkeys(ground.tasks, evidence)
    fast: dict[str, Any] = {}
    if ground.recipe.score.fast and shares_passes(name):
        fast = {"fast": _alike(ground, entry, parsed)}
    if "gradients" in entry.needs:
        stored = gradient_store(ground)
        _refuse_other_pool(stored, evidence)
        for task in by_task:
            by_task[task] = replace(evidence, gradients=stored.of_task(task))
    elif "checkpoints" in entry.needs:
        passes = checkpoint_stores(ground, parsed)
        _refuse_other_pool(passes[0][0], evidence)
        for task in by_task:
            facts = tuple(CheckpointFacts(stored.of_task(task), lr) for stored, lr in passes)
            by_task[task] = replace(evidence, checkpoints=facts)
    elif "hidden_states" in entry.needs:
        states = hidden_states(ground)
        places = [t.task for t in targets(ground)]
        for task in by_task:
            columns = [j for j, place in enumerate(places) if place == task]
            by_task[task] = replace(evidence, states=states.of(columns))
    else:
        return entry.function(evidence, parsed)
    scores = _joined({task: _score_task(entry, e, parsed, task) for task, e in by_task.items()})
    return replace(scores, about={**scores.about, **fast})


def _alike(ground: Ground, entry: Entry, options: object) -> dict[str, Any]:
    """Score a random probe fully and cheaply, and say how alike the two orders are.

    Returns:
        The values that make passes cheaper, the number and ids of the probe's examples, Spearman's
        correlation.
    """
    probe = probe_of(ground.tokens.pool, ground.recipe.seed)
    cheap = run_economy(ground)
    found = {Economy(): _probed(ground, entry, options, probe, Economy())}
    found[cheap] = _probed(ground, entry, options, probe, cheap)
    alike = rank_correlation(found[cheap].score, found[Economy()].score)
    facts = {
        "settings": cheap.facts,
        "n_probe": len(probe),
        "ids": [t.id for t in probe],
        "spearman": round(alike, 4),
    }
    ground.progress.note(told_fast(facts))
    return facts


def _probed(
    ground: Ground, entry: Entry, options: object, probe: tuple[Tokens, ...], economy: Economy
) -> Scores:
    """Return the scores of a few examples, from gradient passes over them alone."""
    how = "fast" if economy.facts else "full"

    def over_probe(one: _Pass) -> StoredPool:
        label = f"{how}-{one.label}" if one.label else how
        return replace(one, economy=economy, probe=probe, label=label, beside=()).run()

    n_targets = np.asarray([int(t.is_target.sum()) for t in probe])
    evidence = Evidence(tuple(t.id for t in probe), n_targets, seed=ground.recipe.seed)
    if "gradients" in entry.needs:
        stored = over_probe(_plain_pass(ground))
        by_task = {t: replace(evidence, gradients=stored.of_task(t)) for t in ground.tasks}
    else:
        assert isinstance(options, ReadsCheckpoints)
        n, view = n_checkpoints(ground.recipe, options), options.view
        passes = [(over_probe(one), lr) for one, lr in _checkpoint_passes(ground, n, view)]
        by_task = {
            t: replace(
                evidence, checkpoints=tuple(CheckpointFacts(s.of_task(t), lr) for s, lr in passes)
            )
            for t in ground.tasks
        }
    return _joined({task: _score_task(entry, e, options, task) for task, e in by_task.items()})


def score_shortlist(
    ground: Ground,
    name: str,
    options: dict[str, object],
    *,
    base: Base,
    model: nn.Module,
    tokens: Sequence[Tokens],
    path: Path,
    made_from: str,
) -> Scores:
    """Score some examples by their gradients at a model as it is now, for every task of the run.

    What the recipe makes cheaper in the pass over the pool is as cheap here.

    Args:
        ground: of the run.
        name: of a scorer that reads gradients.
        options: its options.
        base: the model's base.
        model: whatever is trainable in it counts.
        tokens: the examples.
        path: of the gradient pass, which resumes by shard.
        made_from: fingerprint of what led to the model.

    Raises:
        SelectionError: the scorer cannot say anything with these targets.
    """
    entry = get("data_scorer", name)
    parsed = entry.parse(options)
    section, economy = ground.recipe.score, run_economy(ground)
    store = GradientStore(path, {"made_from": made_from, "model": trainable_fingerprint(model)})
    if store.is_stale():
        remove(path)
    with only_layers(model, economy.layers):
        stored = store.compute(
            GradientEngine(model, precision=economy.precision_on(base)),
            economy.shortened(tokens),
            _shortened_targets(ground, economy),
            pad_id=base.pad_id,
            token_budget=section.token_budget,
            shard_examples=section.shard_examples,
            progress=ground.progress,
        )
    evidence = Evidence(stored.ids, stored.n_target_tokens, seed=ground.recipe.seed)
    return _joined(
        {
            task: _score_task(entry, replace(evidence, gradients=facts), parsed, task)
            for task, facts in ((task, stored.of_task(task)) for task in ground.tasks)
        }
    )


def _refuse_other_pool(stored: StoredPool, evidence: Evidence) -> None:
    if stored.ids != evidence.ids:
        raise IncompatibleRunError("the gradient store holds another pool", where="store")


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
