"""From what is kept of a layer to the pieces that stand in for it: factors, narrowed matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.gradients.kernels import exact
from selectune.offsite.anatomy import Anatomy, Matrix, Mlp, anatomy_of, bias_of, weight_of
from selectune.offsite.pieces import CompressedLayer, Fused, LowRank, Narrow, Piece
from selectune.offsite.record import LayerPlan


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """The singular value decomposition of a matrix, in fp32 (fp64 for an fp64 model)."""

    U: Float[Tensor, "m k"]
    sigma: Float[Tensor, " k"]
    Vh: Float[Tensor, "k n"]


def decompose(weight: Float[Tensor, "m n"]) -> Decomposition:
    """Return the thin decomposition; half precision would change which components win."""
    U, sigma, Vh = torch.linalg.svd(exact(weight), full_matrices=False)
    return Decomposition(U, sigma, Vh)


def build_layer(
    block: nn.Module,
    original: int,
    plan: LayerPlan,
    decompositions: Mapping[str, Decomposition] | None = None,
) -> CompressedLayer:
    """Return the pieces that a plan leaves of a layer; the block is only read.

    Args:
        block: of the original.
        original: its index.
        plan: what is kept; with all components of a matrix it still becomes two factors.
        decompositions: of the matrices, by `Matrix.key`; missing ones are computed.

    Raises:
        SelectionError: the block is written in no known way.
    """
    anatomy = anatomy_of(block)
    known = decompositions or {}
    pieces: dict[str, Piece] = {}
    for matrix in anatomy.matrices:
        if matrix.key not in plan.components or matrix.name in pieces:
            continue
        parts = tuple(
            _low_rank(block.get_submodule(m.name), m, plan.components[m.key], known.get(m.key))
            for m in _parts_of(anatomy, matrix.name)
        )
        pieces[matrix.name] = parts[0] if matrix.part is None else Fused(parts)
    if plan.channels is not None:
        pieces.update(_narrow(block, anatomy.mlp, plan.channels))
    return CompressedLayer(original, pieces)


def _parts_of(anatomy: Anatomy, name: str) -> list[Matrix]:
    return [matrix for matrix in anatomy.matrices if matrix.name == name]


def _low_rank(
    module: nn.Module, matrix: Matrix, kept: Sequence[int], found: Decomposition | None
) -> LowRank:
    weight, bias = weight_of(module)[matrix.rows], bias_of(module)
    found = found or decompose(weight)
    index = torch.tensor(kept, dtype=torch.int64, device=weight.device)
    root = found.sigma[index].sqrt()
    return LowRank(
        first=_own(root[:, None] * found.Vh[index], weight),
        second=_own(found.U[:, index] * root, weight),
        bias=None if bias is None else _own(bias[matrix.rows], weight),
    )


def _narrow(block: nn.Module, mlp: Mlp, kept: Sequence[int]) -> dict[str, Narrow]:
    found: dict[str, Narrow] = {}
    for name in mlp.names:
        module = block.get_submodule(name)
        weight, bias = weight_of(module), bias_of(module)
        index = torch.tensor(kept, dtype=torch.int64, device=weight.device)
        if name == mlp.down:
            weight = weight[:, index]
        else:
            weight, bias = weight[index], None if bias is None else bias[index]
        found[name] = Narrow(_own(weight, weight), None if bias is None else _own(bias, bias))
    return found


def _own(x: Tensor, like: Tensor) -> Tensor:
    """Return a CPU copy that shares no memory with the original, whose storage holds the rest."""
    return x.to("cpu", like.dtype, copy=True, memory_format=torch.contiguous_format)
