"""LoTA and RoSA as their papers tell them: train in place, sort in full, rewind by hand."""

import math
from collections.abc import Callable, Sequence

import torch
from slow_masks import slow_square
from torch import nn

from selectune.data import Tokens
from selectune.weights.base import base_weights

Train = Callable[[nn.Module], object]


def slow_lota(
    model: nn.Module, train: Train, density: float, names: Sequence[str]
) -> dict[str, list[int]]:
    """Fine-tune, take what moved most in all of these weights together, rewind."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    drift = [
        (-abs(float(after - start)), names.index(name), k)
        for name, p in model.named_parameters()
        if name in names
        for k, (after, start) in enumerate(
            zip(p.detach().flatten(), before[name].flatten(), strict=True)
        )
    ]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    found: dict[str, list[int]] = {}
    for _, place, k in sorted(drift)[: math.floor(density * len(drift))]:
        found.setdefault(names[place], []).append(k)
    return {name: sorted(places) for name, places in found.items()}


def slow_rosa(
    model: nn.Module, items: Sequence[Tokens], train: Train, density: float
) -> dict[str, list[int]]:
    """Train the LoRA alone, square the gradients of the matrices below it, start anew."""
    lora = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model)
    found: dict[str, list[int]] = {}
    for name, p in base_weights(model).items():
        full = next(n for n, q in model.named_parameters() if q is p)
        if full.endswith("base_layer.weight"):
            square = slow_square(model, items, p).flatten()
            order = sorted(range(len(square)), key=lambda k: (-square[k], k))
            found[name] = sorted(order[: math.floor(density * len(square))])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in lora:
                p.copy_(lora[name])
    return found


def slow_beside(
    model: nn.Module,
    chosen: dict[str, list[int]],
    loss: Callable[[nn.Module], torch.Tensor],
    n_steps: int,
    lr: tuple[float, float],
) -> None:
    """Train LoRA and S together from the base, S a dense matrix with zeros around the chosen."""
    weights = base_weights(model)
    base = {name: weights[name].detach().clone() for name in chosen}
    lora = [p for p in model.parameters() if p.requires_grad]
    S = {name: nn.Parameter(torch.zeros_like(t)) for name, t in base.items()}
    groups = [{"params": lora, "lr": lr[0]}, {"params": list(S.values()), "lr": lr[1]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-4)
    for _ in range(n_steps):
        optimizer.zero_grad()
        for name in chosen:
            weights[name].requires_grad_(True)
            weights[name].grad = None
        loss(model).backward()
        for name, places in chosen.items():
            mask = torch.zeros(base[name].numel())
            mask[places] = 1
            S[name].grad = weights[name].grad * mask.view(base[name].shape)
            weights[name].requires_grad_(False)
            weights[name].grad = None
        optimizer.step()
        with torch.no_grad():
            for name in chosen:
                weights[name].copy_(base[name] + S[name])
