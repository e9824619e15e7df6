"""What tuning on one task does to the others: transfer, forgetting, collapse.

Round-robin: tune on each of n tasks, test on all of them. With A the accuracy of the model tuned on
r, V the untouched base's, and "the other tasks" all m ≠ r:

    in distribution   A[r, r]
    out of it         A_r, the mean of A[r, m] over the other tasks; its gain is A_r - V_r
    forget ratio      max(0, (V_r - A_r) / V_r); undefined at V_r = 0, left out there and counted
    collapse          percent of the other tasks with A[r, m] < 1 %; generated answers only

each of them averaged over r and over seeds. Some option is always the likeliest, so accuracy by
likelihood cannot collapse and is not asked to. Loss on generic text, which knows no answer format,
is the plainer measure of what was forgotten: `generic_text`.

Intervals draw questions and seeds as `intervals` does: one draw of a task's questions serves every
model and the base; tasks are not drawn, they are the ones named. A forget ratio is cut off at 0, so
noise can only raise it: read it beside the gain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from selectune.errors import DataError
from selectune.evaluation.estimate import LEVELS, Estimate
from selectune.evaluation.generation import Generation
from selectune.evaluation.options import Evaluation

Scoring = Literal["generated", "likelihood"]
Metric = Literal["id_accuracy", "ood_accuracy", "ood_gain", "forget_ratio", "collapse_percent"]

_RANGES: dict[Metric, tuple[float, float]] = {
    "id_accuracy": (0.0, 1.0),
    "ood_accuracy": (0.0, 1.0),
    "ood_gain": (-1.0, 1.0),
    "forget_ratio": (0.0, 1.0),
    "collapse_percent": (0.0, 100.0),
}
_COLLAPSED = 0.01
_CHUNK_ELEMENTS = 1 << 22  # draws held at once: 32 MB, whatever the number of questions


@dataclass(frozen=True, slots=True, eq=False)
class RoundRobin:
    """Who answered which question right: models tuned on each task, and the base, on every task.

    Args:
        tasks: their names; trained and tested tasks stand in this order everywhere.
        scoring: how answers were judged.
        questions: ids of each tested task's questions.
        right: per tested task, 1 where right: [trained task, seed, question].
        base: per tested task, the same for the untouched base: [question].
    """

    tasks: tuple[str, ...]
    scoring: Scoring
    questions: tuple[tuple[str, ...], ...]
    right: tuple[np.ndarray, ...]
    base: tuple[np.ndarray, ...]

    @property
    def n_seeds(self) -> int:
        """Models tuned on each task."""
        return self.right[0].shape[1]

    @property
    def accuracy(self) -> Float[np.ndarray, "r m s"]:
        """Share of right answers: trained task, tested task, seed."""
        return np.stack([values.mean(2) for values in self.right], axis=1)

    @property
    def base_accuracy(self) -> Float[np.ndarray, " m"]:
        """Share of right answers of the base."""
        return np.array([values.mean() for values in self.base])


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a round-robin came to.

    Args:
        tasks: the tasks.
        scoring: how answers were judged.
        n_seeds: models tuned on each task.
        base: accuracy of the untouched base, by task.
        estimates: by metric; None where it is undefined. Shares, and collapse in percent.
        by_task: the same values by the task trained on, without intervals.
        n_undefined: trained tasks without a forget ratio, as the base answers no other task.
    """

    tasks: tuple[str, ...]
    scoring: Scoring
    n_seeds: int
    base: dict[str, float]
    estimates: dict[Metric, Estimate | None]
    by_task: dict[str, dict[Metric, float | None]]
    n_undefined: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def right_answers(found: Evaluation | Generation) -> dict[str, bool]:
    """Return which questions a model answered right, by id.

    Ranked answers count by length-normalised likelihood.
    """
    column = "is_right" if isinstance(found, Generation) else "correct_norm"
    pairs = zip(found.column("id"), found.column(column), strict=True)
    return {id: value for id, value in pairs if value is not None}


def round_robin(
    tuned: Mapping[tuple[str, str], Sequence[Mapping[str, bool]]],
    base: Mapping[str, Mapping[str, bool]],
    *,
    scoring: Scoring,
) -> RoundRobin:
    """Put the answers of all models side by side, joined by id.

    Args:
        tuned: by (task trained on, task tested on): `right_answers` of the model of each seed, in
            the same order of seeds everywhere.
        base: by task: those of the untouched base. Its keys are the tasks.
        scoring: how answers were judged.

    Raises:
        DataError: fewer than two tasks, a missing pair, uneven seeds, or different questions.
    """
    tasks = tuple(base)
    if len(tasks) < 2:
        raise DataError(
            f"a round-robin needs at least two tasks, and the base answered {len(tasks)}",
            why="transfer is measured on the tasks that a model was not tuned on",
        )
    pairs = [(r, m) for r in tasks for m in tasks]
    if odd := [*(p for p in pairs if p not in tuned), *(p for p in tuned if p not in pairs)]:
        raise DataError(
            f"{len(odd)} pairs of trained and tested task are missing, or of tasks unknown",
            where=", ".join(f"{r} on {m}" for r, m in odd[:5]),
            why="every model must answer every task that the base answered, and no other",
        )
    n_seeds = {pair: len(tuned[pair]) for pair in pairs}
    if len(set(n_seeds.values())) > 1 or not n_seeds[pairs[0]]:
        raise DataError(
            "every pair of tasks needs the same seeds, at least one",
            where=", ".join(f"{r} on {m}: {n}" for (r, m), n in n_seeds.items())[:200],
            do="evaluate every model on every task",
        )
    questions = tuple(tuple(sorted(base[m])) for m in tasks)
    for m, ids in zip(tasks, questions, strict=True):
        for r in tasks:
            for answers in tuned[r, m]:
                _refuse_other_questions(m, ids, answers)
    right = [
        np.array([[[a[id] for id in ids] for a in tuned[r, m]] for r in tasks], dtype=float)
        for m, ids in zip(tasks, questions, strict=True)
    ]
    untouched = [
        np.array([base[m][id] for id in ids], dtype=float)
        for m, ids in zip(tasks, questions, strict=True)
    ]
    return RoundRobin(tasks, scoring, questions, tuple(right), tuple(untouched))


def transfer_metrics(
    accuracy: Float[np.ndarray, "r m s"], base: Float[np.ndarray, " m"], *, scoring: Scoring
) -> dict[Metric, float | None]:
    """Return the metrics of a table of accuracies, without intervals.

    Args:
        accuracy: shares from 0 to 1, by trained task, tested task and seed.
        base: those of the untouched base, by tested task.
        scoring: how answers were judged; "likelihood" has no collapse.

    Raises:
        DataError: the table is not square, too small, or not of shares.
    """
    n = len(base)
    if accuracy.shape[:2] != (n, n) or n < 2 or not accuracy.shape[2]:
        raise DataError(
            f"accuracies of shape {list(accuracy.shape)} and {n} of the base are no round-robin",
            why="it has as many trained as tested tasks, at least two, and at least one seed",
        )
    if not all(np.all((values >= 0) & (values <= 1)) for values in (accuracy, base)):
        raise DataError("accuracies must be shares between 0 and 1", do="divide percent by 100")
    return {name: _value(found) for name, found in _by_task(accuracy, base, scoring).items()}


def transfer(rounds: RoundRobin, *, n_boot: int = 10_000, seed: int = 0) -> Transfer:
    """Return the metrics of a round-robin with their intervals.

    Args:
        rounds: the answers.
        n_boot: bootstrap draws.
        seed: of the draws.
    """
    found = _by_task(rounds.accuracy, rounds.base_accuracy, rounds.scoring)
    draws = _draws(rounds, n_boot, seed)
    forgotten = found["forget_ratio"]
    return Transfer(
        tasks=rounds.tasks,
        scoring=rounds.scoring,
        n_seeds=rounds.n_seeds,
        base=dict(zip(rounds.tasks, rounds.base_accuracy.tolist(), strict=True)),
        estimates={
            name: _estimate(_mean(values, -2), draws[name], _RANGES[name], seed)
            for name, values in found.items()
        },
        by_task={
            task: {name: _value(values[r]) for name, values in found.items()}
            for r, task in enumerate(rounds.tasks)
        },
        n_undefined=int(np.isnan(forgotten).all(1).sum()),
    )


def compare_transfer(
    a: RoundRobin, b: RoundRobin, *, n_boot: int = 10_000, seed: int = 0
) -> dict[Metric, Estimate | None]:
    """Compare two ways of tuning, seed by seed and question by question.

    Args:
        a: the first way's answers.
        b: the second's, to the same questions and with as many seeds.
        n_boot: bootstrap draws.
        seed: of the draws.

    Returns:
        a - b of each metric; None where it is undefined.

    Raises:
        DataError: the two differ in tasks, questions, seeds or scoring.
    """
    sides = {
        "tasks or order of tasks": (a.tasks, b.tasks),
        "questions": (a.questions, b.questions),
        "numbers of seeds": (a.n_seeds, b.n_seeds),
        "scorings": (a.scoring, b.scoring),
    }
    for what, (one, other) in sides.items():
        if one != other:
            raise DataError(
                f"two round-robins of different {what} cannot be compared",
                why="the comparison is paired: model by model, question by question",
            )
    first, second = (_by_task(x.accuracy, x.base_accuracy, x.scoring) for x in (a, b))
    draws, others = (_draws(x, n_boot, seed) for x in (a, b))  # one seed: the same draws
    return {
        name: _estimate(
            _mean(first[name], -2) - _mean(second[name], -2),
            draws[name] - others[name],
            (-math.inf, math.inf),
            seed,
        )
        for name in first
    }


def _refuse_other_questions(task: str, ids: tuple[str, ...], answers: Mapping[str, bool]) -> None:
    odd = sorted(set(ids) ^ set(answers))
    if odd or not ids:
        raise DataError(
            f"{len(odd)} questions of {task} were not answered by every model"
            if ids
            else f"the base answered no question of {task}",
            where="example " + ", ".join(odd[:5]) if odd else "",
            why="models are compared on the same held-out questions, joined by id",
            do="evaluate all of them on the same file, `data.max_length` and `evaluate.limit`",
        )


def _by_task(
    accuracy: Float[np.ndarray, "*b r m s"], base: Float[np.ndarray, "*b m"], scoring: Scoring
) -> dict[Metric, Float[np.ndarray, "*b r s"]]:
    """Return every metric by trained task and seed; NaN where it is undefined."""
    n = accuracy.shape[-2]
    others = (1 - np.eye(n)) / (n - 1)
    at = np.arange(n)
    vanilla = (base @ others)[..., None]
    # Of differences, so that a model no different from the base gains exactly 0.
    gain = np.einsum("...rms,rm->...rs", accuracy - base[..., None, :, None], others)
    lost = np.full(gain.shape, np.nan)
    np.divide(np.maximum(-gain, 0), vanilla, out=lost, where=vanilla > 0)
    found: dict[Metric, np.ndarray] = {
        "id_accuracy": accuracy[..., at, at, :],
        "ood_accuracy": np.einsum("...rms,rm->...rs", accuracy, others),
        "ood_gain": gain,
        "forget_ratio": lost,
    }
    if scoring == "generated":
        is_collapsed = (accuracy < _COLLAPSED).astype(float)
        found["collapse_percent"] = 100 * np.einsum("...rms,rm->...rs", is_collapsed, others)
    return found


def _draws(rounds: RoundRobin, n_boot: int, seed: int) -> dict[Metric, Float[np.ndarray, "b s"]]:
    """Return every metric of each seed under each draw of questions."""
    rng = np.random.default_rng(seed)
    n, n_seeds = len(rounds.tasks), rounds.n_seeds
    accuracy, base = np.empty((n_boot, n, n, n_seeds)), np.empty((n_boot, n))
    for m, (right, untouched) in enumerate(zip(rounds.right, rounds.base, strict=True)):
        q = len(untouched)
        models = np.concatenate([right.reshape(-1, q), untouched[None]])
        chunk = max(1, _CHUNK_ELEMENTS // q)
        for start in range(0, n_boot, chunk):
            size = min(chunk, n_boot - start)
            picks = rng.integers(q, size=(size, q)) + q * np.arange(size)[:, None]
            counts = np.bincount(picks.flatten(), minlength=size * q).reshape(size, q)
            # Whole numbers until here: 1 % stays 1 %, which is no collapse.
            shares = (counts.astype(float) @ models.T) / q
            rows = slice(start, start + size)
            accuracy[rows, :, m] = shares[:, :-1].reshape(size, n, n_seeds)
            base[rows, m] = shares[:, -1]
    found = _by_task(accuracy, base, rounds.scoring)
    return {name: _mean(values, -2) for name, values in found.items()}


def _estimate(
    own: Float[np.ndarray, " s"],
    draws: Float[np.ndarray, "b s"],
    within: tuple[float, float],
    seed: int,
) -> Estimate | None:
    """Draw seeds on top of questions, spread as `intervals` has it."""
    if np.isnan(own).any():
        return None
    n_seeds = len(own)
    stretch = math.sqrt(n_seeds / (n_seeds - 1)) - 1 if n_seeds > 1 else 0.0
    rng = np.random.default_rng([seed, 1])
    spread = draws + stretch * (own - own.mean())
    means = np.take_along_axis(spread, rng.integers(n_seeds, size=draws.shape), axis=1).mean(1)
    value = float(own.mean())
    # A draw in which the base answers nothing has no forget ratio; and where all draws of a ratio
    # cut off at 0 lie above it, the interval still holds its own estimate.
    known = means[~np.isnan(means)]
    low, high = np.percentile(known, LEVELS).clip(*within) if len(known) else within
    return Estimate(value, min(float(low), value), max(float(high), value))


def _mean(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Return the mean of what is defined, NaN where nothing is."""
    n_known = (~np.isnan(values)).sum(axis)
    out = np.full(n_known.shape, np.nan)
    np.divide(np.nansum(values, axis), n_known, out=out, where=n_known > 0)
    return out


def _value(by_task: np.ndarray) -> float | None:
    known = by_task[~np.isnan(by_task)]
    return float(known.mean()) if len(known) else None
