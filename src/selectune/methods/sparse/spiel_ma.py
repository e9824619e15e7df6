"""SpIEL-MA: weights whose delta stays small make room for those whose row and column move most.

    SM3           u = min(row, col) + g^2, row and col take the largest u of theirs
    exchange      n of k go, those with the smallest |delta|, and get the base's bits back;
                  n come, those with the largest row * col that do not train, with delta 0

Paper  "Scaling Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405, algorithm and
  constants as in its release. Ours: ties go to the earlier entry; a product over all axes, where a
  weight is no matrix; learning rate 2e-3 to 4e-4.
Cost   Time: one product of row and column per exchange. Memory: one number per row and column in
  place of two per entry, and one tensor of the weight's size at an exchange.
Fails  Rows and columns in which nothing trains stay at 0, so what grows clusters where entries are.
  Accumulators only rise: steps shrink as training goes on.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from selectune.registry import training_method
from selectune.training.method import Scene, Session
from selectune.training.sparse.entries import Entries
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.optimizers import SM3
from selectune.training.sparse.reselection import (
    Reselection,
    highest,
    ready,
    smallest,
)
from selectune.training.sparse.schedule import Exchanging

_NAME = "spiel_ma"


@training_method(_NAME)
@dataclass(frozen=True, slots=True, kw_only=True)
class SpielMA(Exchanging):
    """Chosen weights change by the moments of their rows and columns while they train."""

    @property
    def optimizer(self) -> type[SM3]:
        """The optimizer that it works with."""
        return SM3

    def start(self, scene: Scene) -> Session:
        """Take hold of the entries.

        Raises:
            ConfigError: the model is not sparse, the optimizer is another one, or nobody knows how
                long training is.
        """
        sparse = ready(scene, SM3, name=_NAME)
        assert isinstance(scene.optimizer, SM3)
        return Reselection(
            sparse,
            self.schedule(scene),
            _ByMoments(sparse, scene.optimizer),
            name=_NAME,
            about=asdict(self),
        )


class _ByMoments:
    """Grows what the optimizer's accumulators point at."""

    def __init__(self, sparse: Sparse, optimizer: SM3) -> None:
        self._sparse, self._optimizer = sparse, optimizer

    def begin(self) -> None:
        """Need nothing: the optimizer watches all the time."""

    def count_step(self) -> None:
        """Need nothing."""

    def grow(self, name: str, entries: Entries, count: int) -> int:
        """Exchange entries for others."""
        sums = self._optimizer.accumulators(entries.values)
        if not sums:
            return 0  # no gradient has reached it
        scores = sums[0]
        for total in sums[1:]:
            scores = scores[..., None] * total
        scores = scores.flatten().index_fill(0, entries.index.long(), -1.0)
        n = min(count, scores.numel() - entries.index.numel())
        grow = highest(scores, n)
        self._sparse.replace(name, smallest(entries, n), grow)
        return n

    def end(self) -> None:
        """Need nothing."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return nothing: it is all in the optimizer."""
        return {}, {}

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Need nothing."""

    def close(self) -> None:
        """Leave nothing behind."""
