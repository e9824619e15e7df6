"""The papers' bottleneck adapters, as a tuner of peft's kind: up(act(down(x))).

series     y = module(x), then y + scale * up(act(down(y)))
parallel   module(x) + scale * up(act(down(x)))

Paper  Hu et al., "LLM-Adapters", EMNLP 2023, arXiv 2304.01933; its release: tanh, width 256, no
       dropout, no biases, scale 1. Ours: `up` starts at zero (the release: normal, 0.02), so that
       the first forward pass is the base model's.
Why    peft has no such type, and `adapters` 1.3.0 asks for transformers ~=4.57.6.
Files  As peft's, with the type SELECTUNE_BOTTLENECK: `PeftModel.from_pretrained` reads them once
       this module is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PEFT_TYPE = "SELECTUNE_BOTTLENECK"
PLACES = ("series", "parallel")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


# peft's base class is a dataclass that writes to itself: neither frozen nor slotted can follow it.
@dataclass
class BottleneckConfig(PeftConfig):
    """Where bottleneck adapters sit and how they are shaped.

    Args:
        target_modules: names of linear modules, or "all-linear".
        place: "series", after the module, or "parallel", beside it.
        width: of the bottleneck.
        activation: tanh, relu, gelu or silu.
        dropout: at the adapter's input.
        scaling: what the adapter's output is multiplied by.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    place: str = "series"
    width: int = 256
    activation: str = "tanh"
    dropout: float = 0.0
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.place not in PLACES or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"no bottleneck adapter in place {self.place!r} with {self.activation!r}: places "
                f"are {', '.join(PLACES)}, activations {', '.join(ACTIVATIONS)}"
            )


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear module with bottleneck adapters after or beside it, by the adapter's name.

    `down` and `up` are plain Linears, so gradients per example need no kernel of their own.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_act", "scaling", "place")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        """Wrap a module and add the first adapter."""
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_act = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.place: dict[str, str] = {}
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True  # peft's helper of that name switches it
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add one more adapter."""
        base = self.get_base_layer()
        if isinstance(base, Conv1D):  # its weight is stored the other way round
            n_in, n_out = base.weight.shape
        elif isinstance(base, nn.Linear):
            n_in, n_out = base.in_features, base.out_features
        else:
            raise TypeError(f"bottleneck adapters sit at linear modules, not {type(base).__name__}")
        source = n_out if config.place == "series" else n_in
        up = nn.Linear(config.width, n_out, bias=False)
        nn.init.zeros_(up.weight)
        self.bottleneck_down[adapter_name] = nn.Linear(source, config.width, bias=False)
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = (
            nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        )
        self.bottleneck_act[adapter_name] = ACTIVATIONS[config.activation]()
        self.scaling[adapter_name] = config.scaling
        self.place[adapter_name] = config.place
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return the module's output with what the active adapters add."""
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        out = y
        for name in cast("Sequence[str]", self.active_adapters):
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                source = self.bottleneck_dropout[name](y if self.place[name] == "series" else x)
                source = self._cast_input_dtype(source, cast("torch.dtype", down.weight.dtype))
                added = up(self.bottleneck_act[name](down(source))) * self.scaling[name]
                out = out + added.to(y.dtype)
        return out


class BottleneckModel(BaseTuner):
    """Puts `BottleneckLayer`s into a model; peft calls it."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast("BottleneckConfig", peft_config)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        layer = BottleneckLayer(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# peft's own `register_peft_method` takes the names of an enumeration only, which cannot be added
# to. These three tables are what it fills and all that peft 0.21 reads; a text serves as a key.
cast("Any", PEFT_TYPE_TO_CONFIG_MAPPING)[PEFT_TYPE] = BottleneckConfig
cast("Any", PEFT_TYPE_TO_TUNER_MAPPING)[PEFT_TYPE] = BottleneckModel
cast("Any", PEFT_TYPE_TO_PREFIX_MAPPING)[PEFT_TYPE] = BottleneckModel.prefix
