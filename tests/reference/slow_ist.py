"""IST in plain loops, close to the release: one layer, one set, one example, one draw at a time."""

import copy
import itertools
import math
import random
from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from selectune.adapters import BlockPrefix, BottleneckLayer
from selectune.data import Tokens
from selectune.models import blocks


def slow_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def slow_draw(weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """Draw one after the other, each time among those that are left."""
    left = list(range(len(weights)))
    drawn = []
    for _ in range(count):
        at = rng.random() * sum(weights[k] for k in left)
        for k in left:
            at -= weights[k]
            if at < 0:
                break
        drawn.append(k)
        left.remove(k)
    return sorted(drawn)


def slow_odds_of_sets(weights: Sequence[float], count: int) -> dict[tuple[int, ...], float]:
    """Return how likely each set is: the sum over all orders in which it can be drawn."""
    odds: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, sum(weights)
        for k in order:
            probability *= weights[k] / left
            left -= weights[k]
        key = tuple(sorted(order))
        odds[key] = odds.get(key, 0.0) + probability
    return odds


def slow_odds_of_rounds(
    weights: Sequence[float], size: int, n_sets: int
) -> dict[tuple[tuple[int, ...], ...], float]:
    """Return how likely each sequence of different sets is, when repeats are drawn anew."""
    odds = slow_odds_of_sets(weights, size)
    rounds = {}
    for sets in itertools.permutations(odds, n_sets):
        probability, left = 1.0, 1.0
        for one in sets:
            probability *= odds[one] / left
            left -= odds[one]
        rounds[sets] = probability
    return rounds


def slow_update(
    u: list[float], sets: list[list[int]], losses: list[float], lr: float, reward: str = "exp"
) -> list[float]:
    rewards = [math.exp(-loss) if reward == "exp" else -loss for loss in losses]
    mean = sum(rewards) / len(rewards)
    a = [r - mean for r in rewards]
    if reward == "standardised":
        spread = math.sqrt(sum(x * x for x in a) / len(a))
        a = [x / spread for x in a]
    p = [slow_sigmoid(x) for x in u]  # once, before any layer moves
    u = list(u)
    for k, layers in enumerate(sets):
        for layer in layers:
            u[layer] += lr * a[k] * p[layer] * (1 - p[layer])
    return u


def slow_gumbel_draw(u: list[float], count: int, noise: Sequence[float]) -> list[int]:
    """Return the layers with the largest log sigmoid(-u) + noise."""
    keys = [-math.log1p(math.exp(x)) + g for x, g in zip(u, noise, strict=True)]
    return sorted(sorted(range(len(u)), key=lambda k: -keys[k])[:count])


def slow_suppressed_loss(
    model: nn.Module, items: Sequence[Tokens], layers: Sequence[int], factor: float
) -> float:
    """Return the mean loss per target token of a copy with some layers' adapters turned down."""
    model = copy.deepcopy(model).eval()
    for index in layers:
        for module in blocks(model)[index].modules():
            if isinstance(module, LoraLayer | BottleneckLayer | BlockPrefix):
                for name in module.scaling:
                    module.scaling[name] = factor * module.scaling[name]
            elif "ia3_l" in dict(module.named_children()):
                # y = base * l, or base(x * l): turned down it is base + factor * (y - base), and
                # both are linear in l.
                for p in module.ia3_l.values():
                    p.data = 1 + factor * (p.data - 1)
    total, count = 0.0, 0
    for item in items:
        ids = torch.as_tensor(item.input_ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        for at in range(1, len(item.input_ids)):
            if item.is_target[at]:
                total -= float(logits[at - 1].log_softmax(0)[ids[0, at]])
                count += 1
    return total / count
