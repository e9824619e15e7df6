"""GIST by explicit vectors: dense SVD in fp64 and plain loops, close to the paper's text."""

import hashlib
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


def slow_rank_by_gap(singular: np.ndarray) -> int:
    """Return the rank before the largest ratio of neighbours, among 2 to half of them."""
    sound = [float(s) for s in singular if s > 1e-4 * singular[0]]
    best, largest = len(sound), 0.0
    for r in range(2, len(sound) // 2 + 1):
        ratio = sound[r - 1] ** 2 / sound[r] ** 2
        if ratio > largest:
            best, largest = r, ratio
    return best


def slow_rank_left_out(targets: np.ndarray) -> int:
    """Return the smallest rank from 2 within a standard error of the best for a target left out."""
    m = len(targets)
    shares: list[list[float]] = []
    for j in range(m):
        v = targets[j].astype(np.float64)
        others = np.stack([targets[i] for i in range(m) if i != j]).astype(np.float64)
        P, singular, _ = np.linalg.svd(others.T, full_matrices=False)
        n_sound = sum(s > 1e-4 * singular[0] for s in singular)
        held: list[float] = []
        for r in range(1, m):
            inside = [float(P[:, k] @ v) ** 2 for k in range(min(r, n_sound))]
            held.append(sum(inside) / float(v @ v))
        shares.append(held)
    means = [sum(held[k] for held in shares) / m for k in range(m - 1)]
    best = max(range(m - 1), key=lambda k: means[k])
    variance = sum((held[best] - means[best]) ** 2 for held in shares) / (m - 1)
    error = math.sqrt(variance / m)
    return next(k + 1 for k in range(1, m - 1) if means[k] >= means[best] - error)


def slow_rank_by_split(targets: np.ndarray, ids: list[str], share: float, seed: int) -> int:
    """Return the smallest rank from 2 with a share of what halves hold of each other."""

    def draw(k: int, target: str) -> str:
        return hashlib.sha256(f"halves:{seed}:{k}:{target}".encode()).hexdigest()

    n = len(ids)
    held = [0.0] * (n - n // 2 + 1)
    for k in range(20):
        order = sorted(ids, key=lambda target: draw(k, target))
        for mine in (order[: n // 2], order[n // 2 :]):
            V = np.stack([targets[ids.index(t)] for t in mine]).astype(np.float64)
            others = [targets[ids.index(t)].astype(np.float64) for t in ids if t not in mine]
            P, singular, _ = np.linalg.svd(V.T, full_matrices=False)
            n_sound = sum(s > 1e-4 * singular[0] for s in singular)
            energy = sum(float(v @ v) for v in others)
            for r in range(1, len(held)):
                space = P[:, : min(r, n_sound)]
                held[r] += sum(float(np.sum((space.T @ v) ** 2)) for v in others) / energy
    return next(r for r in range(2, len(held)) if held[r] >= share * held[-1] * (1 - 1e-12))


def slow_overlap(one: np.ndarray, other: np.ndarray, share: float) -> float:
    """Return ||P_1^T P_2||_F^2 / max(r_1, r_2) of two sets of target gradients, one row each."""
    spaces: list[np.ndarray] = []
    for targets in (one, other):
        P, singular, _ = np.linalg.svd(targets.T.astype(np.float64), full_matrices=False)
        spaces.append(P[:, : slow_rank(singular, share)])
    both = spaces[0].T @ spaces[1]
    return float(np.sum(both**2)) / max(P.shape[1] for P in spaces)
