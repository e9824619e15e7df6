"""What `sparsify` refuses, before anything in the model has changed."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias, get_args

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selectune.errors import (
    ConfigError,
    CoverageError,
    IncompatibleRunError,
    SelectionError,
    nearest,
)
from selectune.recipe.checks import uncomposed
from selectune.training.sparse.channels import whole_channels
from selectune.training.sparse.entries import DecayTo, Form
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.modules import input_axis
from selectune.training.sparse.routes import Route
from selectune.weights.base import base_weights, linear_maps, refuse_chosen
from selectune.weights.delta import QUANTISED
from selectune.weights.linear import PLAIN, LinearMap
from selectune.weights.mask import WeightMask

_SHARDED = "it is sharded over processes, and entries are chosen by their place in the whole"
_COMPOSE = 'sparsify(model, mask, form="compose")'
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


def refuse_options(route: str, decay_to: str, form: str = "in_place") -> None:
    """Refuse what is no option.

    Raises:
        ConfigError: there is no such route or form, nothing that weights could decay to, or the
            form has not the one or the other.
    """
    for name, value, known in (
        ("route", route, get_args(Route)),
        ("decay_to", decay_to, get_args(DecayTo)),
        ("form", form, get_args(Form)),
    ):
        if value not in known:
            raise ConfigError(
                f'there is no {name} "{value}"',
                where="sparsify",
                why=f"it is one of {', '.join(known)}",
                do=nearest(value, known),
            )
    for name, value, why in uncomposed(route, decay_to) if form == "compose" else ():
        raise ConfigError(
            f'{name}="{value}" does not go with form="compose"',
            where="sparsify",
            why=why,
            do=f'leave {name} out, or use form="in_place"',
        )


def refuse_model(model: nn.Module, mask: WeightMask) -> None:
    """Refuse a model that cannot take entries, or a mask without any.

    Raises:
        SelectionError: no entry is chosen, or the model has chosen entries already.
        CoverageError: the model has something of its own where its entries would be told.
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


def refuse(
    model: nn.Module,
    mask: WeightMask,
    weights: Mapping[str, nn.Parameter],
    owners: Mapping[int, Places],
) -> None:
    """Refuse a mask that cannot be put to work in the weights of a model.

    Raises:
        IncompatibleRunError: tensors are missing or have another shape.
        CoverageError: a tensor cannot be trained in place.
    """
    for name in mask.indices:
        if name not in weights:
            raise IncompatibleRunError(
                f"the mask was made for another model: this one has no weight {name}",
                where=type(model).__name__,
                why="quantised weights, and those of a wrapped model, have other names too",
                do=nearest(name, weights) + " Give the model itself, in fp32 or bf16",
            )
        _refuse_tensor(name, weights[name], owners[id(weights[name])])
        _refuse_shape(name, tuple(weights[name].shape), mask)


def composable(model: nn.Module, names: Iterable[str]) -> dict[str, LinearMap]:
    """Return the linear maps beside whose matrices entries can act.

    Args:
        model: a base, bare or with adapters around it; shapes are enough.
        names: of matrices in the bare base.

    Raises:
        IncompatibleRunError: the model has no such tensor.
        CoverageError: a tensor is no matrix of a linear map, or another module reads it too.
    """
    linears, weights, owners = linear_maps(model), base_weights(model), owners_of(model)
    found: dict[str, LinearMap] = {}
    for name in names:
        linear = linears.get(name)
        held = weights.get(name) if linear is None else linear.weight
        if linear is None and held is None:
            raise IncompatibleRunError(
                f"the mask was made for another model: this one has no weight {name}",
                where=type(model).__name__,
                do=nearest(name, linears),
            )
        readers = [] if held is None else [type(m).__name__ for m, _ in owners[id(held)]]
        do = "leave this tensor out of the eligible ones, or train it in place"
        if isinstance(held, DTensor):
            why, do = _SHARDED, f"call {_COMPOSE} first, then fully_shard"
        elif linear is None:
            why = f"{readers[0]} does something else with it than to multiply its input by it"
        elif len(readers) > 1:
            why = f"{', '.join(readers)} read it, and what is added would act in one of them"
        else:
            found[name] = linear
            continue
        raise CoverageError(
            f"no entry can be trained beside {name}", where=type(model).__name__, why=why, do=do
        )
    return found


def refuse_beside(linears: Mapping[str, LinearMap], mask: WeightMask) -> None:
    """Refuse a mask that cannot be put to work beside the matrices of a model.

    Raises:
        IncompatibleRunError: matrices have another shape.
        CoverageError: one holds no data yet.
    """
    for name, linear in linears.items():
        _refuse_shape(name, linear.shape, mask)
        if linear.device.type == "meta":
            raise CoverageError(
                f"no entry can be trained beside {name}",
                where=type(linear.module).__name__,
                why="it holds no data yet (meta device)",
                do="load the model on its device",
            )


def _refuse_shape(name: str, shape: tuple[int, ...], mask: WeightMask) -> None:
    if shape != tuple(mask.shapes[name]):
        raise IncompatibleRunError(
            "the mask was made for another model",
            where=name,
            why=f"the mask expects the shape {tuple(mask.shapes[name])}, the model has {shape}",
            do="load the base that was scored, or score this one",
        )


def refuse_return(sparse: Sparse, *, to_base: bool) -> None:
    """Refuse to take off chosen entries where what trained would be lost.

    Raises:
        CoverageError: nothing can be added to quantised weights, or the model is sharded.
    """
    why = do = ""
    quantised = [name for name, e in sparse.entries.items() if e.dtype == QUANTISED]
    if sparse.is_sharded:
        why, do = "the model is sharded over processes", "save the delta, and load the base anew"
    elif quantised and not to_base:
        why = f"nothing can be added to quantised weights, and {len(quantised)} of them are"
        do = "save the delta, then restore(model, to_base=True)"
    if why:
        raise CoverageError(
            "the chosen entries cannot be taken off the model",
            where=f"restore(to_base={to_base})",
            why=why,
            do=do,
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
            do="load the base that was scored, in the same dtype, or score this one; where this "
            "one was quantised from it, say so with other_base=True",
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
    do = "load the model in fp32 or bf16 on its device, or leave it out of the eligible ones"
    if weight.dtype not in PLAIN or type(data) is not Tensor:
        kind = str(weight.dtype) if type(data) is Tensor else type(data).__name__
        why = f"its entries are {kind}: steps of an optimizer are smaller than between two values"
        do = f"train beside it: {_COMPOSE}; or {do}"
    if isinstance(data, DTensor):
        why, do = _SHARDED, f"call {_COMPOSE} first, then fully_shard"
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
            do=do,
        )
