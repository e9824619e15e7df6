"""Random projections of gradients to a few thousand numbers, parameter by parameter.

R = [R_1 R_2 ..], one block of columns per parameter, so R g = R_1 g_1 + R_2 g_2 + ..: parts add up,
and no more of R than one block is ever held. A block's seed is a hash of the run's seed, the
parameter's name and the block's number, so that targets, pool and every checkpoint see the same R
in any order. E[R^T R] = 1: inner products are kept, up to an error that shrinks as 1/sqrt(k).

    rademacher:k   entries +-1/sqrt(k); LESS uses k = 8192. Costs k numbers per trainable number.
    hadamard:k     signs, a Hadamard transform, k of the coordinates: log2(d) instead of k (ours)
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

# Entries of R that are drawn at once: 16 MB.
_BLOCK_ELEMENTS = 1 << 22
# The eight signs that each byte stands for: a look-up is three times as fast as shifting bits.
_BYTES = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float() * 2 - 1


@dataclass(frozen=True, slots=True)
class Projection:
    """A random map from all trainable numbers to `dim` of them.

    Args:
        kind: how the map is made.
        dim: numbers that are left of a gradient.
        seed: of all its draws.
    """

    kind: Literal["rademacher", "hadamard"]
    dim: int
    seed: int

    @classmethod
    def of(cls, text: str, seed: int) -> "Projection | None":
        """Return what "rademacher:8192" stands for; "none" is None."""
        if text == "none":
            return None
        kind, dim = text.split(":")
        return cls("rademacher" if kind == "rademacher" else "hadamard", int(dim), seed)

    def add(self, out: Float[Tensor, "n k"], name: str, G: Float[Tensor, "n d"]) -> None:
        """Add R_m G of one parameter to `out`.

        Args:
            out: what earlier parameters amount to.
            name: of the parameter; it decides the signs.
            G: gradients, one flat row per example.
        """
        if self.kind == "hadamard":
            out += self._hadamard(name, G)
            return
        width = max(1, _BLOCK_ELEMENTS // self.dim)
        for b, columns in enumerate(G.split(width, dim=1)):
            signs = _signs(self._generator(name, b), self.dim * columns.shape[1])
            R = signs.view(self.dim, columns.shape[1]).to(G)
            out += columns @ R.mT / self.dim**0.5

    def _hadamard(self, name: str, G: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        n, d = G.shape
        size = 1 << (d - 1).bit_length()
        generator = self._generator(name, 0)
        y = G.new_zeros(n, size)
        y[:, :d] = G * _signs(generator, d).to(G)
        half = 1
        while half < size:
            pairs = y.view(n, -1, 2, half)
            y = torch.stack((pairs.sum(2), pairs[:, :, 0] - pairs[:, :, 1]), 2).view(n, size)
            half *= 2
        y /= size**0.5
        # A small parameter is only rotated, and lies scattered among the k.
        places = torch.randperm(max(size, self.dim), generator=generator)[: min(size, self.dim)]
        places = places.to(G.device)
        if size > self.dim:
            return y[:, places] * (size / self.dim) ** 0.5
        return G.new_zeros(n, self.dim).index_copy_(1, places, y)

    def _generator(self, name: str, block: int) -> torch.Generator:
        text = f"{self.kind}:{self.dim}:{self.seed}:{name}:{block}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        # On the CPU wherever the model is: the same signs on every device.
        return torch.Generator().manual_seed(seed)


def _signs(generator: torch.Generator, n: int) -> Float[Tensor, " n"]:
    """Return n draws of +-1, eight of each random byte."""
    drawn = torch.randint(0, 256, (-(-n // 8),), generator=generator)
    return _BYTES.index_select(0, drawn).flatten()[:n]
