"""What a difference between two models is worth: paired bootstrap intervals.

Both models answered the same examples, so the bootstrap draws examples, not answers: what makes a
question hard for both cancels. With several seeds it draws seeds too (hierarchical bootstrap). When
all seeds share their held-out examples, one draw of examples serves every drawn seed, because an
odd question is odd in all of them (Owen, "The pigeonhole bootstrap", 2007, arXiv 0712.1111);
otherwise each drawn seed draws its own.

Drawing from S seeds understates their variance by (S - 1) / S, so the seeds' mean differences are
first spread around the grand mean by sqrt(S / (S - 1)). Three seeds remain three: where seeds and
not examples make the difference, an interval from three covers less than its 95 %; report S.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from selectune.errors import DataError
from selectune.evaluation.options import Evaluation

Metric = Literal["answer_loss", "correct_norm", "correct_raw"]

_LEVELS = (2.5, 97.5)
_CHUNK_ELEMENTS = 1 << 22  # draws held at once: 32 MB of indices, whatever the number of examples


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference, first minus second, and its 95 % interval.

    Args:
        mean_difference: nats per token, or share of questions.
        low: 2.5th percentile of the bootstrap.
        high: 97.5th percentile of the bootstrap.
        n: paired examples; summed over seeds where these have examples of their own.
        n_seeds: pairs of models behind it.
        metric: what was compared.
    """

    mean_difference: float
    low: float
    high: float
    n: int
    n_seeds: int = 1
    metric: Metric = "answer_loss"

    @property
    def excludes_zero(self) -> bool:
        """Whether the two models differ beyond the noise of examples and seeds."""
        return self.low > 0 or self.high < 0

    @property
    def ends(self) -> tuple[float, float, float]:
        """The difference, and where its interval begins and ends."""
        return self.mean_difference, self.low, self.high

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare_paired(
    a: Evaluation,
    b: Evaluation,
    *,
    n_boot: int = 10_000,
    seed: int = 0,
    metric: Metric = "answer_loss",
) -> Interval:
    """Compare two models on the examples both answered.

    Args:
        a: the first model's answers; the order of examples does not matter, joins are by id.
        b: the second model's.
        n_boot: bootstrap draws.
        seed: of the draws.
        metric: what to compare; `correct_*` leaves out examples without options.

    Returns:
        a - b: below zero, `a` has the lower loss or the lower accuracy.

    Raises:
        DataError: the two did not answer the same examples, or none has options.
    """
    return compare_seeds([(a, b)], n_boot=n_boot, seed=seed, metric=metric)


def mean_interval(
    found: Evaluation, metric: Metric, *, n_boot: int = 10_000, seed: int = 0
) -> Interval:
    """Return one model's own mean, as a difference to zero, with its interval over examples."""
    values = np.array(list(_column(found, metric).values()))
    means = _crossed(values[None], np.random.default_rng(seed), n_boot)
    low, high = np.percentile(means, _LEVELS)
    return Interval(float(values.mean()), float(low), float(high), len(values), 1, metric)


def compare_seeds(
    pairs: Sequence[tuple[Evaluation, Evaluation]],
    *,
    n_boot: int = 10_000,
    seed: int = 0,
    metric: Metric = "answer_loss",
) -> Interval:
    """Compare two ways of tuning over several seeds, one pair of models each.

    Args:
        pairs: (first, second) of each seed; at least one.
        n_boot: bootstrap draws.
        seed: of the draws.
        metric: what to compare.

    Returns:
        first - second, every seed weighing the same.

    Raises:
        DataError: the two of a pair did not answer the same examples, or none has options.
    """
    joined = [_differences(a, b, metric) for a, b in pairs]
    ids = joined[0][0]
    rng = np.random.default_rng(seed)
    spread = _spread([values for _, values in joined])
    if all(other == ids for other, _ in joined):
        means = _crossed(np.stack(spread), rng, n_boot)
        n = len(ids)
    else:
        means = _nested(spread, rng, n_boot)
        n = sum(len(values) for values in spread)
    low, high = np.percentile(means, _LEVELS)
    mean = float(np.mean([values.mean() for values in spread]))
    return Interval(mean, float(low), float(high), n, len(pairs), metric)


def _differences(a: Evaluation, b: Evaluation, metric: Metric) -> tuple[list[str], np.ndarray]:
    first, second = _column(a, metric), _column(b, metric)
    odd = sorted(first.keys() ^ second.keys())
    if odd:
        raise DataError(
            f"{len(odd)} examples were answered by only one of two compared models",
            where="example " + ", ".join(odd[:5]),
            why="a paired comparison needs the same held-out examples on both sides",
            do="evaluate both models on the same file, `data.max_length` and `evaluate.limit`",
        )
    if not first:
        raise DataError(
            f"there is nothing to compare by {metric}",
            why="no held-out example has options",
            do='compare by answer_loss, or give the held-out rows "options"',
        )
    ids = sorted(first)
    return ids, np.array([first[id] - second[id] for id in ids])


def _column(evaluation: Evaluation, metric: Metric) -> dict[str, float]:
    pairs = zip(evaluation.column("id"), evaluation.column(metric), strict=True)
    return {id: float(value) for id, value in pairs if value is not None}


def _spread(differences: list[np.ndarray]) -> list[np.ndarray]:
    n_seeds = len(differences)
    if n_seeds == 1:
        return differences
    means = [values.mean() for values in differences]
    stretch = np.sqrt(n_seeds / (n_seeds - 1)) - 1
    return [
        values + stretch * (mean - np.mean(means))
        for values, mean in zip(differences, means, strict=True)
    ]


def _crossed(
    differences: Float[np.ndarray, "s n"], rng: np.random.Generator, n_boot: int
) -> Float[np.ndarray, " b"]:
    n_seeds, n = differences.shape
    chunk = max(1, _CHUNK_ELEMENTS // (n * n_seeds))
    parts: list[np.ndarray] = []
    for start in range(0, n_boot, chunk):
        size = min(chunk, n_boot - start)
        seeds = rng.integers(n_seeds, size=(size, n_seeds))
        weights = np.zeros((size, n_seeds))
        np.add.at(weights, (np.arange(size)[:, None], seeds), 1 / n_seeds)
        drawn = differences.take(rng.integers(n, size=(size, n)), axis=1)
        parts.append(np.einsum("bs,sb->b", weights, drawn.mean(axis=2)))
    return np.concatenate(parts)


def _nested(
    differences: list[np.ndarray], rng: np.random.Generator, n_boot: int
) -> Float[np.ndarray, " b"]:
    n_seeds = len(differences)
    total = np.zeros(n_boot)
    for _ in range(n_seeds):
        # A seed drawn twice draws its examples twice, as hierarchical resampling asks.
        drawn = rng.integers(n_seeds, size=n_boot)
        for index, values in enumerate(differences):
            rows = np.flatnonzero(drawn == index)
            if len(rows):
                total[rows] += _crossed(values[None], rng, len(rows))
    return total / n_seeds
