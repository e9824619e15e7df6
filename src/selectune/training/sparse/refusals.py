"""What `sparsify` refuses, before anything in the model has changed."""

from collections.abc import Mapping
from typing import TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selectune.errors import (
    ConfigError,
    CoverageError,
    IncompatibleRunError,
    SelectionError,
    nearest,
)
from selectune.training.sparse.channels import whole_channels
from selectune.training.sparse.entries import DecayTo
from selectune.training.sparse.modules import input_axis
from selectune.training.sparse.routes import Route
from selectune.weights.base import refuse_chosen
from selectune.weights.mask import WeightMask

_TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Places: TypeAlias = list[tuple[nn.Module, str]]  # modules that hold a tensor, and as what


def owners_of(model: nn.Module) -> dict[int, Places]:
    """Return which modules hold each parameter, by its id."""
    found: dict[int, Places] = {}
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            found.setdefault(id(p), []).append((module, key))
    return found


def input_axes(places: Places) -> int | None:
    """Return the axis that inputs lie on for all linear modules that hold a weight."""
    axes = {input_axis(module, key) for module, key in places} - {None}
    return axes.pop() if len(axes) == 1 else None


def refuse_options(route: str, decay_to: str) -> None:
    """Refuse what is no option.

    Raises:
        ConfigError: there is no such route, or nothing that weights could decay to.
    """
    for name, value, known in (
        ("route", route, get_args(Route)),
        ("decay_to", decay_to, get_args(DecayTo)),
    ):
        if value not in known:
            raise ConfigError(
                f'there is no {name} "{value}"',
                where="sparsify",
                why=f"it is one of {', '.join(known)}",
                do=nearest(value, known),
            )


def refuse(
    model: nn.Module,
    mask: WeightMask,
    weights: Mapping[str, nn.Parameter],
    owners: Mapping[int, Places],
) -> None:
    """Refuse a mask that cannot be put to work in a model.

    Raises:
        SelectionError: no entry is chosen, or the model has chosen entries already.
        IncompatibleRunError: tensors are missing or have another shape.
        CoverageError: a tensor cannot be trained in place.
    """
    refuse_chosen(
        model,
        where="sparsify",
        do="combine the masks (a | b) and give both at once, or `restore` the model first",
    )
    if "sparse" in vars(model):
        raise CoverageError(
            "what trains would be told at model.sparse, which the model has of its own",
            where=type(model).__name__,
            do="give a module that holds this one",
        )
    if mask.n_chosen == 0:
        raise SelectionError("the mask has no entry", where="sparsify", why="nothing would train")
    for name in mask.indices:
        if name not in weights:
            raise IncompatibleRunError(
                f"the mask was made for another model: this one has no weight {name}",
                where=type(model).__name__,
                why="quantised weights, and those of a wrapped model, have other names too",
                do=nearest(name, weights) + " Give the model itself, in fp32 or bf16",
            )
        _refuse_tensor(name, weights[name], owners[id(weights[name])])
        shape = tuple(weights[name].shape)
        if shape != tuple(mask.shapes[name]):
            raise IncompatibleRunError(
                "the mask was made for another model",
                where=name,
                why=f"the mask expects the shape {tuple(mask.shapes[name])}, the model has {shape}",
                do="load the base that was scored, or score this one",
            )


def refuse_other_base(mask: WeightMask, base: str) -> None:
    """Refuse a mask of a base with other weights.

    Raises:
        IncompatibleRunError: the fingerprints differ.
    """
    if mask.base not in ("", base):
        raise IncompatibleRunError(
            "the mask was made for another model",
            where="sparsify",
            why=f"it expects a base with the fingerprint {mask.base}, this one has {base}: names "
            "and shapes fit, values or types differ",
            do="load the base that was scored, in the same dtype, or score this one",
        )


def refuse_single(
    mask: WeightMask, weights: Mapping[str, Tensor], axes: Mapping[str, int | None]
) -> None:
    """Refuse single entries where whole input channels are to train.

    Raises:
        ConfigError: a tensor has chosen entries that are no whole channels.
    """
    for name, index in mask.indices.items():
        if whole_channels(index, weights[name], axes[name]) is None:
            raise ConfigError(
                "the mask does not choose whole input channels",
                where=name,
                why='the route "columns" is for these, in linear modules',
                do='leave route out, or use a mask of channels ("s2ft")',
            )


def _refuse_tensor(name: str, weight: nn.Parameter, places: Places) -> None:
    data = weight.data
    why = ""
    if weight.dtype not in _TRAINED or type(data) is not Tensor:
        kind = str(weight.dtype) if type(data) is Tensor else type(data).__name__
        why = f"its entries are {kind}: steps of an optimizer are smaller than between two values"
    if isinstance(data, DTensor):
        why = "it is sharded over processes, and entries are chosen by their place in the whole"
    elif weight.is_meta:
        why = "it holds no data yet (meta device)"
    elif not why and not weight.is_contiguous():
        why = "its entries do not lie one after another in memory"
    for module, _ in places:
        if isinstance(module, nn.RNNBase):
            why = f"{type(module).__name__} keeps its weights in a list of its own"
        if isinstance(module, nn.Embedding) and module.max_norm:
            why = "the embedding rescales its rows (max_norm) whenever they are looked up"
    if why:
        raise CoverageError(
            f"{name} cannot be trained in place",
            where=type(places[0][0]).__name__,
            why=why,
            do="load the model in fp32 or bf16 on its device, or leave this tensor out of the "
            "eligible ones",
        )
