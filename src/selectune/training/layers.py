"""The layers of a model that train: decoder blocks, found without a list of model classes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from selectune.errors import SelectionError
from selectune.models import blocks


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder block with trainable parameters.

    Attributes:
        index: its place among all decoder blocks, from 0.
        name: of the block in the model.
        block: the module.
        parameters: what trains in it, by full name.
    """

    index: int
    name: str
    block: nn.Module
    parameters: Mapping[str, nn.Parameter]


def trainable_layers(model: nn.Module) -> list[Layer]:
    """Return the decoder blocks that hold trainable parameters, first to last.

    Raises:
        SelectionError: there is none, or two of them share a parameter.
    """
    found = blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    layers: list[Layer] = []
    owner: dict[int, str] = {}
    for index, block in enumerate(found):
        name = names[id(block)]
        parameters = {f"{name}.{k}": p for k, p in block.named_parameters() if p.requires_grad}
        for key, p in parameters.items():
            if id(p) in owner:
                raise SelectionError(
                    f"{key} and {owner[id(p)]} are one parameter",
                    where=name,
                    why="a layer is trained or not by itself, and these two share weights",
                    do="freeze the shared parameter, or train without a method per layer",
                )
            owner[id(p)] = key
        if parameters:
            layers.append(Layer(index, name, block, parameters))
    if not layers:
        raise SelectionError(
            "no layer of the model has a trainable parameter",
            where=f"{type(model).__name__}, {len(found)} layers",
            why="a method that chooses layers, or examples per layer, needs something to train",
            do="add a peft adapter (LoRA, DoRA, bottleneck), or unfreeze layers",
        )
    return layers
