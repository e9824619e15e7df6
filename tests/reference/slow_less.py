"""LESS and TracIn by explicit vectors in fp64 and plain loops, close to the papers' text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from slow_gist import slow_cosine


@dataclass(frozen=True)
class Moment:
    """What a checkpoint holds: gradients of pool and targets, one row each, and Adam's state."""

    pool: np.ndarray
    targets: np.ndarray
    m: np.ndarray
    v: np.ndarray
    n_steps: int
    learning_rate: float


def slow_adam(g: np.ndarray, at: Moment, form: str) -> np.ndarray:
    """Return Adam's step at one gradient, number by number."""
    out = np.zeros_like(g)
    for i in range(len(g)):
        m = 0.9 * at.m[i] + 0.1 * g[i]
        v = 0.999 * at.v[i] + 0.001 * g[i] ** 2
        if form == "release":
            out[i] = m / math.sqrt(v + 1e-8)
        elif form == "textbook":
            t = at.n_steps + 1
            out[i] = m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        else:
            out[i] = g[i]
    return out


def slow_less(
    moments: Sequence[Moment],
    subtasks: Sequence[str],
    *,
    form: str = "release",
    aggregate: str = "mean_of_cosines",
    R: np.ndarray | None = None,
) -> list[float]:
    """Return LESS's scores.

    Args:
        moments: the checkpoints.
        subtasks: label of each target.
        form: of Adam.
        aggregate: of the targets of a subtask.
        R: a projection, [k, d].
    """
    total_lr = sum(at.learning_rate for at in moments)
    scores: list[float] = []
    for n in range(len(moments[0].pool)):
        by_subtask = dict.fromkeys(sorted(set(subtasks)), 0.0)
        for at in moments:
            step = slow_adam(at.pool[n], at, form)
            targets = list(at.targets)
            if R is not None:
                step, targets = R @ step, [R @ v for v in targets]
            for name in by_subtask:
                own = [v for v, s in zip(targets, subtasks, strict=True) if s == name]
                if aggregate == "mean_of_cosines":
                    value = sum(slow_cosine(step, v) for v in own) / len(own)
                else:
                    value = slow_cosine(step, np.mean(own, axis=0))
                by_subtask[name] += at.learning_rate / total_lr * value
        scores.append(max(by_subtask.values()))
    return scores


def slow_tracin(moments: Sequence[Moment], aggregate: str = "mean") -> list[float]:
    """Return TracIn's scores."""
    scores: list[float] = []
    for n in range(len(moments[0].pool)):
        influence = [0.0] * len(moments[0].targets)
        for at in moments:
            for j, v in enumerate(at.targets):
                influence[j] += at.learning_rate * float(at.pool[n] @ v)
        scores.append(max(influence) if aggregate == "max" else sum(influence) / len(influence))
    return scores
