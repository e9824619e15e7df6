"""Sums of gradients, of which no more than one is ever alive in full.

Autograd hands over one parameter's gradient after the other; each is added to an fp32 sum on the
CPU (sums in half precision stall) and freed before the next one is formed. Sums that memory has no
room for can lie on disk.
"""

import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from selectune.errors import TrainingError
from selectune.files.disk import storage_errors
from selectune.gradients.capture import set_aside_gradients
from selectune.gradients.engine import dropout_off
from selectune.weights.eligible import EligibleWeight


class GradientSums:
    """Sums of the gradients that backward passes leave at some weights, which are freed at once.

    Args:
        eligible: the weights.
        is_squared: square each pass's gradient before it is added.
        spill: folder on whose disk the sums lie; None keeps them in memory.
    """

    def __init__(
        self,
        eligible: Mapping[str, EligibleWeight],
        *,
        is_squared: bool,
        spill: Path | None = None,
    ) -> None:
        self._weights = {name: w.parameter for name, w in eligible.items()}
        self._is_squared, self._spill = is_squared, spill
        self._sums: dict[str, Tensor] = {}
        self._counted: set[str] = set()
        self.peak_bytes = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Let only these weights have gradients, dropout off, and put everything back after."""
        flags = {p: p.requires_grad for p in model.parameters()}
        with ExitStack() as stack:
            stack.enter_context(dropout_off(model))
            stack.enter_context(set_aside_gradients(flags))
            try:
                for p in flags:
                    p.requires_grad_(False)
                for name, p in self._weights.items():
                    p.requires_grad_(True)
                    handle = p.register_post_accumulate_grad_hook(self._hook(name))
                    stack.callback(handle.remove)
                yield
            finally:
                for p, flag in flags.items():
                    p.requires_grad_(flag)

    def take(self) -> Generator[tuple[str, Tensor]]:
        """Hand over the sums, each once; zeros where no gradient came."""
        for name, p in self._weights.items():
            found = self._sums.pop(name, None)
            if found is None:
                found = torch.zeros(p.shape, dtype=torch.float32)
            yield name, found.contiguous()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def add(p: Tensor) -> None:
            grad = p.grad
            assert grad is not None
            if name not in self._counted:  # the first pass tells; more would cost time
                self._counted.add(name)
                grads = [w.grad for w in self._weights.values() if w.grad is not None]
                self.peak_bytes = max(self.peak_bytes, sum(g.nbytes for g in grads))
            p.grad = None
            # A sum is one reading pass and shows what is not finite; what overflows it may be.
            if not bool(grad.sum().isfinite()) and not bool(grad.isfinite().all()):
                raise TrainingError(
                    f"the gradient of {name} is not a number",
                    where=name,
                    why="the backward pass overflowed, or the weights already hold NaN",
                    do="score with precision=float32, and check the base weights",
                )
            part = grad.cpu().float()  # added as it is, bfloat16 takes twice the time (torch 2.13)
            if self._is_squared:
                part.square_()
            if name in self._sums:
                self._sums[name].add_(part)
            elif self._spill is None:  # nobody else holds the gradient: it becomes the sum
                self._sums[name] = part
            else:
                self._sums[name] = _on_disk(self._spill, part.shape).copy_(part)

        return add


def _on_disk(folder: Path, shape: torch.Size) -> Tensor:
    """Return a tensor in a file that has no name: it is gone with the tensor, or the process."""
    with storage_errors(folder), tempfile.NamedTemporaryFile(dir=folder) as file:
        # A disk that fills up later would kill the process instead of raising an error.
        os.posix_fallocate(file.fileno(), 0, max(1, 4 * shape.numel()))
        mapped = torch.from_file(file.name, shared=True, size=shape.numel(), dtype=torch.float32)
    return mapped.view(shape)
