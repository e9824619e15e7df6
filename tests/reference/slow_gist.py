"""GIST by explicit vectors: dense SVD in fp64 and plain loops, close to the paper's text."""

import math

import numpy as np


def slow_rank(singular: np.ndarray, share: float) -> int:
    """Return the smallest rank whose squared singular values hold `share` of their sum."""
    total = sum(float(s) ** 2 for s in singular)
    held = 0.0
    for r, s in enumerate(singular, start=1):
        held += float(s) ** 2
        if held >= share * total * (1 - 1e-12):
            return r
    return len(singular)


def slow_cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the cosine of two vectors, 0 where one is zero."""
    norms = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(x @ y) / norms if norms > 0 else 0.0


def slow_gist(
    pool: np.ndarray,
    targets: np.ndarray,
    *,
    share: float = 0.95,
    rank: int | None = None,
    subtasks: list[str] | None = None,
) -> tuple[list[float], list[float], int]:
    """Return scores, captured energies and the rank; subtasks switch to the release's means.

    Args:
        pool: gradients, one row per example.
        targets: gradients, one row per target.
        share: of the energy, for the rank.
        rank: a fixed one instead.
        subtasks: label of each target.
    """
    P, singular, _ = np.linalg.svd(targets.T.astype(np.float64), full_matrices=False)
    sound = [s for s in singular if s > 1e-4 * singular[0]]
    r = slow_rank(np.asarray(sound), share) if rank is None else min(rank, len(sound))
    P = P[:, :r]
    coordinates = [P.T @ v for v in targets.astype(np.float64)]
    if subtasks is not None:
        coordinates = [
            np.mean([c for c, s in zip(coordinates, subtasks, strict=True) if s == name], axis=0)
            for name in sorted(set(subtasks))
        ]
    scores: list[float] = []
    energies: list[float] = []
    for g in pool.astype(np.float64):
        x = P.T @ g
        scores.append(max(slow_cosine(x, c) for c in coordinates))
        energies.append(math.sqrt(float(x @ x)) / math.sqrt(float(g @ g)))
    return scores, energies, r
