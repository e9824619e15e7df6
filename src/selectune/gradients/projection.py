"""Random projections of gradients to a few thousand numbers, parameter by parameter.

R = [R_1 R_2 ..], one block of columns per parameter, so R g = R_1 g_1 + R_2 g_2 + ..: parts add up,
and no more of R than a piece of one block is ever held. A piece's seed is a hash of the run's seed,
the parameter's name and the piece's number, so that targets, pool and every checkpoint see the same
R in any order. E[R^T R] = 1: inner products are kept, up to an error that shrinks as 1/sqrt(k).

    rademacher:k   entries +-1/sqrt(k); LESS uses k = 8192. Costs k numbers per trainable number.
    hadamard:k     signs, a Hadamard transform, k of the coordinates: log2(d) instead of k (ours)
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Entries of R that are held at once: 128 MB in fp32.
_PIECE_ELEMENTS = 1 << 25
# Random bytes that are made signs at once, and numbers transformed at once: what a core's cache
# takes. More costs two to three times as much per number.
_CACHED_BYTES = 1 << 15
_CACHED_NUMBERS = 1 << 18
# A Hadamard matrix is a product of small ones; up to this width a product with one is at the speed
# of matrix products, where additions alone wait for memory.
_FACTOR_BITS = 7


@dataclass(frozen=True, slots=True)
class Projection:
    """A random map from all trainable numbers to `dim` of them.

    Args:
        kind: how the map is made.
        dim: numbers that are left of a gradient.
        seed: of all its draws.
        precision: of the pass that gradients come from; with "bfloat16" they are rounded once
            more before the product with Rademacher signs, which are exact in it.
    """

    kind: Literal["rademacher", "hadamard"]
    dim: int
    seed: int
    precision: str = "float32"

    @classmethod
    def of(cls, text: str, seed: int, precision: str = "float32") -> "Projection | None":
        """Return what "rademacher:8192" stands for; "none" is None."""
        if text == "none":
            return None
        kind, dim = text.split(":")
        named = "rademacher" if kind == "rademacher" else "hadamard"
        return cls(named, int(dim), seed, precision)

    @property
    def is_dear_to_draw(self) -> bool:
        """Whether the draw costs about as much as a product with a hundred gradients."""
        return self.kind == "rademacher"

    def add(self, out: Float[Tensor, "n k"], name: str, G: Float[Tensor, "n d"]) -> None:
        """Add R_m G of one parameter to `out`.

        Args:
            out: what earlier parameters amount to.
            name: of the parameter; it decides the signs.
            G: gradients, one flat row per example.
        """
        if self.kind == "rademacher":
            self._add_rademacher(out, name, G)
        else:
            self._add_hadamard(out, name, G)

    def _add_rademacher(self, out: Tensor, name: str, G: Tensor) -> None:
        if self.precision == "bfloat16" and G.dtype == torch.float32:
            G = G.bfloat16()
        d = G.shape[1]
        n_pieces = -(-d * self.dim // _PIECE_ELEMENTS)
        for piece, columns in enumerate(G.split(-(-d // n_pieces), dim=1)):
            width = columns.shape[1]
            R = _signs(self._seed(name, piece), width * self.dim, columns).view(width, self.dim)
            torch.add(out, columns @ R, alpha=self.dim**-0.5, out=out)

    def _add_hadamard(self, out: Tensor, name: str, G: Tensor) -> None:
        d = G.shape[1]
        size = 1 << (d - 1).bit_length()
        seed = self._seed(name, 0)
        signs = _signs(seed, d, G)
        # A small parameter is only rotated, and lies scattered among the k.
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(max(size, self.dim), generator=generator)[: min(size, self.dim)]
        places = places.to(G.device)
        step = max(1, _CACHED_NUMBERS // size)
        for some, own in zip(G.split(step), out.split(step), strict=True):
            y = _rotated(functional.pad(some * signs, (0, size - d)))
            if size > self.dim:
                own.add_(y.index_select(1, places), alpha=(size / self.dim) ** 0.5)
            else:
                own.index_add_(1, places, y)

    def _seed(self, name: str, piece: int) -> int:
        text = f"{self.kind}:{self.dim}:{self.seed}:{name}:{piece}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _signs(seed: int, n: int, like: Tensor) -> Float[Tensor, " n"]:
    """Return n draws of +-1, eight of each random byte, of the type and on the device of `like`."""
    # On the CPU wherever the model is: the same signs on every device. The raw stream of a numpy
    # generator never changes between versions.
    n_bytes = -(-n // 8)
    drawn = np.random.PCG64(seed).random_raw(-(-n_bytes // 8)).view(np.uint8)[:n_bytes]
    table = _table(like.dtype)
    if like.device.type != "cpu":
        picks = torch.from_numpy(drawn).to(like.device).int()  # pyright: ignore[reportUnknownMemberType]
        return table.to(like.device).index_select(0, picks).flatten()[:n]
    out = torch.empty(n_bytes, 8, dtype=like.dtype)
    # numpy has no bfloat16, and only copies here.
    source, into = (_bytes(t) for t in (table, out))
    for first in range(0, n_bytes, _CACHED_BYTES):
        some = slice(first, first + _CACHED_BYTES)
        np.take(source, drawn[some].astype(np.intp), axis=0, out=into[some], mode="clip")
    return out.flatten()[:n]


@cache
def _table(dtype: torch.dtype) -> Float[Tensor, "256 8"]:
    """Return the eight signs that each byte stands for: a look-up is faster than shifting bits."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(dtype) * 2 - 1


def _bytes(t: Tensor) -> Any:  # noqa: ANN401
    return t.view(torch.uint8).numpy()  # pyright: ignore[reportUnknownMemberType]


def _rotated(y: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """Return the orthonormal Hadamard transform of each row; s is a power of two."""
    n, size = y.shape
    n_bits = size.bit_length() - 1
    n_factors = -(-n_bits // _FACTOR_BITS)
    inner = 1
    ends = [round(k * n_bits / max(1, n_factors)) for k in range(n_factors + 1)]
    for start, end in pairwise(ends):
        H = _hadamard(end - start, y.dtype).to(y.device)
        y = y.view(-1, len(H)) @ H if inner == 1 else H @ y.view(-1, len(H), inner)
        inner *= len(H)
    return y.view(n, size)


@cache
def _hadamard(n_bits: int, dtype: torch.dtype) -> Float[Tensor, "f f"]:
    """Return Sylvester's matrix of 2**n_bits rows, made orthonormal."""
    H = torch.ones(1, 1, dtype=dtype)
    for _ in range(n_bits):
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / len(H) ** 0.5
