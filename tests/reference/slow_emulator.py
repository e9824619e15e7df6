"""A small model cut into adapter and middle, its emulators, and the slow, obvious form of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deep import deep_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of
from selectune.offsite.emulator import build_emulator
from selectune.offsite.factors import build_layer
from selectune.offsite.layout import Layout
from selectune.offsite.manifests import PublicManifest, Terms
from selectune.offsite.package import save_package
from selectune.offsite.pieces import Absent, CompressedLayer, MiddleLayer, SameAs
from selectune.offsite.record import LayerPlan
from workspace import byte_tokenizer

FAMILIES = ("llama", "qwen2", "opt", "gpt2")
N_LAYERS = 5
# Names and numbers that belong to the owner alone; no other file holds any of them.
ABOUT = {
    "method": "owners-own-method",
    "options": {"weighing_of_losses": 0.7071},
    "kept": [1000003, 1000033],
    "calibration": "f1nger-of-text",
}


def case(family: str = "llama") -> tuple[nn.Module, Layout]:
    """Return a model of five layers, of which the first and the last train."""
    return deep_model(N_LAYERS, family), Layout.of(N_LAYERS, [0, -1])


def plans(model: nn.Module, layout: Layout, share: float) -> dict[int, LayerPlan]:
    """Return what is kept of each middle layer: every so many-th component and channel."""
    found: dict[int, LayerPlan] = {}
    for j in layout.middle:
        block = blocks(model)[j]
        anatomy = anatomy_of(block)
        components: dict[str, tuple[int, ...]] = {}
        for matrix in anatomy.matrices:
            rank = min(_weight(block.get_submodule(matrix.name))[matrix.rows].shape)
            components[matrix.key] = _some(rank, share)
        width = _weight(block.get_submodule(anatomy.mlp.up)).shape[0]
        found[j] = LayerPlan(components, _some(width, share))
    return found


def compressed(model: nn.Module, layout: Layout, share: float = 0.5) -> dict[int, MiddleLayer]:
    """Return a middle of low-rank pairs and narrowed MLPs."""
    return {j: build_layer(blocks(model)[j], j, p) for j, p in plans(model, layout, share).items()}


MIDDLES: dict[str, Any] = {
    "untouched": lambda model, layout: {j: CompressedLayer(j, {}) for j in layout.middle},
    "compressed": compressed,
    "dropped": lambda model, layout: {1: Absent(), 2: CompressedLayer(2, {}), 3: Absent()},
    "shared": lambda model, layout: {1: SameAs(2), 2: CompressedLayer(2, {}), 3: SameAs(2)},
    "everything": lambda model, layout: {
        1: SameAs(3),
        2: Absent(),
        3: compressed(model, layout)[3],
    },
}


@torch.no_grad()
def masked_twin(model: nn.Module, found: Mapping[int, LayerPlan]) -> nn.Module:
    """Return the model, full-size, with all that an emulator leaves out set to zero."""
    twin = copy.deepcopy(model)
    for j, plan in found.items():
        block = blocks(twin)[j]
        anatomy = anatomy_of(block)
        for matrix in anatomy.matrices:
            weight = _weight(block.get_submodule(matrix.name))
            part = weight[matrix.rows]
            U, sigma, Vh = torch.linalg.svd(part.double(), full_matrices=False)
            total = torch.zeros_like(part, dtype=torch.float64)
            for i in plan.components[matrix.key]:
                total += sigma[i] * torch.outer(U[:, i], Vh[i])
            part.copy_(total)
        gone = sorted(set(range(_weight(block.get_submodule(anatomy.mlp.up)).shape[0]))
                      - set(plan.channels or ()))  # fmt: skip
        for name in anatomy.mlp.names:
            module = block.get_submodule(name)
            if name == anatomy.mlp.down:
                _weight(module)[:, gone] = 0
            else:
                _weight(module)[gone] = 0
                if getattr(module, "bias", None) is not None:
                    module.bias[gone] = 0
    return twin


@dataclass(frozen=True)
class Handed:
    """A package in a folder, and all that it was made of."""

    model: nn.Module
    layout: Layout
    package: Path
    owner: Path
    manifest: PublicManifest


def hand_out(
    folder: Path, family: str = "llama", middle: str = "compressed", terms: Terms | None = None,
    dtype: torch.dtype = torch.float32,
) -> Handed:  # fmt: skip
    """Write the original, the package and the owner's part below a folder."""
    model, layout = case(family)
    model = model.to(dtype)
    tokenizer = byte_tokenizer()
    model.save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    model.config._name_or_path = tokenizer.name_or_path = "secret-company/great-model"
    made = MIDDLES[middle](model, layout)
    manifest = save_package(
        build_emulator(model, layout, made),
        model,
        tokenizer,
        layout=layout,
        middle=made,
        package=folder / "package",
        owner=folder / "owner",
        about=ABOUT,
        terms=terms,
    )
    return Handed(model, layout, folder / "package", folder / "owner", manifest)


def ids(seed: int = 0) -> Tensor:
    """Return two rows of tokens."""
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(seed))


def _some(n: int, share: float) -> tuple[int, ...]:
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(n))[: max(1, int(share * n))]
    return tuple(sorted(kept.tolist()))


def _weight(module: nn.Module) -> Tensor:
    """Return the live weight in Linear's order."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight
