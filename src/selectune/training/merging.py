"""Layers that stand still run with their LoRA factors merged, so that these cost nothing.

The merged weight is a copy, which only the forward passes of training see. The frozen weight stays
in its place, untouched: checkpoints, evaluation and everything else see the model as it is.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from selectune.errors import ConfigError
from selectune.training.layers import Layer


class MergedLayers:
    """Merged copies of the layers that are not trained.

    In training, a layer that stands still then runs without dropout before its factors.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Merge nothing yet.

        Args:
            layers: whose parameters are on or off together.

        Raises:
            ConfigError: there is no LoRA on a linear module in them.
        """
        self._modules = [
            [
                module
                for module in layer.block.modules()
                if isinstance(module, LoraLinear)
                # Quantised modules are of other classes.
                and type(module.get_base_layer()) in (nn.Linear, Conv1D)
            ]
            for layer in layers
        ]
        self._copies: dict[int, list[_Copy]] = {}
        if not any(self._modules):
            raise ConfigError(
                "there is nothing to merge",
                where="merge",
                why="only the factors of LoRA and DoRA on unquantised linear modules can be merged",
                do="set merge=False",
            )

    def merge(self, standing: Collection[int]) -> None:
        """Have merged copies of exactly these layers; those that are still good are kept.

        Args:
            standing: places of the layers that are not trained.
        """
        for place in list(self._copies):
            if place not in standing or not all(copy.is_good() for copy in self._copies[place]):
                for copy in self._copies.pop(place):
                    copy.remove()
        for place in standing:
            if place not in self._copies:
                self._copies[place] = [_Copy(module) for module in self._modules[place]]

    def close(self) -> None:
        """Drop every copy."""
        self.merge(())


class _Copy:
    """One module's merged weights, and the hooks that lend them to its forward passes."""

    def __init__(self, module: LoraLinear) -> None:
        self._module = module
        self._below = module.get_base_layer()
        self._names = list(module.active_adapters)
        # What it was made from; each change of a tensor in place raises its version.
        self._sources = list(module.parameters())
        self._versions = self._now()
        below = {id(p) for p in self._below.parameters()}
        self._factors = [p for p in self._sources if id(p) not in below]
        self._weights = _merged(module, self._below)
        self._lent: list[tuple[dict[str, Any], list[str]] | None] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def is_good(self) -> bool:
        """Return whether nothing that it was made from has changed."""
        return self._versions == self._now()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _now(self) -> list[int]:
        return [p._version for p in self._sources]

    def _before(self, module: LoraLinear, args: object, kwargs: dict[str, Any]) -> None:
        if (
            # Evaluation, and passes for which somebody wakes the layer up, see the factors.
            not (module.training or torch.is_grad_enabled())
            or any(p.requires_grad for p in self._factors)
            or module.disable_adapters
            or list(module.active_adapters) != self._names
            or kwargs.get("adapter_names") is not None
        ):
            self._lent.append(None)
            return
        # torch's own table: an attribute takes no plain tensor in a parameter's place.
        table: dict[str, Any] = vars(self._below)["_parameters"]
        self._lent.append(({key: table[key] for key in self._weights}, module.merged_adapters))
        table.update(self._weights)
        module.merged_adapters = list(self._names)  # peft then calls the module below and no more

    def _after(self, module: LoraLinear, *_: object) -> None:
        lent = self._lent.pop()
        if lent is not None:
            table: dict[str, Any] = vars(self._below)["_parameters"]
            held, module.merged_adapters = lent
            table.update(held)


@torch.no_grad()
def _merged(module: LoraLinear, below: nn.Module) -> dict[str, Tensor]:
    """Return what peft's own merge makes of the weights below, which are left as they are."""
    held = {key: p.data for key, p in below.named_parameters(recurse=False)}
    places = dict(below.named_parameters(recurse=False))
    try:
        for key, p in places.items():
            p.data = held[key].clone()
        module.merge()
        return {key: p.data for key, p in places.items()}
    finally:
        for key, p in places.items():
            p.data = held[key]
        module.merged_adapters.clear()
