"""Several processes: who am I, and what the others hold."""

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> int:
    """Return the number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def add_up(tensors: list[Tensor]) -> list[Tensor]:
    """Return the sums over all processes, in one exchange."""
    if world() == 1 or not tensors:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


class Exchange:
    """Rows of all processes, over a channel of its own so that DDP's traffic is not mixed up."""

    def __init__(self) -> None:
        """Open the channel; every process has to."""
        self._group = dist.new_group() if world() > 1 else None

    def rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return the rows of all processes, in the order of their ranks.

        Args:
            x: rows of this process.
            counts: rows of each process.
        """
        if self._group is None:
            return x
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def counts(self, n: int, device: torch.device) -> list[int]:
        """Return how many rows each process holds."""
        if self._group is None:
            return [n]
        return self.rows(torch.tensor([n], device=device), [1] * world()).tolist()
