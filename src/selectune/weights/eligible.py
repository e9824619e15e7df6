"""Which weights of a base may be chosen from: by rule, or by the names that a user gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import CoverageError, SelectionError, nearest
from selectune.models import blocks
from selectune.weights.base import base_weights

# "layers": matrices of linear maps inside decoder blocks. Weights that start at zero (biases,
# Gemma's norms) look small and eat the budget of every score that favours small weights; rows of
# embeddings that no text uses have no gradient.
Eligible = Literal["layers", "all"] | list[str]

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class EligibleWeight:
    """One tensor whose entries may be chosen.

    Attributes:
        name: in the bare base.
        parameter: the live weight.
        layer: index of the decoder block that it stands in; None outside of them.
        is_linear: whether it is the matrix of a linear map.
        is_input_first: whether it is stored [in, out], as GPT-2's are, and not [out, in].
    """

    name: str
    parameter: nn.Parameter
    layer: int | None
    is_linear: bool
    is_input_first: bool


def eligible_weights(model: nn.Module, rule: Eligible) -> dict[str, EligibleWeight]:
    """Return the tensors that a rule names, by bare name, in the order of the model.

    Args:
        model: a base, bare or with adapters around it; adapters are never eligible.
        rule: "layers", "all", or patterns. A pattern fits a parameter when it fits its whole name,
            or what follows a dot in it, with or without a final ".weight": "q_proj",
            "mlp.down_proj", "model.layers.3.*", "*_proj".

    Raises:
        SelectionError: a pattern fits nothing, or the model has no such weights.
        CoverageError: a weight that is named is not stored as floating-point numbers.
    """
    every = _described(model)
    if rule == "layers":
        found = {n: w for n, w in every.items() if w.layer is not None and w.is_linear}
    elif rule == "all":
        found = every
    else:
        found = _matching(every, list(rule))
    if not found:
        raise SelectionError(
            "no weight of the model may be chosen from",
            where=type(model).__name__,
            why="its decoder blocks hold no Linear or Conv1D"
            if rule == "layers"
            else "no name or pattern was given, or the model has no weights",
            do='name the weights: eligible=["q_proj", ...], or eligible="all"',
        )
    for name, weight in found.items():
        if weight.parameter.dtype not in _TRAINABLE:
            raise CoverageError(
                f"{name} is stored as {weight.parameter.dtype}",
                where="eligible",
                why="scores are of single entries, which a quantised weight has not",
                do="score the base in fp32 or bf16; the mask trains beside the quantised one with "
                'sparsify(model, mask, form="compose", other_base=True)',
            )
    return found


def fits(pattern: str, name: str) -> bool:
    """Say whether a pattern fits a parameter's name; see `eligible_weights`."""
    for whole in {name, name.removesuffix(".weight")}:
        parts = whole.split(".")
        if any(fnmatchcase(".".join(parts[k:]), pattern) for k in range(len(parts))):
            return True
    return False


def _matching(every: Mapping[str, EligibleWeight], rule: list[str]) -> dict[str, EligibleWeight]:
    chosen: set[str] = set()
    for place, pattern in enumerate(rule):
        names = {name for name in every if fits(pattern, name)}
        if not names:
            modules = {name.removesuffix(".weight") for name in every}
            close = nearest(pattern, modules)
            if not close.startswith("did you"):  # too many to list: offer their last parts
                close = nearest(pattern, {name.rsplit(".", 1)[-1] for name in modules})
            raise SelectionError(
                f'"{pattern}" fits none of the {len(every)} weights of the base',
                where=f"eligible[{place}]",
                why="a pattern fits a whole name, or what follows a dot in it",
                do=close,
            )
        chosen |= names
    return {name: weight for name, weight in every.items() if name in chosen}


def _described(model: nn.Module) -> dict[str, EligibleWeight]:
    linear: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight.ndim == 2:
            linear[id(module.weight)] = module
    layers = _layers(model)
    return {
        name: EligibleWeight(
            name,
            p,
            layers.get(id(p)),
            is_linear=id(p) in linear,
            is_input_first=isinstance(linear.get(id(p)), Conv1D),
        )
        for name, p in base_weights(model).items()
    }


def _layers(model: nn.Module) -> dict[int, int]:
    try:
        found = blocks(model)
    except SelectionError:  # no decoder: its weights may still be named
        return {}
    return {id(p): index for index, block in enumerate(found) for p in block.parameters()}
