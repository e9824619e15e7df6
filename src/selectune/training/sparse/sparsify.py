"""Put a mask of weights to work in a model, and take it off again.

model = sparsify(model, mask)
optimizer = torch.optim.AdamW(model.parameters())       # or Trainer(model, ...), SFTTrainer
...
model.save_pretrained("delta")
"""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from selectune.errors import SelectionError
from selectune.gradients.kernels import Swapped
from selectune.training.sparse.entries import DecayTo, Entries, unwatch
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.modules import (
    VALUES,
    SparseModule,
    SparseProduct,
    input_axis,
    swapped,
)
from selectune.training.sparse.refusals import (
    input_axes,
    owners_of,
    refuse,
    refuse_options,
    refuse_other_base,
    refuse_single,
)
from selectune.training.sparse.routes import Route, Routes
from selectune.training.sparse.saving import SparseModel
from selectune.weights.base import base_fingerprint, base_weights, flat
from selectune.weights.mask import WeightMask

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model, mask: WeightMask, *, route: Route = "auto", decay_to: DecayTo = "zero"
) -> Model:
    """Let only the chosen entries of a model's weights train, in place.

    The base is frozen; adapters in the model train on beside the entries.

    Args:
        model: the base that the mask was made for, bare or in a peft model; on its device.
        mask: the entries.
        route: how gradients reach the entries; auto measures which way is the fastest.
        decay_to: what weight decay pulls to: zero, as in plain training, or the base.

    Returns:
        The same model. `save_pretrained` now writes the delta; `model.sparse` tells about it.

    Raises:
        IncompatibleRunError: the mask was made for another model.
        SelectionError: no entry is chosen, or the model has chosen entries already.
        CoverageError: a chosen weight cannot be trained in place.
        ConfigError: an option is wrong.
    """
    refuse_options(route, decay_to)
    weights, owners = base_weights(model), owners_of(model)
    refuse(model, mask, weights, owners)
    base = base_fingerprint(model)
    refuse_other_base(mask, base)
    routes = Routes(route)
    found = {name: (weights[name], owners[id(weights[name])]) for name in mask.indices}
    axes = {name: input_axes(places) for name, (_, places) in found.items()}
    if route == "columns":
        refuse_single(mask, weights, axes)
    trained = [p for p in weights.values() if p.requires_grad]
    entries: dict[str, Entries] = {}
    for name, (weight, places) in found.items():
        module, key = places[0]
        strengths: dict[str, float] = vars(module).setdefault("sparse_strengths", {})
        entries[name] = Entries(
            name,
            weight,
            mask.indices[name],
            decay_to=decay_to,
            routes=routes,
            input_axis=axes[name],
            strengths=strengths,
            key=key + VALUES,
        )
        for module, key in places:
            vars(module).setdefault("sparse_strengths", strengths)
            vars(module).setdefault("sparse_entries", {})[key] = entries[name]
            module.register_parameter(key + VALUES, entries[name].values)
    for p in weights.values():
        p.requires_grad_(False)
        p.grad = None  # what is left there would move the whole weight at the next step
    for module in model.modules():
        _swap(module, is_root=module is model)
    model.__dict__["sparse"] = Sparse(mask, base, decay_to, entries, routes, trained)
    return model


def restore(model: Model, *, to_base: bool = False) -> Model:
    """Give a model its own classes back; its weights stay as they were trained.

    Args:
        model: that `sparsify` was called on.
        to_base: write the overwritten weights of the base back, bit for bit.

    Raises:
        SelectionError: the model has no chosen entries.
    """
    if not isinstance(model, SparseModel):
        raise SelectionError("the model has no chosen entries", where="restore")
    sparse = model.sparse
    with torch.no_grad():
        for entries in sparse.entries.values():
            entries.sync()
            if to_base:
                flat(entries.weight)[entries.index] = entries.base
            unwatch(entries)
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            for key in list(vars(module).pop("sparse_entries", ())):
                delattr(module, key + VALUES)
            vars(module).pop("sparse_strengths", None)
            cast("Any", module).__class__ = module.swapped_from
    del model.__dict__["sparse"]
    for p in sparse.trained:
        p.requires_grad_(True)
    return model


def _swap(module: nn.Module, *, is_root: bool) -> None:
    kinds: list[type[Swapped]] = [SparseModel] if is_root else []
    held: dict[str, Entries] = vars(module).get("sparse_entries", {})
    if "weight" in held and input_axis(module, "weight") == held["weight"].input_axis is not None:
        kinds.append(SparseProduct)
    elif held:
        kinds.append(SparseModule)
    if kinds:
        module.__class__ = swapped(tuple(kinds), type(module), tuple(held))
