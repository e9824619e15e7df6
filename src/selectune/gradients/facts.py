"""What one gradient pass leaves behind, as plain arrays."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


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

    def of(self, columns: list[int]) -> "GradientFacts":
        """Return the facts of some targets alone."""
        return GradientFacts(
            self.dots[:, columns],
            self.norms,
            self.gram[np.ix_(columns, columns)],
            tuple(self.target_ids[j] for j in columns),
            tuple(self.groups[j] for j in columns),
        )
