"""Target gradients on disk, read back one parameter at a time.

V holds one row per target and one column per trainable number: 153 GB for 285 targets of a 7B model
with LoRA r 128. It is written once in parameter-major order, so that a scoring pass reads just the
`[M, d]` slice of the parameter whose rows have arrived; the page cache keeps what fits.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selectune.errors import StorageError

_BYTES = 4  # fp32


class Directions:
    """A matrix V `[M, d]` in a file, addressed by parameter name and target.

    Args:
        path: the file; made when `shapes` is new, opened as it is otherwise.
        sizes: numbers of each trainable parameter, in the order they lie in the file.
        n_targets: M.
        device: where slices are wanted.
    """

    def __init__(
        self, path: Path, sizes: Mapping[str, int], n_targets: int, device: torch.device
    ) -> None:
        self._sizes, self._m, self._device = dict(sizes), n_targets, device
        self._start: dict[str, int] = {}
        offset = 0
        for name, size in self._sizes.items():
            self._start[name] = offset
            offset += size * n_targets * _BYTES
        self.n_bytes = offset
        # One buffer for the largest slice: memory does not grow with the number of parameters.
        self._buffer = np.empty(max(self._sizes.values()) * n_targets, np.float32)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.posix_fallocate(self._file, 0, offset)
        except OSError as error:
            raise StorageError(
                f"no room for {offset / 1e9:.2f} GB of target gradients",
                where=str(path),
                why=error.strerror or str(error),
                do="free some space, give fewer targets, or train fewer weights",
            ) from error

    def __enter__(self) -> "Directions":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def write(self, name: str, first: int, G: Float[Tensor, "k ..."]) -> None:
        """Put the gradients of targets `first`, `first` + 1, .. at one parameter in place."""
        rows: Any = G.flatten(1).float().cpu().contiguous().numpy()
        at = self._start[name] + first * self._sizes[name] * _BYTES
        view = memoryview(rows).cast("B")
        while view:
            n = os.pwrite(self._file, view, at)
            view, at = view[n:], at + n

    def read(self, name: str) -> Float[Tensor, "m d"]:
        """Return the slice of one parameter; it is overwritten by the next `read`."""
        size = self._sizes[name]
        flat: Any = self._buffer[: size * self._m]
        view = memoryview(flat).cast("B")
        at = self._start[name]
        while view:
            n = os.preadv(self._file, [view], at)
            if n == 0:
                raise StorageError("target gradients end early", where=name, do="score again")
            view, at = view[n:], at + n
        return torch.from_numpy(flat.reshape(self._m, size)).to(self._device)  # pyright: ignore[reportUnknownMemberType]

    def gram(self) -> Float[Tensor, "m m"]:
        """Return V V^T over all parameters, in fp64."""
        total = torch.zeros(self._m, self._m, dtype=torch.float64, device=self._device)
        for name in self._sizes:
            V = self.read(name)
            for columns in V.split(1 << 16, dim=1):
                part = columns.double()
                total += part @ part.mT
        return total.cpu()

    def cross(self, other: "Directions") -> Float[Tensor, "m n"]:
        """Return V W^T over all parameters, in fp64, with W a matrix of the same parameters."""
        total = torch.zeros(self._m, other._m, dtype=torch.float64, device=self._device)
        for name in self._sizes:
            V, W = self.read(name).split(1 << 16, dim=1), other.read(name).split(1 << 16, dim=1)
            for mine, theirs in zip(V, W, strict=True):
                total += mine.double() @ theirs.double().mT
        return total.cpu()

    def sync(self) -> None:
        """Force the bytes to the disk."""
        os.fsync(self._file)
