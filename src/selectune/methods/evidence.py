"""What a scorer may look at: the facts of one pool, for one target task."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from selectune.gradients.facts import GradientFacts


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The facts that a scorer reads; those it did not ask for are None.

    Args:
        ids: the pool.
        n_target_tokens: tokens that count in each example's loss.
        seed: for scorers that draw.
        losses: nats per target token under the untouched base.
        gradients: see `GradientFacts`.
    """

    ids: tuple[str, ...]
    n_target_tokens: Int[np.ndarray, " n"]
    seed: int = 0
    losses: Float[np.ndarray, " n"] | None = None
    gradients: GradientFacts | None = None
