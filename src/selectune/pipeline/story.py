"""What a run tells in its report: results turned into the report's plain values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selectune.data import Example
from selectune.evaluation import Evaluation, Metric, Verdict, compare_paired, mean_interval
from selectune.gradients.facts import COPY
from selectune.pipeline.arms import SELECTED, TunedArm
from selectune.pipeline.economy import told_fast
from selectune.pipeline.ground import Ground
from selectune.pipeline.prices import forward_share
from selectune.pipeline.ranks import rank_correlation
from selectune.pipeline.scoring import shares_passes
from selectune.pipeline.warmup import epochs_run, n_warmup_steps
from selectune.pipeline.weight_story import tell_weights
from selectune.registry import get
from selectune.report import (
    Difference,
    Level,
    Phase,
    PoolTable,
    ReportData,
    ShownExample,
    TargetSpectrum,
    TokenMap,
    TrainingFacts,
    facts_of,
    parts_of,
)
from selectune.report import Verdict as Told
from selectune.report.weight_facts import WeightFacts
from selectune.selection import Scores, Selection
from selectune.weights.delta import SparseDelta

_SHOWN = 8
_FEW_STEPS = 8  # of a warm-up, after which LoRA's lora_B has hardly moved
_SHOWN_MAPS = 3
_NEAR_SHOWN = 5
_METRICS: tuple[Metric, ...] = ("answer_loss", "correct_norm", "correct_raw")


def tell(
    ground: Ground,
    *,
    scores: Scores,
    selection: Selection,
    arms: Sequence[TunedArm],
    answers: Mapping[str, Mapping[str, Evaluation]],
    verdict: Verdict | None,
    tokens: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
) -> ReportData:
    """Return everything that the page of a run shows."""
    recipe = ground.recipe
    by_id = {e.id: e for e in ground.prepared.candidates}
    lengths = {t.id: len(t.input_ids) for t in ground.tokens.pool}
    tasks = scores.about.get("tasks", {})
    energy = scores.columns.get("energy")
    ranking = scores.ranking()
    entry = get("data_scorer", scores.method)
    reasons = [reason.split(":")[0] for reason in ground.dropped.values()]
    return ReportData(
        title=ground.out.name,
        pool=PoolTable(
            ids=scores.ids,
            sources=[by_id[i].source for i in scores.ids],
            n_tokens=np.asarray([lengths[i] for i in scores.ids]),
            scores=_by_task(scores),
            energy={"": energy} if energy is not None else {},
        ),
        selected_ids=selection.ids,
        recipe_yaml=recipe.resolved_yaml(),
        verdicts={"": Told(text=verdict.text, code=verdict.code, advice=verdict.advice)}
        if verdict
        else {},
        facts={
            "base model": recipe.model.base,
            "targets": ", ".join(f"{t} ({len(ground.tokens.targets[t])})" for t in ground.tasks),
            "budget": str(recipe.select.budget),
            "seed": str(recipe.seed),
            **({"gradients": told_fast(scores.about["fast"])} if "fast" in scores.about else {}),
            **_warmup_told(ground),
            **_refreshes_told(arms),
        },
        method=scores.method,
        method_summary=entry.summary,
        levels=_levels(ground, answers),
        differences=_differences(ground, answers),
        spectra=[
            TargetSpectrum(task=task, eigenvalues=about["eigenvalues"], rank=about["rank"])
            for task, about in tasks.items()
            if "eigenvalues" in about
        ],
        best=[_shown(ground, scores, selection, by_id[i]) for i in ranking[:_SHOWN]],
        worst=[_shown(ground, scores, selection, by_id[i]) for i in ranking[: -_SHOWN - 1 : -1]],
        token_maps=_token_maps(ground, tokens),
        loss_curves={arm.name: arm.result.losses for arm in arms},
        training=_training(ground, arms),
        weights=_weights(arms),
        phases=_phases(ground, arms),
        left_out={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        warnings=[*_warnings(ground, scores, selection)],
        run=run,
    )


def _warmup_told(ground: Ground) -> dict[str, str]:
    cost = ground.costs.get("warmup", {})
    if "overlaps" not in cost:
        return {}
    overlaps = ", ".join(f"{value:.2f}" for value in cost["overlaps"]) or "not yet known"
    return {"warm-up": f"{cost['n_steps']} steps; overlap of target spaces {overlaps}"}


def _refreshes_told(arms: Sequence[TunedArm]) -> dict[str, str]:
    return {
        f"chosen anew for {arm.name}": "; ".join(
            f"after step {r.step}, {r.n_new} of {r.n} new, from a shortlist of {r.n_shortlist}"
            for r in arm.refreshes
        )
        for arm in arms
        if arm.refreshes
    }


def _by_task(scores: Scores) -> dict[str, np.ndarray]:
    found = {n[5:]: column for n, column in scores.columns.items() if n.startswith("task:")}
    return found or {"": scores.score}


def _levels(ground: Ground, answers: Mapping[str, Mapping[str, Evaluation]]) -> list[Level]:
    levels: list[Level] = []
    for arm, by_task in answers.items():
        for task, found in by_task.items():
            for metric in _METRICS:
                if metric != "answer_loss" and found.accuracy is None:
                    continue
                interval = mean_interval(found, metric, n_boot=ground.recipe.evaluate.intervals)
                levels.append(
                    Level(
                        arm=arm,
                        task=task,
                        metric=metric,
                        n=interval.n,
                        value=interval.mean_difference,
                        low=interval.low,
                        high=interval.high,
                    )
                )
    return levels


def _differences(
    ground: Ground, answers: Mapping[str, Mapping[str, Evaluation]]
) -> list[Difference]:
    found: list[Difference] = []
    for other in (name for name in answers if name != SELECTED):
        for task, mine in answers[SELECTED].items():
            for metric in _METRICS:
                if metric != "answer_loss" and mine.accuracy is None:
                    continue
                interval = compare_paired(
                    mine,
                    answers[other][task],
                    n_boot=ground.recipe.evaluate.intervals,
                    seed=ground.recipe.seed,
                    metric=metric,
                )
                found.append(
                    Difference(
                        arm=SELECTED,
                        against=other,
                        task=task,
                        metric=metric,
                        n=interval.n,
                        value=interval.mean_difference,
                        low=interval.low,
                        high=interval.high,
                    )
                )
    return found


def _shown(ground: Ground, scores: Scores, selection: Selection, example: Example) -> ShownExample:
    n = scores.ids.index(example.id)
    energy = scores.columns.get("energy")
    target = scores.best_target[n] if scores.best_target else ""
    place = next(
        (
            (task, e)
            for task, examples in ground.prepared.targets.items()
            for e in examples
            if e.id == target
        ),
        None,
    )
    return ShownExample(
        id=example.id,
        source=example.source,
        origin=example.origin,
        parts=parts_of(example.content),
        score=float(scores.score[n]),
        energy=None if energy is None else float(energy[n]),
        is_selected=example.id in selection,
        target_task=place[0] if place else "",
        target_id=target,
        target_parts=parts_of(place[1].content) if place else (),
        note=selection.reasons.get(example.id, ""),
    )


def _token_maps(ground: Ground, rows: Sequence[Mapping[str, Any]]) -> list[TokenMap]:
    """Return the first and the last few examples of each task, which stand best first."""
    found: list[TokenMap] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        few = own if len(own) <= 2 * _SHOWN_MAPS else [*own[:_SHOWN_MAPS], *own[-_SHOWN_MAPS:]]
        found += [
            TokenMap(
                id=row["id"],
                task=task,
                source=ground.prepared.sources[row["id"]],
                place=own.index(row) + 1,
                n=len(own),
                form=row["form"],
                score=row["score"],
                tokens=row["tokens"],
                scores=row["scores"],
            )
            for row in few
        ]
    return found


def _phases(ground: Ground, arms: Sequence[TunedArm]) -> list[Phase]:
    recipe, n_pool = ground.recipe, len(ground.tokens.pool)
    share = {arm.name: arm.n_examples / n_pool for arm in arms}
    forward = forward_share(trains_weights=recipe.adapter.kind == "full")
    phases: list[Phase] = []
    for name, cost in ground.costs.items():
        kind, _, arm = name.partition(" ")
        epochs = {
            "warmup": recipe.warmup.fraction * epochs_run(ground),
            "gradients": 1.0,
            "losses": forward,
            "states": forward,
            "tune": share.get(arm, 0.0) * recipe.tune.epochs,
        }.get(kind)
        phases.append(
            Phase(
                name=name,
                seconds=float(cost["seconds"]),
                peak_bytes=cost["peak_bytes"],
                pool_epochs=epochs,
            )
        )
    return phases


def _weights(arms: Sequence[TunedArm]) -> WeightFacts | None:
    sparse = {arm.name: arm for arm in arms if arm.mask is not None}
    deltas = {name: SparseDelta.load(arm.path) for name, arm in sparse.items()}
    return tell_weights(
        {name: arm.mask for name, arm in sparse.items() if arm.mask is not None},
        plane=next((arm.plane for arm in sparse.values()), None),
        moved={name: int(delta.about["n_moved"]) for name, delta in deltas.items()},
        deltas=deltas,
    )


def _training(ground: Ground, arms: Sequence[TunedArm]) -> list[TrainingFacts]:
    """Return what the training method did in each arm; nothing for plain training."""
    pool = ground.tokens.pool
    n_tokens = {t.id: int(n) for t, n in zip(pool, pool.n_targets, strict=True)}
    found = [facts_of(arm.name, arm.result.records, n_tokens) for arm in arms]
    return [facts for facts in found if facts is not None]


def _warnings(ground: Ground, scores: Scores, selection: Selection) -> list[str]:
    """Return what the numbers of a selection warn of, with the thresholds that say so."""
    found = [*ground.prepared.notes[1:]]
    chosen = np.isin(np.asarray(scores.ids), np.asarray(selection.ids))
    lengths = np.asarray([len(t.input_ids) for t in ground.tokens.pool], np.float64)
    correlation = rank_correlation(scores.score, lengths)
    if scores.method != "length" and abs(correlation) > 0.5:
        found.append(
            f"Scores follow the length of the examples (Spearman {correlation:+.2f}): compare with "
            "score.method=length."
        )
    for task, about in scores.about.get("tasks", {}).items():
        found += _target_warnings(task, about)
    energy = scores.columns.get("energy")
    if energy is not None and float(np.median(energy[chosen])) < 0.1:
        found.append(
            f"The target space holds {float(np.median(energy[chosen])):.0%} of the median chosen "
            "gradient: it says little about these examples. Try score.options.energy=multiply."
        )
    norm = scores.columns.get("norm")
    if norm is not None and (n := int((norm[chosen] < 0.01 * np.median(norm)).sum())):
        found.append(f"{n} chosen examples have gradients below 1 % of the median: learnt already.")
    if (
        scores.method in ("gist", "grad_cosine", "less", "tracin")
        and (scores.score[chosen] <= 0).any()
    ):
        n = int((scores.score[chosen] <= 0).sum())
        found.append(f"{n} chosen examples point away from the target: the budget is too large.")
    sources = [ground.prepared.sources[i] for i in selection.ids]
    top = max(set(sources), key=sources.count)
    if len(set(ground.prepared.sources.values())) > 1 and sources.count(top) > 0.9 * len(sources):
        found.append(f"{sources.count(top) / len(sources):.0%} of the selection come from {top}.")
    if shares_passes(scores.method) and ground.recipe.model.adapter is None:
        n = n_warmup_steps(ground)
        if n == 0:
            found.append("The adapter was never warmed up: scores rest on lora_B alone.")
        elif n < _FEW_STEPS:
            found.append(
                f"The warm-up had {n} step{'s' * (n > 1)}: raise warmup.epochs or warmup.fraction."
            )
    return found


def _target_warnings(task: str, about: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    n = about.get("n_targets", 0)
    if 0 < n < 8:
        found.append(f"Task {task} has {n} target examples: fewer than 8 make a fragile space.")
    rank = about.get("rank")
    if rank is not None and rank >= 0.9 * n:
        found.append(f"Task {task} uses rank {rank} of {n} targets: nothing is filtered.")
    if rank is not None and rank <= 3:
        found.append(f"Task {task} has rank {rank}: a cosine in so few dimensions saturates.")
    near = about.get("near_targets", [])
    if near:
        told = ", ".join(f"{example} to {target}" for example, target, _ in near[:_NEAR_SHOWN])
        more = f" and {len(near) - _NEAR_SHOWN} more" if len(near) > _NEAR_SHOWN else ""
        found.append(
            f"Gradients of the pool nearly equal those of targets of {task} (cosine above {COPY}), "
            f"as a copy's would: {told}{more}."
        )
    squares = np.sort(np.square(about.get("target_norms", [])))[::-1]
    if len(squares) >= 8 and squares[: max(1, len(squares) // 10)].sum() > 0.5 * squares.sum():
        found.append(
            f"A tenth of the targets of {task} hold more than half of the gradient energy: try "
            "score.options.normalize_targets=true."
        )
    return found
