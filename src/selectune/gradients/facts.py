"""What one gradient pass leaves behind, as plain arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

COPY = 0.999  # cosine of two gradients above which their examples may be one


@dataclass(frozen=True, slots=True, eq=False)
class GradientFacts:
    """What one gradient pass leaves behind; enough for any rank, aggregate and grouping.

    Args:
        dots: <g_n, v_j> of pool example n and target j.
        norms: norms of the pool gradients.
        gram: <v_i, v_j> of the targets.
        target_ids: the targets, in the order of the columns.
        groups: each target's subtask label, "" where it has none.
    """

    dots: Float[np.ndarray, "n m"]
    norms: Float[np.ndarray, " n"]
    gram: Float[np.ndarray, "m m"]
    target_ids: tuple[str, ...]
    groups: tuple[str, ...]

    @property
    def cosines(self) -> Float[np.ndarray, "n m"]:
        """Cosine of every example and target, 0 where a gradient is 0."""
        norms = self.norms.astype(np.float64)
        scale = norms[:, None] * np.sqrt(np.clip(np.diag(self.gram), 0, None))
        return np.divide(self.dots, scale, out=np.zeros(self.dots.shape), where=scale > 0)

    def of(self, columns: list[int]) -> "GradientFacts":
        """Return the facts of some targets alone."""
        return GradientFacts(
            self.dots[:, columns],
            self.norms,
            self.gram[np.ix_(columns, columns)],
            tuple(self.target_ids[j] for j in columns),
            tuple(self.groups[j] for j in columns),
        )


def near_targets(
    cosines: Float[np.ndarray, "n m"], ids: Sequence[str], target_ids: Sequence[str]
) -> list[list[str | float]]:
    """Return the examples whose gradient is nearly a target's, as that of a copy would be.

    Args:
        cosines: of examples and targets in the whole space, `GradientFacts.cosines`.
        ids: of the examples.
        target_ids: of the targets.

    Returns:
        Example, target and their cosine where it is above `COPY`, the highest first.
    """
    pairs = [(int(n), int(j)) for n, j in np.argwhere(cosines > COPY)]
    pairs.sort(key=lambda pair: -cosines[pair])
    return [[ids[n], target_ids[j], float(cosines[n, j])] for n, j in pairs]


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointFacts:
    """What a gradient pass at one of several checkpoints left behind.

    Args:
        gradients: of the pass.
        learning_rate: mean rate of the steps that led to the checkpoint from the one before.
    """

    gradients: GradientFacts
    learning_rate: float


@dataclass(frozen=True, slots=True, eq=False)
class StateFacts:
    """How alike pool and target examples are in the last hidden states of the base.

    Args:
        weighted: cosines of means in which the t-th token counts t times.
        mean: cosines of plain means.
        target_ids: the targets, in the order of the columns.
        groups: each target's subtask label, "" where it has none.
    """

    weighted: Float[np.ndarray, "n m"]
    mean: Float[np.ndarray, "n m"]
    target_ids: tuple[str, ...]
    groups: tuple[str, ...]

    def of(self, columns: list[int]) -> "StateFacts":
        """Return the facts of some targets alone."""
        return StateFacts(
            self.weighted[:, columns],
            self.mean[:, columns],
            tuple(self.target_ids[j] for j in columns),
            tuple(self.groups[j] for j in columns),
        )
