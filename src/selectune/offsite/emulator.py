"""An emulator in memory: a model of the original's class, with fewer numbers in its middle.

Adapter layers, embeddings, final norm and head hold the original's bits. It is put together in two
steps, the same whether it comes from the original or from a package: an empty model whose modules
have the right shapes, then each tensor once, in its place.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from selectune.errors import ConfigError, IncompatibleRunError, SelectionError
from selectune.models import blocks
from selectune.offsite.arrangement import Arrangement
from selectune.offsite.layout import Layout
from selectune.offsite.modules import put_pieces
from selectune.offsite.pieces import CompressedLayer, MiddleLayer


def build_emulator(
    model: nn.Module, layout: Layout, middle: Mapping[int, MiddleLayer]
) -> nn.Module:
    """Return an emulator of a model; the model is left as it is, and shares no memory with it.

    Args:
        model: the original, a causal LM of transformers.
        layout: which of its layers train.
        middle: what became of each of the others.

    Returns:
        A model of the same class, on the same device, in evaluation mode. Layers that share
        weights hold the same parameters; `Arrangement.of` tells which layer is which.

    Raises:
        SelectionError: layout, middle and model do not belong together.
        ConfigError: its class is none that transformers makes from a configuration, or what a
            layer computes depends on its number and its number would change.
    """
    plan = Arrangement.of(layout, middle)
    old = blocks(model)
    if len(old) != layout.n_layers:
        raise SelectionError(
            f"the layout is for {layout.n_layers} layers, the model has {len(old)}",
            where=type(model).__name__,
        )
    emulator = empty_model(_config(model, plan), attention=_attention(model))
    if type(emulator) is not type(model):
        raise ConfigError(
            f"an emulator of a {type(model).__name__} cannot be made",
            why=f"its configuration stands for a {type(emulator).__name__}",
            do="give the bare causal LM, without an adapter around it",
        )
    new = blocks(emulator)
    for block, source in zip(new, plan.sources, strict=True):
        layer = middle.get(source)
        if isinstance(layer, CompressedLayer):
            put_pieces(block, layer.pieces)
    share(emulator, plan.shared)
    fill(emulator, _originals(model, emulator, plan))
    emulator_any, model_any = cast("Any", emulator), cast("Any", model)
    emulator_any.generation_config = copy.deepcopy(model_any.generation_config)
    return emulator.to(next(model.parameters()).device).eval()


def empty_model(config: PretrainedConfig, *, attention: str) -> nn.Module:
    """Return the model of a configuration with parameters on "meta", tied ones tied.

    Args:
        config: of a causal LM that comes with transformers.
        attention: its implementation, such as "sdpa".
    """
    # Buffers, as those of rotary positions, are computed here and are in no file.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()  # moving a parameter to "meta" has replaced it
    return model


def share(model: nn.Module, shared: Mapping[int, int]) -> None:
    """Let layers run the weights of others.

    Args:
        model: an emulator.
        shared: index of a layer -> of the layer whose parameters it shall hold; both of the same
            modules.
    """
    every = blocks(model)
    prefix = block_prefix(model)
    tied: dict[str, str] = {}
    for index, source in shared.items():
        for name, module in every[source].named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                setattr(every[index].get_submodule(name), leaf, parameter)
                inside = f"{name}.{leaf}" if name else leaf
                tied[f"{prefix}.{index}.{inside}"] = f"{prefix}.{source}.{inside}"
    # `save_pretrained` of transformers 5.24 refuses shared tensors that are not named here.
    known: dict[str, str] = cast("Any", model)._tied_weights_keys or {}
    cast("Any", model)._tied_weights_keys = {**known, **tied}


def block_prefix(model: nn.Module) -> str:
    """Return the name of the list of decoder blocks, such as "model.layers"."""
    first = blocks(model)[0]
    name = next(name for name, module in model.named_modules() if module is first)
    return name.rpartition(".")[0]


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name; what is tied or shared under one name only.

    That is the name under which `save_pretrained` writes it: of the embeddings, and of the layer
    whose weights others run.
    """
    held = model.state_dict(keep_vars=True)
    tied: dict[str, str] = cast("Any", model)._tied_weights_keys or {}
    homes: dict[int, str] = {}
    for name in sorted(held, key=lambda name: name in tied):
        homes.setdefault(id(held[name]), name)
    return {name: tensor for name, tensor in held.items() if homes[id(tensor)] == name}


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model its tensors; they are taken over, not copied.

    Args:
        model: whose parameters may be on "meta".
        tensors: by the names of `own_tensors`, all of them.
    """
    own = own_tensors(model)
    made: dict[int, Tensor] = {}
    for name, old in own.items():
        is_parameter = isinstance(old, nn.Parameter)
        made[id(old)] = nn.Parameter(tensors[name]) if is_parameter else tensors[name]
    for name, old in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, made[id(old)])


def _originals(model: nn.Module, emulator: nn.Module, plan: Arrangement) -> dict[str, Tensor]:
    """Return copies of what the emulator has from the original, and what it has already."""
    prefix = block_prefix(model)
    own = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, tensor in own_tensors(emulator).items():
        if isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            tensors[name] = tensor.detach()  # of a piece
            continue
        source = original_name(name, prefix, plan.sources)
        found = own.get(source)
        if found is None or found.shape != tensor.shape:
            shape = "none" if found is None else f"one of shape {tuple(found.shape)}"
            raise SelectionError(
                f"the emulator's {name} cannot be taken from the original",
                where=source,
                why=f"its shape is {tuple(tensor.shape)}, the original has {shape}",
            )
        tensors[name] = found.detach().clone()
    return tensors


def original_name(name: str, prefix: str, positions: tuple[int, ...]) -> str:
    """Return the original's name of an emulator's tensor: only the layers are counted anew.

    Args:
        name: in the emulator.
        prefix: of the decoder blocks.
        positions: for each layer of the emulator, the one of the original that is meant.

    Raises:
        IncompatibleRunError: the emulator has no such layer.
    """
    if not name.startswith(f"{prefix}."):
        return name
    index, dot, rest = name.removeprefix(f"{prefix}.").partition(".")
    if not index.isdecimal() or int(index) >= len(positions):
        raise IncompatibleRunError(
            f"{name} is in no layer of the emulator", why=f"it has {len(positions)} layers"
        )
    return f"{prefix}.{positions[int(index)]}{dot}{rest}"


def _attention(model: nn.Module) -> str:
    return cast("Any", model).config._attn_implementation


def _config(model: nn.Module, plan: Arrangement) -> PretrainedConfig:
    """Return the original's configuration for the emulator's number of layers."""
    old: Any = cast("Any", model).config
    config = copy.deepcopy(old)
    n_old, n_new = old.num_hidden_layers, len(plan.positions)
    is_renumbered = plan.positions != tuple(range(n_old))
    if is_renumbered and getattr(old, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(
            "layers cannot be left out of this model",
            where="scale_attn_by_inverse_layer_idx of its configuration",
            why="what a layer computes depends on its number",
            do="choose a compressor that keeps every layer",
        )
    config.num_hidden_layers = n_new
    # One entry for each layer: of its attention, its positions and so on.
    for key, value in old.to_dict().items():
        if isinstance(value, list) and "layer" in key and len(cast("Any", value)) == n_old:
            setattr(config, key, plan.entries_of(cast("Any", value)))
    return config
