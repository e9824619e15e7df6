"""Weight masks in plain loops: one example, one weight, one full sort at a time."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from selectune.data import Tokens

Lists = Mapping[str, Sequence[float]]  # tensor -> its entries, flat
Places = dict[str, list[int]]


def slow_drawn(tokens: Sequence[Tokens], n: int, seed: int) -> list[Tokens]:
    """Take those whose hashed ids come first."""
    place = {t.id: int(hashlib.sha256(f"{seed}:{t.id}".encode()).hexdigest(), 16) for t in tokens}
    return sorted(tokens, key=lambda t: place[t.id])[:n]


def slow_loss(model: nn.Module, item: Tokens) -> torch.Tensor:
    """Return the mean negative log-likelihood of one example's target tokens, without padding."""
    ids = torch.tensor(item.input_ids)[None]
    log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    nats = [
        -log_p[k - 1, int(item.input_ids[k])]
        for k in range(1, len(item.input_ids))
        if item.is_target[k]
    ]
    return torch.stack(nats).mean()


def slow_gradient(
    model: nn.Module, items: Sequence[Tokens], p: nn.Parameter, weighting: str = "example"
) -> np.ndarray:
    """Return the mean of the examples' gradients of one parameter, each taken by itself."""
    was, p.requires_grad = p.requires_grad, True
    total, weight = np.zeros(tuple(p.shape)), 0
    for item in items:
        share = 1 if weighting == "example" else int(item.is_target[1:].sum())
        (grad,) = torch.autograd.grad(slow_loss(model, item), p, allow_unused=True)
        weight += share
        if grad is not None:
            total = total + share * grad.double().numpy()
    p.requires_grad = was
    return total / weight


def slow_square(
    model: nn.Module, items: Sequence[Tokens], p: nn.Parameter, micro_batch: int = 1
) -> np.ndarray:
    """Return the mean over micro-batches of the squared gradient of their mean loss."""
    groups = [items[k : k + micro_batch] for k in range(0, len(items), micro_batch)]
    return sum(slow_gradient(model, group, p) ** 2 for group in groups) / len(groups)


def slow_score(method: str, w: float, evidence: float = 0.0, eps: float = 1e-8) -> float:
    """Return the score of one weight in float32, as the table of methods has it."""
    w, g = np.float32(w), np.float32(evidence)
    match method:
        case "gallop":
            return float(abs(g) / (abs(w) + np.float32(eps)))
        case "saft" | "sift" | "lota":
            return float(abs(g))
        case "snip":
            return float(abs(g * w))
        case "fisher":
            return float(g)
        case "low_magnitude":
            return float(-abs(w))
        case "high_magnitude":
            return float(abs(w))
    raise ValueError(method)


def slow_top(scores: Lists, k: int) -> Places:
    """Sort everything: high scores first, then earlier tensors, then earlier places."""
    order = sorted(
        (-x, number, place)
        for number, values in enumerate(scores.values())
        for place, x in enumerate(values)
    )
    names = list(scores)
    found: Places = {}
    for _, number, place in order[:k]:
        found.setdefault(names[number], []).append(place)
    return {name: sorted(places) for name, places in found.items()}


def slow_select(
    scores: Lists, share: Fraction, scope: str, layers: Mapping[str, object], more: int = 0
) -> Places:
    """Choose within the model, each layer or each tensor.

    Args:
        scores: of all weights.
        share: of them.
        scope: "global", "per_layer", "per_tensor".
        layers: what each tensor belongs to.
        more: weights per tensor beyond its share.
    """
    groups: dict[object, dict[str, Sequence[float]]] = {}
    for name, values in scores.items():
        key = {"global": "all", "per_layer": layers[name], "per_tensor": name}[scope]
        groups.setdefault(key, {})[name] = values
    found: Places = {}
    for group in groups.values():
        n = sum(len(values) for values in group.values())
        found.update(slow_top(group, min(n, math.floor(share * n) + more)))
    return found


def slow_bounded(
    scores: Lists, k: int, least: Mapping[str, int], most: Mapping[str, int]
) -> Places:
    """Fill every tensor's floor, then take the best that are left while no ceiling is hit."""
    ranked = {
        name: sorted(range(len(values)), key=lambda p, v=values: (-v[p], p))
        for name, values in scores.items()
    }
    found = {name: ranked[name][: least[name]] for name in scores}
    while sum(map(len, found.values())) < k:
        heads = [
            (-scores[name][ranked[name][len(found[name])]], number, name)
            for number, name in enumerate(scores)
            if len(found[name]) < most[name]
        ]
        name = min(heads)[2]
        found[name].append(ranked[name][len(found[name])])
    return {name: sorted(places) for name, places in found.items() if places}
