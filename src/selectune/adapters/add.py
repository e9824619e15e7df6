"""Make trainable what a recipe asks for."""

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from selectune.adapters.bottleneck import BottleneckConfig
from selectune.adapters.prefix import put_in_blocks
from selectune.errors import ConfigError, SelectionError, nearest
from selectune.models import blocks
from selectune.recipe import AdapterSection

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]  # where a recipe names none
Linears = dict[str, bool]  # name of a module: whether its weight is stored the other way round


def add_adapter(model: nn.Module, section: AdapterSection, *, seed: int) -> nn.Module:
    """Make trainable what the recipe asks for, and nothing else.

    Args:
        model: the untouched base; `full` trains it in place.
        section: kind, shape, modules and layers.
        seed: of the adapter's first values.

    Returns:
        A peft model whose adapter is fp32, or the base itself for kind full.

    Raises:
        SelectionError: a module name or a layer index does not exist.
        ConfigError: the weights cannot be trained as asked.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    if section.kind == "full":
        _refuse_quantised(model)
        _unfreeze_layers(model, section.layers)
        return model
    config = _MAKERS[section.kind](model, section)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with quiet():
            adapted = get_peft_model(cast("Any", model), config)
    if section.kind == "prefix":
        put_in_blocks(cast("Any", adapted))
    return cast("nn.Module", adapted)


def _lora(model: nn.Module, section: AdapterSection) -> PeftConfig:
    linear = _linears(model)
    targets = _checked(section.modules or LORA_MODULES, linear)
    if section.layers is not None:
        targets = _within(model, targets, section.layers)
    return LoraConfig(
        r=section.rank,
        lora_alpha=cast("int", section.alpha),  # peft divides it by r; any number serves
        lora_dropout=section.dropout,
        target_modules=targets,
        use_dora=section.kind == "dora",
        fan_in_fan_out=any(
            linear[name.rpartition(".")[-1]] for name in (linear if targets == _ALL else targets)
        ),
        task_type="CAUSAL_LM",
    )


def _bottleneck(model: nn.Module, section: AdapterSection) -> PeftConfig:
    n = 1 if section.kind == "series" else 2
    targets = _checked(section.modules, _linears(model)) if section.modules else _last(model, n)
    return BottleneckConfig(
        target_modules=targets,
        place=section.kind,
        width=section.width,
        activation=section.activation,
        dropout=section.dropout,
        task_type="CAUSAL_LM",
    )


def _prefix(model: nn.Module, section: AdapterSection) -> PeftConfig:
    return PrefixTuningConfig(num_virtual_tokens=section.virtual_tokens, task_type="CAUSAL_LM")


_ALL = "all-linear"
_MAKERS: dict[str, Callable[[nn.Module, AdapterSection], PeftConfig]] = {
    "lora": _lora,
    "dora": _lora,
    "series": _bottleneck,
    "parallel": _bottleneck,
    "prefix": _prefix,
}


def _linears(model: nn.Module) -> Linears:
    return {
        name.rsplit(".", 1)[-1]: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _checked(modules: list[str] | str, linear: Linears) -> list[str] | str:
    if isinstance(modules, str):
        return modules
    for name in modules:
        if name not in linear:
            raise SelectionError(
                f'no module of the model is called "{name}"',
                where="adapter.modules",
                why=f"its linear modules are called {', '.join(sorted(linear))}",
                do=nearest(name, linear) + ' "all-linear" takes every one but the head',
            )
    return list(modules)


def _within(model: nn.Module, modules: list[str] | str, layers: Sequence[int]) -> list[str]:
    """Return the full names of these modules in some blocks.

    Not peft's `layers_to_transform`: it takes the last number of a name for the layer, and a fused
    module of an emulator has numbered parts.
    """
    every = blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for index in _indices(len(every), layers):
        inside = [names[id(m)] for m in every[index].modules() if isinstance(m, nn.Linear | Conv1D)]
        found += [n for n in inside if modules == _ALL or n.rpartition(".")[-1] in modules]
    if not found:
        raise SelectionError(
            "the layers that are named have none of the modules that are named",
            where="adapter.layers",
            why=f"modules are {modules}, layers {list(layers)}",
            do="modules: all-linear takes every linear module of these layers",
        )
    return found


def _last(model: nn.Module, n: int) -> list[str]:
    """Return the names of the last linear modules of a block, which end its MLP.

    In LLaMA these are down_proj, and up_proj with down_proj: where LLM-Adapters puts series (0.99 %
    of the parameters in its tables) and parallel adapters (3.54 %).
    """
    names = [
        name
        for name, module in blocks(model)[0].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if len(names) < n:
        raise SelectionError(
            f"a block of the model has {len(names)} linear modules",
            where="adapter.modules",
            why=f"without names, the last {n} of each block get an adapter",
            do="name the modules in adapter.modules",
        )
    return names[-n:]


def _refuse_quantised(model: nn.Module) -> None:
    config = cast("Any", model).config.to_dict()
    if config.get("quantization_config") is not None:
        raise ConfigError(
            "the weights of the model are quantised, and kind full would train them",
            where="adapter.kind",
            why="steps of an optimizer are smaller than the steps between quantised values",
            do="use kind lora, dora, series or parallel, or load the model in fp32 or bf16",
        )


def _unfreeze_layers(model: nn.Module, layers: Sequence[int] | None) -> None:
    found = blocks(model)
    for index in range(len(found)) if layers is None else _indices(len(found), layers):
        for p in found[index].parameters():
            p.requires_grad_(True)


def _indices(n: int, layers: Sequence[int]) -> list[int]:
    """Return the layers that are named, counted from the start."""
    for index in layers:
        if not -n <= index < n:
            raise SelectionError(
                f"there is no layer {index}",
                where="adapter.layers",
                why=f"the {n} layers are called 0 to {n - 1}",
                do="negative numbers count from the end: -1 is the last layer",
            )
    return [index % n for index in layers]


@contextmanager
def quiet() -> Generator[None]:
    """Silence what peft 0.21 says about itself, not about the user's model."""
    with warnings.catch_warnings():
        # It asks transformers 5.24 for a renamed property; gone with a newer peft.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # It says so of every Conv1D beside a Linear when "all-linear" meets both.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        yield
