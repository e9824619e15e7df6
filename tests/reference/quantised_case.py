"""Tiny models whose matrices are quantised, and the slow twin of training beside them."""

import copy
import tempfile

import torch
from slow_sparse import MakeOptimizer, chosen, matrices
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from selectune.weights.mask import WeightMask

BITSANDBYTES = {
    "bnb 4 bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "bnb 8 bit": {"load_in_8bit": True},
}
KINDS = ("buffers", *BITSANDBYTES)


class Int8Linear(nn.Module):
    """A linear map of no known class: int8 rows and their scales, in buffers of other names."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (plain.weight.detach() / scale).round().to(torch.int8))
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed * self.scale, self.bias)


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """Return a quantised copy of a model, its head and embedding as they were."""
    if kind == "buffers":
        model = copy.deepcopy(model)
        is_matrix = matrices(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and is_matrix(f"{name}.weight"):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, Int8Linear(module))
        return model
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(**BITSANDBYTES[kind]),
        )


class DenseBeside(nn.Module):
    """A module, and a whole matrix of changes beside it."""

    def __init__(self, module: nn.Module, shape: tuple[int, int], is_input_first: bool) -> None:
        super().__init__()
        self.module, self.is_input_first = module, is_input_first
        self.change = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.change.mT if self.is_input_first else self.change
        return self.module(x) + linear(x, matrix)


class SlowBeside:
    """Whole matrices train beside those of a model; after each step the mask is put back.

    Args:
        model: changed in place.
        mask: the entries.
        make: the optimizer.
        is_input_first: whether matrices are stored [in, out].
    """

    def __init__(
        self, model: nn.Module, mask: WeightMask, make: MakeOptimizer, *, is_input_first: bool
    ) -> None:
        model.requires_grad_(False)
        self.mask = mask
        self.changes: dict[str, nn.Parameter] = {}
        for name in mask.indices:
            path = name.removesuffix(".weight")
            parent, _, key = path.rpartition(".")
            beside = DenseBeside(model.get_submodule(path), mask.shapes[name], is_input_first)
            setattr(model.get_submodule(parent), key, beside)
            self.changes[name] = beside.change
        self.optimizer = make(list(self.changes.values()))

    def step(self) -> None:
        """Take a step by the gradients that are there."""
        for name, change in self.changes.items():
            change.grad *= chosen(self.mask, name, change.shape)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, change in self.changes.items():
                change *= chosen(self.mask, name, change.shape)
