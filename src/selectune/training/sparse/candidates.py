"""What the gradient of a weight says in a phase about a few entries that might come."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectune.gradients.kernels import Pattern, exact
from selectune.training.sparse.entries import Entries
from selectune.training.sparse.reselection import highest
from selectune.training.sparse.routes import Chosen


class Candidates:
    """The entries with the largest gradient in the first backward pass, and what follows of them.

    Args:
        entries: of the weight; there are as many candidates.
    """

    channels: None = None  # as far as routes go, single entries

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._pattern: Pattern | None = None
        self._pending: Tensor | None = None  # of the backward pass that is going on
        self._dense = ExitStack()
        self.input_axis = entries.input_axis
        self.n_seen = 0  # backward passes
        # None of the three means anything before the first.
        self.index: Int[Tensor, " k"] = entries.index[:0]
        self.total: Float[Tensor, " k"] = torch.zeros(0)
        self.squares: Float[Tensor, " k"] = torch.zeros(0)
        entries.observe(self._see)
        self._handle = entries.values.register_post_accumulate_grad_hook(self._count)

    def pattern(self) -> Pattern:
        """Return the candidates as compressed rows of a matrix."""
        if self._pattern is None:
            n_rows, n_cols = self._entries.shape
            self._pattern = Pattern.of(self.index, (n_rows, n_cols))
        return self._pattern

    def close(self) -> None:
        """Look no longer."""
        self._entries.observe(None)
        self._handle.remove()
        self._dense.close()
        self._pending = None

    def load(
        self,
        n_seen: int,
        index: Int[Tensor, " k"],
        total: Float[Tensor, " k"],
        squares: Float[Tensor, " k"],
    ) -> None:
        """Go on from what others saw."""
        device = self._entries.index.device
        self.n_seen, self._pattern = n_seen, None
        self.index = index.to(self._entries.index)
        self.total, self.squares = total.to(device), squares.to(device)

    def _see(self, dense: Callable[[], Tensor], at: Callable[[Chosen], Tensor]) -> None:
        """Take the gradient of one use of the weight; a tied weight has several."""
        if self.n_seen:
            found = at(self)
        else:
            if self._pending is None:
                self._dense.enter_context(self._entries.routes.dense())
            found = exact(dense()).flatten()
        self._pending = found if self._pending is None else self._pending + found

    @torch.no_grad()
    def _count(self, _: Tensor) -> None:
        """Hear that a backward pass is through with the weight."""
        found = self._pending
        if found is None:
            return
        self._pending = None
        if self.n_seen == 0:
            place = highest(found.abs(), self._entries.index.numel())
            self.index, found = place.to(self._entries.index), found[place]
            self._dense.close()
            self.total, self.squares = torch.zeros_like(found), torch.zeros_like(found)
        self.total += found
        self.squares += found.square()
        self.n_seen += 1
