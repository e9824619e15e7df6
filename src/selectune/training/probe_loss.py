"""Loss of a few examples under turned-down adapters, without a trace in the training."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selectune.data import Batch, narrowed
from selectune.gradients.engine import dropout_off, precision_of
from selectune.gradients.loss import target_nll
from selectune.training.layer_sampling import PASSES
from selectune.training.method import BatchSource, Scene
from selectune.training.ranks import add_up, rank, world
from selectune.training.suppression import Response, turned_down


class Passes:
    """Shuffled passes over a source, in batches whose place is a function of their number."""

    def __init__(self, source: BatchSource, size: int, *, seed: int) -> None:
        self._source, self._seed = source, seed
        self._size = min(size, source.n)

    def indices(self, number: int) -> list[int]:
        """Return the examples of one batch; a pass is drawn anew when it is used up."""
        places = range(number * self._size, (number + 1) * self._size)
        n = self._source.n
        orders = {
            epoch: np.random.default_rng([self._seed, epoch, PASSES]).permutation(n)
            for epoch in {place // n for place in places}
        }
        return [int(orders[place // n][place % n]) for place in places]

    def batch(self, number: int) -> Batch | None:
        """Return this process's part of one batch, None where that holds no target token."""
        mine = self.indices(number)[rank() :: world()]
        batch = self._source.draw(mine) if mine else None
        return batch if batch is not None and batch.ids else None


@torch.no_grad()
def probe_losses(
    scene: Scene, batch: Batch | None, turned: Sequence[Sequence[Response]], *, factor: float
) -> list[float]:
    """Return the mean loss per target token, in nats, with some adapters turned down.

    Args:
        scene: the model, in any mode, and left in it, its random numbers too.
        batch: this process's examples.
        turned: what is turned down, once per loss.
        factor: what it is multiplied by.

    Returns:
        One loss per entry of `turned`, the same in all processes; NaN without a target token.
    """
    device = next(scene.model.parameters()).device
    parts = [] if batch is None else narrowed(batch)
    sums: list[Tensor] = []
    n_tokens = torch.zeros((), dtype=torch.float64, device=device)
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=forked), dropout_off(scene.model):
            for responses in turned:
                total = torch.zeros((), dtype=torch.float64, device=device)
                n_tokens = torch.zeros_like(total)
                for part in parts:
                    # Entered anew for each pass, as the casts that autocast keeps must not outlive
                    # it.
                    with turned_down(responses, factor), precision_of(device, scene.precision):
                        nats, counts = target_nll(scene.model, part)
                    total, n_tokens = total + nats.double().sum(), n_tokens + counts.sum()
                sums.append(total)
    finally:
        # A cast made without gradients would serve the training too, if its loop is in an autocast.
        torch.clear_autocast_cache()
    *totals, count = add_up([*sums, n_tokens])
    return (torch.stack(totals) / count).tolist()
