"""Tiny models of as many layers as a test wants, with every kind of adapter."""

import torch
from peft import IA3Config, get_peft_model
from tiny import MODULES, tiny_model
from torch import nn

from selectune.adapters import add_adapter
from selectune.adapters.add import quiet
from selectune.recipe import AdapterSection

SCALED = ("lora", "dora", "series", "parallel", "prefix")
ADAPTERS = (*SCALED, "ia3")


def deep_model(n_layers: int, family: str = "llama", seed: int = 0) -> nn.Module:
    """Return a model with random weights, in fp32, dropout off but where a test turns it on."""
    tiny = tiny_model(family)
    facts = {**tiny.config.to_dict(), "num_hidden_layers": n_layers, "layer_types": None}
    for key in ("n_layer", "loss_type"):
        facts.pop(key, None)
    torch.manual_seed(seed)
    model = type(tiny)(type(tiny.config)(**facts))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.config.use_cache = False
    return model.eval()


def deep_trainable(
    kind: str, n_layers: int, family: str = "llama", *, dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Return a model whose adapters, or all of its blocks for kind "full", train."""
    model = deep_model(n_layers, family, seed)
    names = MODULES.get(family, ["q_proj", "o_proj", "down_proj"])
    if kind == "ia3":
        config = IA3Config(
            target_modules=names,
            feedforward_modules=names[-1:],
            fan_in_fan_out=family == "gpt2",
            task_type="CAUSAL_LM",
        )
        with quiet():
            adapted = get_peft_model(model, config)
    else:
        section = AdapterSection.model_construct(
            kind=kind,
            rank=3,
            width=5,
            virtual_tokens=2,
            modules=names if kind in ("lora", "dora") else None,
            dropout=dropout,
        )
        adapted = add_adapter(model, section, seed=seed)
    if kind != "full":
        torch.manual_seed(seed + 1)
        with torch.no_grad():  # fresh adapters answer nothing
            for name, p in adapted.named_parameters():
                if p.requires_grad and "magnitude" not in name:
                    p.add_(0.3 * torch.randn_like(p))
    return adapted.eval()
