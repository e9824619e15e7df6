"""Put a mask of weights to work in a model, and take it off again.

model = sparsify(model, mask)
optimizer = torch.optim.AdamW(model.parameters())       # or Trainer(model, ...), SFTTrainer
...
model.save_pretrained("delta")
"""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import nn

from selectune.errors import SelectionError
from selectune.gradients.kernels import Swapped
from selectune.training.sparse.compose import Beside, SparseSum
from selectune.training.sparse.entries import DecayTo, Entries, Form, unwatch
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.in_place import InPlace
from selectune.training.sparse.modules import (
    VALUES,
    SparseProduct,
    SparseWeight,
    input_axis,
    swapped,
)
from selectune.training.sparse.refusals import (
    Places,
    composable,
    input_axes,
    owners_of,
    refuse,
    refuse_beside,
    refuse_model,
    refuse_options,
    refuse_other_base,
    refuse_return,
    refuse_single,
)
from selectune.training.sparse.routes import Route, Routes
from selectune.training.sparse.saving import SparseModel
from selectune.weights.base import base_fingerprint, base_weights
from selectune.weights.delta import QUANTISED
from selectune.weights.mask import WeightMask

Model = TypeVar("Model", bound=nn.Module)
# What Trainer of transformers 5.24 asks before it trains a quantised model: whether something that
# can be trained stands beside it. Nothing public says so.
_HAS_ADAPTER = "_hf_peft_config_loaded"


def sparsify(
    model: Model,
    mask: WeightMask,
    *,
    route: Route = "auto",
    decay_to: DecayTo | None = None,
    form: Form = "in_place",
    other_base: bool = False,
) -> Model:
    """Let only the chosen entries of a model's weights train.

    The base is frozen; adapters in the model train on beside the entries. In place, the entries
    change in the weights themselves. Composed, what changes stands beside the matrices, and acts
    beside them: y = module(x) + x Delta^T. That works where nothing can change in the weights
    (quantised ones) and where they are sharded afterwards (`fully_shard`), and costs one more
    sparse product in each pass.

    Args:
        model: the base that the mask was made for, bare or in a peft model; on its device.
        mask: the entries.
        route: how gradients reach the entries; auto measures which way is the fastest.
        decay_to: what weight decay pulls to: zero, as in plain training, or the base. By itself
            zero in place; composed it can only be the base.
        form: in_place, or compose.
        other_base: take a mask that was made on other values of weights with the same names and
            shapes, such as those that this base was quantised from.

    Returns:
        The same model. `save_pretrained` now writes the delta; `model.sparse` tells about it.

    Raises:
        IncompatibleRunError: the mask was made for another model.
        SelectionError: no entry is chosen, or the model has chosen entries already.
        CoverageError: a chosen weight cannot be trained in this form.
        ConfigError: an option is wrong.
    """
    decay = decay_to or ("base" if form == "compose" else "zero")
    refuse_options(route, decay, form)
    refuse_model(model, mask)
    weights, owners = base_weights(model), owners_of(model)
    linears = composable(model, mask.indices) if form == "compose" else {}
    if form == "compose":
        refuse_beside(linears, mask)
    else:
        refuse(model, mask, weights, owners)
    base = base_fingerprint(model)
    if not other_base:
        refuse_other_base(mask, base)
    routes = Routes(route)
    entries: Mapping[str, Entries]
    if form == "compose":
        entries = {n: Beside(n, linears[n], i, routes=routes) for n, i in mask}
    else:
        entries = _in_place(mask, weights, owners, decay, routes)
    trained = [p for p in weights.values() if p.requires_grad]
    for p in weights.values():
        p.requires_grad_(False)
        p.grad = None  # what is left there would move the whole weight at the next step
    for module in model.modules():
        _swap(module, is_root=module is model)
    model.__dict__["sparse"] = Sparse(mask, base, decay, entries, routes, form, trained)
    if any(e.dtype == QUANTISED for e in entries.values()):
        model.__dict__[_HAS_ADAPTER] = True
    return model


def _in_place(
    mask: WeightMask,
    weights: Mapping[str, nn.Parameter],
    owners: Mapping[int, Places],
    decay_to: DecayTo,
    routes: Routes,
) -> dict[str, InPlace]:
    found = {name: (weights[name], owners[id(weights[name])]) for name in mask.indices}
    axes = {name: input_axes(places) for name, (_, places) in found.items()}
    if routes.asked == "columns":
        refuse_single(mask, weights, axes)
    entries: dict[str, InPlace] = {}
    for name, (weight, places) in found.items():
        module, key = places[0]
        strengths: dict[str, float] = vars(module).setdefault("sparse_strengths", {})
        entries[name] = InPlace(
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
    return entries


def restore(model: Model, *, to_base: bool = False) -> Model:
    """Give a model its own classes back; its weights stay as they were trained.

    Entries beside their matrices are added to these.

    Args:
        model: that `sparsify` was called on.
        to_base: leave the weights as the base has them, bit for bit.

    Raises:
        SelectionError: the model has no chosen entries.
        CoverageError: nothing can be added to quantised weights, or the model is sharded.
    """
    if not isinstance(model, SparseModel):
        raise SelectionError("the model has no chosen entries", where="restore")
    sparse = model.sparse
    refuse_return(sparse, to_base=to_base)
    for entries in sparse.entries.values():
        entries.let_go(to_base=to_base)
        unwatch(entries)
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            for key in list(vars(module).pop("sparse_entries", ())):
                delattr(module, key + VALUES)
            vars(module).pop("sparse_strengths", None)
            cast("Any", module).__class__ = module.swapped_from
    del model.__dict__["sparse"]
    model.__dict__.pop(_HAS_ADAPTER, None)
    for p in sparse.trained:
        p.requires_grad_(True)
    return model


def _swap(module: nn.Module, *, is_root: bool) -> None:
    kinds: list[type[Swapped]] = [SparseModel] if is_root else []
    held: dict[str, Entries] = vars(module).get("sparse_entries", {})
    keys = tuple(key for key, entries in held.items() if isinstance(entries, InPlace))
    if held and not keys:
        kinds.append(SparseSum)
    elif "weight" in held and input_axis(module, "weight") == held["weight"].input_axis is not None:
        kinds.append(SparseProduct)
    elif held:
        kinds.append(SparseWeight)
    if kinds:
        module.__class__ = swapped(tuple(kinds), type(module), keys)
