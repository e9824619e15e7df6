"""Which examples each optimizer step sees, as a function of the seed and the epoch alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Examples are sorted by length within a draw of this many optimizer steps, which removes most of
# the padding; a draw of the whole pool would pack one kind of example into each step.
_STEPS_PER_DRAW = 16


class EpochBatches(Sampler[list[int]]):
    """The batches of one epoch, examples of like length together, steps in random order.

    What one optimizer step sees depends on `batch_size * accumulation` only, so the same examples
    make up a step however it is cut into forward passes. The last step of an epoch takes what is
    left over. Nothing is drawn from torch's global generator, so a resumed run needs only the
    epoch and the number of batches to skip.
    """

    drop_last = False

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, accumulation: int, seed: int
    ) -> None:
        """Keep what the order depends on.

        Args:
            lengths: tokens of each example.
            batch_size: examples in one forward pass.
            accumulation: forward passes in one optimizer step.
            seed: of the order; the epoch is added by `set_epoch`.
        """
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; the Trainer calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        step_size = self.batch_size * self.accumulation
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = rng.permutation(len(self.lengths))
        n_left = len(drawn) % step_size
        left, drawn = self._by_length(drawn[:n_left]), drawn[n_left:]
        width = step_size * _STEPS_PER_DRAW
        draws = [self._by_length(drawn[i : i + width]) for i in range(0, len(drawn), width)]
        whole = np.concatenate(draws).reshape(-1, step_size) if draws else drawn.reshape(0, 1)
        for step in (*rng.permutation(whole), left):
            for start in range(0, len(step), self.batch_size):
                yield step[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-len(self) // self.accumulation)

    def _by_length(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
