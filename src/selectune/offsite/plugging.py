"""The owner's model while a plugin goes into it: recognised, changed in place, compared."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import CoverageError, IncompatibleRunError, SelectionError
from selectune.models import blocks, fingerprint
from selectune.offsite.emulator import block_prefix, original_name
from selectune.offsite.manifests import OwnerRecord
from selectune.offsite.package import tensors_outside
from selectune.offsite.plugin_files import A, B


def adapter_of(model: nn.Module, record: OwnerRecord) -> dict[str, Tensor]:
    """Return the tensors of the layers that train, by the emulator's names; they are the live ones.

    Raises:
        IncompatibleRunError: the model is not the one that the package was made of. Its layers
            that train are not looked at.
    """
    try:
        n_layers, prefix = len(blocks(model)), block_prefix(model)
    except SelectionError as error:
        raise another_base(record, str(error)) from error
    if (n_layers, prefix) != (record.n_layers, record.blocks):
        raise another_base(
            record,
            f"it has {n_layers} layers called {prefix}, expected were {record.n_layers} called "
            f"{record.blocks}",
        )
    held = model.state_dict()
    names = {name: original_name(name, prefix, record.positions) for name in record.adapter}
    for name, facts in record.adapter.items():
        tensor = held.get(names[name])
        if tensor is None or not facts.describes(tensor):
            found = "there is none" if tensor is None else f"it is {tensor.dtype}"
            raise another_base(record, f"{names[name]} should be {facts}, {found}")
    if fingerprint(_rest(model, record)) != record.rest:
        raise another_base(record, "names and shapes fit, but some of the weights differ")
    return {name: held[own] for name, own in names.items()}


def linear_of(model: nn.Module, record: OwnerRecord) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of every linear module in the layers that train.

    Args:
        model: the original.
        record: what was kept of the package.

    Returns:
        By the emulator's name of the module.
    """
    every = blocks(model)
    found: dict[str, tuple[int, int]] = {}
    for index in record.adapter_layers:
        for name, module in every[record.positions[index]].named_modules():
            if type(module) in (nn.Linear, Conv1D):
                weight = module.get_parameter("weight")
                shape = weight.T.shape if isinstance(module, Conv1D) else weight.shape
                found[f"{record.blocks}.{index}.{name}"] = (shape[0], shape[1])
    return found


def merged(
    model: nn.Module,
    record: OwnerRecord,
    factors: Mapping[str, Tensor],
    scales: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return the weights that LoRA factors make of those in the model, which stay as they are.

    The sum is formed in fp32 and rounded once, to the type of the weight.

    Args:
        model: the original.
        record: what was kept of the package.
        factors: checked.
        scales: of the modules that have factors.

    Raises:
        IncompatibleRunError: a sum is not a finite number of that type.
    """
    weights: dict[str, Tensor] = {}
    for name, scale in scales.items():
        module = model.get_submodule(original_name(name, record.blocks, record.positions))
        weight = module.get_parameter("weight").detach()
        change = (factors[f"{name}{B}"] @ factors[f"{name}{A}"]).to(weight.device) * scale
        change = change.T if isinstance(module, Conv1D) else change
        made = (weight.float() + change).to(weight.dtype)
        if not bool(made.isfinite().all()):
            raise IncompatibleRunError(
                f"with its factors {name} would not be finite numbers of type {made.dtype}",
                where=f"package {record.package}",
                do="ask the data owner to train again with a lower learning rate",
            )
        weights[f"{name}.weight"] = made
    return weights


@torch.no_grad()
def change(
    model: nn.Module,
    record: OwnerRecord,
    adapter: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> dict[str, float]:
    """Write tensors into the layers that train; after an error, the model is what it was.

    Args:
        model: the original.
        record: what was kept of the package.
        adapter: from `adapter_of`.
        tensors: what some of them become.

    Returns:
        By the original's names, the norm of each change over that of the tensor before.

    Raises:
        CoverageError: a tensor outside these layers would change with them.
    """
    before = {name: adapter[name].clone() for name in tensors}
    changes: dict[str, float] = {}
    for name, tensor in tensors.items():
        adapter[name].copy_(tensor)
        own = original_name(name, record.blocks, record.positions)
        changes[own] = _relative(before[name], adapter[name])
    if fingerprint(_rest(model, record)) != record.rest:
        for name, tensor in before.items():
            adapter[name].copy_(tensor)
        raise CoverageError(
            "a tensor outside the layers that train would change with them",
            where=type(model).__name__,
            why="two tensors of the model share memory",
            do="load the original anew, with its own tensors",
        )
    return changes


def another_base(record: OwnerRecord, why: str) -> IncompatibleRunError:
    """Return the error for a model that a package was not made of."""
    return IncompatibleRunError(
        "this is not the model that the package was made of",
        where=f"package {record.package}",
        why=why,
        do=f"give the original, untouched, with dtype={record.dtype}",
    )


def _rest(model: nn.Module, record: OwnerRecord) -> dict[str, Tensor]:
    trained = [record.positions[index] for index in record.adapter_layers]
    return tensors_outside(model, record.blocks, trained)


def _relative(before: Tensor, after: Tensor) -> float:
    moved = float((after.double() - before.double()).norm())
    own = float(before.double().norm())
    return moved / own if own else float("inf") if moved else 0.0
