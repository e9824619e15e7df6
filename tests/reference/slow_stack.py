"""Budgets and stacks of layers in plain loops: add one as long as it fits, merge two at a time."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np


def slow_rank(keep: str, m: int, n: int) -> int:
    """Return the largest rank whose two factors have no more than this share of the numbers."""
    rank = 0
    while (rank + 1) * (m + n) <= Fraction(keep) * m * n:
        rank += 1
    return rank


def slow_count(share: str, n: int) -> int:
    """Return the smallest count that is at least this share."""
    count = 0
    while count < Fraction(share) * n:
        count += 1
    return count


def slow_order(scores: Sequence[float], protected: int = 0) -> list[int]:
    """Return protected places first, then the others by falling score."""
    return sorted(range(len(scores)), key=lambda c: (c >= protected, -scores[c] * (c >= protected)))


def slow_together(
    matrices: Mapping[str, tuple[Sequence[float], int, int, int]],
    channels: Mapping[str, tuple[Sequence[float], int]],
    keep_attention: str,
    keep_mlp: str,
) -> dict[str, list[int]]:
    """Fill the floors, then take whatever is worth most per number until the next does not fit.

    Args:
        matrices: scores, m, n and the number of protected components.
        channels: scores, and the numbers that one costs.
        keep_attention: share, as written.
        keep_mlp: share, as written.
    """
    left = 0
    orders, counts, worths, ends = {}, {}, {}, {}
    costs: dict[str, list[int]] = {}
    for key, (scores, m, n, protected) in matrices.items():
        orders[key] = slow_order(scores, protected)
        counts[key] = slow_rank(min(keep_attention, "0.2", key=float), m, n)
        ends[key] = slow_rank("1", m, n)
        costs[key] = [m + n] * ends[key]
        costs[key][-1] = m * n - sum(costs[key][:-1])  # then the matrix stays as it is
        mean = float(np.mean(np.abs(scores)))
        worths[key] = [scores[c] / mean / (m + n) for c in orders[key]]
        left += (slow_rank(keep_attention, m, n) - counts[key]) * (m + n)
    for key, (scores, size) in channels.items():
        orders[key] = slow_order(scores)
        counts[key] = slow_count(min(keep_mlp, "0.2", key=float), len(scores))
        ends[key] = len(scores)
        costs[key] = [size] * len(scores)
        mean = float(np.mean(np.abs(scores)))
        worths[key] = [scores[c] / mean / size for c in orders[key]]
        left += (slow_count(keep_mlp, len(scores)) - counts[key]) * size
    while True:
        open_keys = [key for key in orders if counts[key] < ends[key]]
        if not open_keys:
            break
        key = max(open_keys, key=lambda k: worths[k][counts[k]])
        cost = costs[key][counts[key]]
        if cost > left:
            break
        left -= cost
        counts[key] += 1
    return {key: sorted(orders[key][: counts[key]]) for key in orders}


def slow_cka(X: np.ndarray, Y: np.ndarray) -> float:
    """Return linear CKA of two representations, feature by feature."""
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return float(np.linalg.norm(Y.T @ X) ** 2 / (np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)))


def slow_clusters(states: Sequence[np.ndarray], n_clusters: int) -> list[list[int]]:
    """Merge the two adjacent clusters whose facing layers are most alike, one merge at a time."""
    clusters = [[k] for k in range(len(states))]
    while len(clusters) > n_clusters:
        alike = [slow_cka(states[left[-1]], states[right[0]]) for left, right in pairwise(clusters)]
        k = alike.index(max(alike))
        clusters[k : k + 2] = [clusters[k] + clusters[k + 1]]
    return clusters
