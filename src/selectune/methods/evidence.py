"""What a scorer may look at: the facts of one pool, for one target task."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from selectune.gradients.facts import CheckpointFacts, GradientFacts, StateFacts
from selectune.gradients.view import View


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The facts that a scorer reads; those it did not ask for are None, or empty.

    Args:
        ids: the pool.
        n_target_tokens: tokens that count in each example's loss.
        seed: for scorers that draw.
        losses: nats per target token under the untouched base.
        gradients: see `GradientFacts`.
        checkpoints: the same at several checkpoints of one training, oldest first.
        states: see `StateFacts`.
    """

    ids: tuple[str, ...]
    n_target_tokens: Int[np.ndarray, " n"]
    seed: int = 0
    losses: Float[np.ndarray, " n"] | None = None
    gradients: GradientFacts | None = None
    checkpoints: tuple[CheckpointFacts, ...] = ()
    states: StateFacts | None = None


@runtime_checkable
class ReadsCheckpoints(Protocol):
    """The options of a scorer that needs "checkpoints"."""

    @property
    def epochs(self) -> int | None:
        """How many epochs of the warm-up end in a checkpoint; None for all of its schedule."""
        ...

    @property
    def view(self) -> View:
        """How pool gradients are looked at."""
        ...
