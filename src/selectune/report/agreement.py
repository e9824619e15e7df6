"""What picks say when they are counted: how alike layers pick, and how long the picks are."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import comb

import numpy as np
from jaxtyping import Float

from selectune.report.steps import Picks

_MOST_LENGTHS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """How often layers pick, and how often they pick the same.

    Attributes:
        seen: examples that each layer could pick from.
        picked: examples that it picked.
        same: mean Jaccard index (shared picks over all picks of the two) of each pair of layers,
            over the steps in which both picked; NaN where there is none.
        chance: what two independent draws of the same numbers would share on average.
    """

    seen: Float[np.ndarray, " l"]
    picked: Float[np.ndarray, " l"]
    same: Float[np.ndarray, "l l"]
    chance: Float[np.ndarray, "l l"]

    def rate(self) -> Float[np.ndarray, " l"]:
        """Return the share of its examples that each layer picked."""
        return _ratio(self.picked, self.seen)

    def apart(self, distance: int) -> tuple[float, float]:
        """Return Jaccard index and chance, mean over pairs of layers `distance` apart."""
        same, chance = np.diagonal(self.same, distance), np.diagonal(self.chance, distance)
        is_known = np.isfinite(same)
        if not is_known.any():
            return np.nan, np.nan
        return float(same[is_known].mean()), float(chance[is_known].mean())


def agreement(picks: Iterable[Picks], n_layers: int) -> Agreement:
    """Return how layers picked over all steps."""
    seen, picked = np.zeros(n_layers), np.zeros(n_layers)
    same, chance, n = (np.zeros((n_layers, n_layers)) for _ in range(3))
    for step in picks:
        rows = step.picked.astype(np.float64)
        size = rows.sum(1)
        seen[step.places] += rows.shape[1]
        picked[step.places] += size
        shared = rows @ rows.T
        either = size[:, None] + size[None, :] - shared
        pairs = np.ix_(step.places, step.places)
        same[pairs] += _ratio(shared, either, 0.0)
        n[pairs] += either > 0
        sizes, which = np.unique(size.astype(int), return_inverse=True)
        expected = np.array(
            [[expected_jaccard(int(a), int(b), rows.shape[1]) for b in sizes] for a in sizes]
        )
        chance[pairs] += expected[np.ix_(which, which)]
    return Agreement(seen, picked, _ratio(same, n), _ratio(chance, n))


@cache
def expected_jaccard(a: int, b: int, n: int) -> float:
    """Return the mean Jaccard index of a and b examples drawn from n, one draw blind to the other.

    Both numbers 0 share nothing that could be counted: 0.
    """
    total = comb(n, b)
    shares = [
        comb(a, m) * comb(n - a, b - m) / total * (m / (a + b - m))
        for m in range(max(0, a + b - n), min(a, b) + 1)
        if a + b > m
    ]
    return sum(shares, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class LengthRates:
    """How often examples of each length were picked.

    Attributes:
        labels: lengths of each group, such as "10–14".
        seen: times that a layer could pick an example of the group.
        picked: times that it did.
    """

    labels: list[str]
    seen: Float[np.ndarray, "l b"]
    picked: Float[np.ndarray, "l b"]

    def by_layer(self) -> Float[np.ndarray, "l b"]:
        """Return pick rates, NaN where a layer saw no such example."""
        return _ratio(self.picked, self.seen)

    def overall(self) -> Float[np.ndarray, " b"]:
        """Return pick rates over all layers."""
        return _ratio(self.picked.sum(0), self.seen.sum(0))

    def mean(self) -> float:
        """Return the pick rate over everything."""
        return float(self.picked.sum() / self.seen.sum())


def length_rates(picks: Iterable[Picks], n_layers: int) -> LengthRates | None:
    """Return pick rates for groups of about equally many examples; None where lengths say nothing.

    Args:
        picks: of every step.
        n_layers: layers that train.
    """
    steps = [step for step in picks if np.isfinite(step.n_tokens).any()]
    if not steps:
        return None
    everything = np.concatenate([step.n_tokens for step in steps])
    lengths = everything[np.isfinite(everything)]
    tops = np.unique(
        np.quantile(lengths, np.linspace(0, 1, _MOST_LENGTHS + 1)[1:], method="higher")
    )
    if len(tops) < 2:
        return None
    seen, picked = np.zeros((n_layers, len(tops))), np.zeros((n_layers, len(tops)))
    for step in steps:
        is_known = np.isfinite(step.n_tokens)
        group = np.searchsorted(tops, step.n_tokens[is_known])
        member = np.eye(len(tops))[group]
        seen[step.places] += member.sum(0)
        picked[step.places] += step.picked[:, is_known] @ member
    bottoms = [lengths.min(), *(tops[:-1] + 1)]
    labels = [_span(int(a), int(b)) for a, b in zip(bottoms, tops, strict=True)]
    return LengthRates(labels, seen, picked)


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low >= high else f"{low:,}–{high:,}"


def _ratio(a: np.ndarray, b: np.ndarray, empty: float = np.nan) -> np.ndarray:
    return np.divide(a, b, out=np.full(a.shape, empty), where=b > 0)
