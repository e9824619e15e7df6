"""The modules of an emulator: low-rank pairs and narrowed matrices, put in place of whole ones."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import SelectionError
from selectune.offsite.pieces import Fused, LowRank, Narrow, Piece


class LowRankLinear(nn.Module):
    """Two Linears in place of one: `second(first(x))`, with the bias on the second.

    They are plain `nn.Linear`s, so that hooks, gradient kernels and peft know them.

    Args:
        piece: the factors; copied.
    """

    def __init__(self, piece: LowRank) -> None:
        super().__init__()
        self.first = _linear(piece.first, None)
        self.second = _linear(piece.second, piece.bias)
        self.in_features, self.out_features = self.first.in_features, self.second.out_features

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Return what the one Linear would, up to what its factors leave out."""
        return self.second(self.first(x))


class FusedLowRank(nn.Module):
    """Low-rank pairs for one fused projection; their outputs stand one after another.

    Args:
        pieces: the factors of each part, in the order of the outputs; copied.
    """

    def __init__(self, pieces: Sequence[LowRank]) -> None:
        super().__init__()
        # No ModuleList: in a model of fewer layers than parts, it would pass for the decoder.
        self.parts = nn.ModuleDict({str(k): LowRankLinear(p) for k, p in enumerate(pieces)})

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Return the outputs of all parts, side by side."""
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)


def put_pieces(block: nn.Module, pieces: Mapping[str, Piece]) -> None:
    """Replace modules of a decoder block, in place.

    Args:
        block: one layer of a model.
        pieces: by module name inside the block; their tensors are copied, also from "meta".

    Raises:
        SelectionError: the block has no such module, or the piece does not fit in its place.
    """
    made = {name: _made(name, _linear_at(block, name), piece) for name, piece in pieces.items()}
    for name, module in made.items():
        block.set_submodule(name, module)


def pieces_of_shapes(block: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    """Return the pieces, without content, that give a block parameters of these shapes.

    Args:
        block: as its configuration makes it.
        shapes: of the parameters that it shall have, by name inside the block.

    Returns:
        By module name, with tensors on "meta". What belongs to no piece is left out: whether the
        block then has exactly these parameters is for the caller to see.

    Raises:
        SelectionError: shapes that cannot be those of one module.
    """
    pieces: dict[str, Piece] = {}
    for name, module in block.named_modules():
        if type(module) not in (nn.Linear, Conv1D):
            continue
        if f"{name}.weight" in shapes:
            if shapes[f"{name}.weight"] != tuple(module.get_parameter("weight").shape):
                weight = _weight(name, shapes)
                weight = weight.mT if isinstance(module, Conv1D) else weight
                pieces[name] = Narrow(weight, _bias(name, len(weight), shapes))
        elif f"{name}.first.weight" in shapes:
            pieces[name] = _low_rank(name, shapes)
        else:
            parts: list[LowRank] = []
            while f"{name}.parts.{len(parts)}.first.weight" in shapes:
                parts.append(_low_rank(f"{name}.parts.{len(parts)}", shapes))
            if parts:
                pieces[name] = Fused(tuple(parts))
    return pieces


def _low_rank(name: str, shapes: Mapping[str, tuple[int, ...]]) -> LowRank:
    first, second = (_weight(f"{name}.{part}", shapes) for part in ("first", "second"))
    if first.shape[0] != second.shape[1]:
        raise _misfit(name, f"of factors of rank {first.shape[0]} and {second.shape[1]}")
    return LowRank(first, second, _bias(f"{name}.second", len(second), shapes))


def _weight(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    shape = shapes.get(f"{name}.weight", ())
    if len(shape) != 2 or min(shape) < 1:
        raise _misfit(f"{name}.weight", f"of shape {shape}")
    return torch.empty(shape, device="meta")


def _bias(name: str, n: int, shapes: Mapping[str, tuple[int, ...]]) -> Tensor | None:
    if f"{name}.bias" not in shapes:
        return None
    shape = shapes[f"{name}.bias"]
    if shape != (n,):
        raise _misfit(f"{name}.bias", f"of shape {shape} for {n} outputs")
    return torch.empty(shape, device="meta")


def _linear_at(block: nn.Module, name: str) -> nn.Linear | Conv1D:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        module = None
    # By exact class: quantised modules are subclasses.
    if module is None or type(module) not in (nn.Linear, Conv1D):
        known = [n for n, m in block.named_modules() if type(m) in (nn.Linear, Conv1D)]
        raise SelectionError(
            f'there is no linear module "{name}" to replace',
            where=type(block).__name__,
            why=f"its linear modules are {', '.join(known) or 'none'}",
        )
    assert isinstance(module, nn.Linear | Conv1D)
    return module


def _made(name: str, old: nn.Linear | Conv1D, piece: Piece) -> nn.Module:
    n_out, n_in = old.weight.mT.shape if isinstance(old, Conv1D) else old.weight.shape
    if isinstance(piece, Narrow):
        return _narrowed(name, old, piece, n_in, n_out)
    pairs = (piece,) if isinstance(piece, LowRank) else piece.parts
    inputs = {pair.first.shape[1] for pair in pairs}
    outputs = sum(pair.second.shape[0] for pair in pairs)
    if inputs != {n_in} or outputs != n_out:
        found = f"factors with {outputs} outputs of {sorted(inputs)} inputs"
        raise _misfit(name, f"{found} in place of {n_out} outputs of {n_in}")
    return LowRankLinear(piece) if isinstance(piece, LowRank) else FusedLowRank(piece.parts)


def _narrowed(
    name: str, old: nn.Linear | Conv1D, piece: Narrow, n_in: int, n_out: int
) -> nn.Module:
    rows, columns = piece.weight.shape
    n_biases = None if piece.bias is None else len(piece.bias)
    has_bias = "bias" in dict(old.named_parameters(recurse=False))
    if rows > n_out or columns > n_in or n_biases != (rows if has_bias else None):
        found = f"{rows} outputs of {columns} inputs with {n_biases or 'no'} biases"
        raise _misfit(name, f"{found} in place of {n_out} outputs of {n_in} inputs")
    if isinstance(old, nn.Linear):
        return _linear(piece.weight, piece.bias)
    with torch.device("meta"):
        made = Conv1D(rows, columns)
    made.weight = _parameter(piece.weight.mT)
    assert piece.bias is not None  # a Conv1D has one
    made.bias = _parameter(piece.bias)
    return made


def _linear(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> nn.Linear:
    n_out, n_in = weight.shape
    with torch.device("meta"):
        made = nn.Linear(n_in, n_out, bias=bias is not None)
    made.weight = _parameter(weight)
    if bias is not None:
        made.bias = _parameter(bias)
    return made


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def _misfit(name: str, found: str) -> SelectionError:
    return SelectionError(f'what shall replace "{name}" does not fit there', why=f"it is {found}")
