"""Other entries of a weight train than before: which ones, and what moves along with them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectune.errors import SelectionError, nearest
from selectune.training.sparse.entries import Entries
from selectune.weights.mask import WeightMask


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """How the values of one weight moved when entries were exchanged.

    Attributes:
        came_from: for each entry that trains now, its place among the values before, -1 for none.
        grown: for each entry that was grown, in the order it was asked for, its place now.
    """

    came_from: Int[Tensor, " k"]
    grown: Int[Tensor, " n"]

    def carry(self, state: Float[Tensor, " k"], grown: Tensor | float = 0.0) -> Tensor:
        """Return what an optimizer keeps about each entry, in the order of now.

        Args:
            state: in the order of before.
            grown: of the entries that are new.
        """
        found = state[self.came_from.clamp(min=0).to(state.device)]
        found[self.grown.to(state.device)] = torch.as_tensor(grown).to(found)
        return found


def exchange(
    every: Mapping[str, Entries], name: str, drop: Int[Tensor, " d"], grow: Int[Tensor, " g"]
) -> Exchange:
    """Let some entries of a weight train in place of others; see `Sparse.replace`.

    Raises:
        SelectionError: no entry of the weight trains, or `drop` and `grow` are not what they say.
    """
    if name not in every:
        raise SelectionError(
            f"no entry of {name} trains", where="sparse.replace", do=nearest(name, every)
        )
    entries = every[name]
    old = entries.index
    drop, grow = drop.to(old), grow.to(old)
    why = _mistake(old, drop, grow, prod(entries.shape))
    if why:
        raise SelectionError(
            f"these entries of {name} cannot be exchanged",
            where="sparse.replace",
            why=why,
            do="drop entries of `model.sparse.mask`, and grow as many others",
        )
    index = torch.cat([old[~torch.isin(old, drop)], grow]).sort().values
    came_from = entries.choose(index)
    return Exchange(came_from, torch.searchsorted(index, grow))


def _mistake(old: Tensor, drop: Tensor, grow: Tensor, numel: int) -> str:
    if drop.unique().numel() != drop.numel() or grow.unique().numel() != grow.numel():
        return "an entry stands twice among them"
    if drop.numel() != grow.numel():
        return f"{drop.numel()} are dropped and {grow.numel()} are grown"
    if not bool(torch.isin(drop, old).all()):
        return "one that is dropped does not train"
    if bool(torch.isin(grow, old).any()):
        return "one that is grown trains already"
    if grow.numel() and not 0 <= int(grow.min()) <= int(grow.max()) < numel:
        return f"one that is grown is no place in a tensor of {numel}"
    return ""


def mask_digest(mask: WeightMask) -> str:
    """Return a hash of the entries of a mask."""
    digest = hashlib.sha256()
    for name, index in sorted(mask.indices.items()):
        digest.update(f"{name}:{index.numel()}".encode())
        content: Any = index.to(torch.int64).numpy()
        digest.update(content.tobytes())
    return digest.hexdigest()[:32]
