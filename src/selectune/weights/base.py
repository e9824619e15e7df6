"""The weights of a base model by the names that they have without any adapter around them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from selectune.errors import SelectionError
from selectune.gradients.kernels import Swapped

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
    # What peft calls its own parts depends on the adapter; the model inside it keeps its names.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        bare_name(name): p
        for name, p in inner.named_parameters()
        if not any(mark in name for mark in _ADAPTERS)
    }


def base_fingerprint(model: nn.Module) -> str:
    """Return a hash of the base's weights: names, types, shapes and bytes."""
    weights = base_weights(model)

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
