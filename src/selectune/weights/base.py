"""The weights of a base model by the names that they have without any adapter around them."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from selectune.errors import SelectionError
from selectune.gradients.kernels import Swapped
from selectune.weights.linear import LinearMap, linear_map

_PEFT = "base_model.model."
# What peft puts between a module and its weights: around a LoRA, and beside a copy that trains.
_WRAPPED = (".base_layer", ".original_module")
# Names that only adapters bear; what a base calls so would not be found by peft either.
_ADAPTERS = (".lora_", ".ia3_", ".modules_to_save", ".bottleneck", ".prefix.", "_values")


def bare_name(name: str) -> str:
    """Return a parameter's name in the bare base; peft renames what it wraps."""
    bare = name.removeprefix(_PEFT)
    for mark in _WRAPPED:
        bare = bare.replace(mark, "")
    return bare


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base by bare name: tied ones once, adapters not at all."""
    return {
        bare_name(name): p
        for name, p in _inner(model).named_parameters()
        if not any(mark in name for mark in _ADAPTERS)
    }


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """Return the linear maps of the base, quantised ones too, by the bare name of their matrix."""
    found: dict[str, LinearMap] = {}
    for prefix, module in _inner(model).named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        linear = None if any(mark in name for mark in _ADAPTERS) else linear_map(module)
        if linear is not None:
            found[bare_name(name)] = linear  # what peft wraps comes after its wrapper
    return found


def _inner(model: nn.Module) -> nn.Module:
    # What peft calls its own parts depends on the adapter; the model inside it keeps its names.
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_fingerprint(model: nn.Module) -> str:
    """Return a hash of the base's weights: names, types, shapes and bytes; quantised with scales.

    What a library makes of the same weights may depend on its version and device: two models that
    were quantised from one base need not have one fingerprint.
    """
    weights = dict(_stored(model))

    def hashed(name: str) -> str:
        p = weights[name].detach().contiguous().cpu()
        digest = hashlib.sha256(f"{name}:{p.dtype}:{tuple(p.shape)}".encode())
        content: Any = p.flatten().view(torch.uint8).numpy()
        digest.update(content)
        return digest.hexdigest()

    names = sorted(weights)
    # hashlib lets other threads run while it works.
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        parts = threads.map(hashed, names)
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    quantised = {n: linear for n, linear in linear_maps(model).items() if linear.is_quantised}
    for name, p in base_weights(model).items():
        if name not in quantised:
            yield name, p
    for name, linear in quantised.items():
        for key, tensor in linear.stored().items():
            if not any(mark in key for mark in _ADAPTERS):
                yield from _parts(name.removesuffix("weight") + key, tensor)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Take a tensor apart that others make up."""
    if is_traceable_wrapper_subclass(tensor):
        for key in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{key}", getattr(tensor, key))
    else:
        yield name, tensor.detach().as_subclass(Tensor)


def refuse_chosen(model: nn.Module, *, where: str, do: str) -> None:
    """Refuse a model of which single weights train already.

    Raises:
        SelectionError: it is one.
    """
    if any(isinstance(module, Swapped) for module in model.modules()):
        raise SelectionError(
            "the model has chosen entries already",
            where=where,
            why="a mask is made from the base, and gradients reach the chosen entries alone",
            do=do,
        )


def flat(weight: Tensor) -> Tensor:
    """Return a weight as one row of entries that shares its memory.

    Raises:
        RuntimeError: its entries do not lie one after another.
    """
    return weight.detach().view(-1)
