"""What passes over examples cost in seconds, from one measured product and counted multiplications.

LIMITATIONS.md states how far such numbers were off when measured.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from selectune.data import Example
from selectune.models import blocks, choose_device, choose_precision, load_config
from selectune.pipeline import foresee
from selectune.pipeline.economy import economy_of, n_top
from selectune.pipeline.equip import adapter_of, scorer_of
from selectune.pipeline.foresee import Outline
from selectune.pipeline.ground import Ground
from selectune.recipe import TuneSection

_EFFICIENCY = 0.45  # of the measured matrix product, that a whole training step reaches


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds by token.

    Attributes:
        rate: multiplications and additions per second.
        forward: seconds of one token through the model, without gradients.
    """

    rate: float
    forward: float

    @classmethod
    def measured(cls, ground: Ground, n_base: int, asked: str | None = None) -> "Prices":
        """Measure one product of the model's width.

        Args:
            ground: of the run.
            n_base: weights of the base.
            asked: precision, as a recipe asks for it; None for the model's.
        """
        device = choose_device(ground.recipe.model.device)
        precision = choose_precision(asked or ground.recipe.model.dtype, device)
        hidden = int(load_config(ground.assets.model).hidden_size)
        rate = _products_per_second(device, precision, hidden)
        return cls(rate, 2 * n_base / rate)

    def gradient(self, *, trains_weights: bool) -> float:
        """Return the seconds of one token forward and back.

        Args:
            trains_weights: the weights themselves have gradients, not only what stands beside them.
        """
        return self.forward / forward_share(trains_weights=trains_weights)


def forward_share(*, trains_weights: bool) -> float:
    """Return which part of a step's work its forward pass is.

    Args:
        trains_weights: the weights themselves have gradients, not only what stands beside them.
    """
    # 2 per weight and token forward, as many for the gradient of the activations, and again as
    # many for that of the weights.
    return 1 / (3 if trains_weights else 2)


def trains_weights(ground: Ground, tuning: TuneSection, outlined: Outline) -> bool:
    """Return whether the base's own weights train.

    Args:
        ground: of the run.
        tuning: how it is trained.
        outlined: what is trained.
    """
    adapter = adapter_of(ground, tuning)
    return bool(outlined.n_weights) or (adapter is not None and adapter.kind == "full")


def training_seconds(
    ground: Ground, tuning: TuneSection, outlined: Outline, prices: Prices, n_tokens: float
) -> float:
    """Return what training on examples costs.

    Args:
        ground: of the run.
        tuning: how.
        outlined: what is trained.
        prices: of the machine.
        n_tokens: of the examples, together.
    """
    price = prices.gradient(trains_weights=trains_weights(ground, tuning, outlined))
    return n_tokens * tuning.epochs * price * (1 + foresee.extra_work(tuning))


def pass_price(ground: Ground, outlined: Outline, prices: Prices) -> float:
    """Return the seconds of a gradient pass by token of the pool, less what the recipe leaves out.

    Args:
        ground: of the run.
        outlined: the model that gradients are taken of.
        prices: of the machine, in the model's precision.
    """
    recipe, lengths = ground.recipe, ground.tokens.pool.lengths
    economy, n_layers = economy_of(recipe.score, lengths), len(blocks(outlined.model))
    share = 1.0 if economy.layers is None else n_top(economy.layers, n_layers) / n_layers
    read = np.minimum(lengths, economy.max_length or np.inf).mean() / lengths.mean()
    if economy.precision is not None:
        prices = Prices.measured(ground, outlined.n_base, economy.precision)
    gradient = prices.gradient(trains_weights=recipe.adapter.kind == "full")
    return float(read) * (prices.forward + share * (gradient - prices.forward))


def choosing_seconds(
    ground: Ground,
    tuning: TuneSection,
    outlined: Outline,
    prices: Prices,
    n_examples: int,
    mean_tokens: float,
) -> float:
    """Return what the choice of single weights costs; nothing where none are chosen.

    Args:
        ground: of the run.
        tuning: how it is trained.
        outlined: what is trained.
        prices: of the machine.
        n_examples: that are trained on.
        mean_tokens: of one of them.
    """
    if tuning.weights is None:
        return 0.0
    scorer = scorer_of(tuning.weights, seed=0)
    if not scorer.entry.needs:
        return 0.0
    price = prices.gradient(trains_weights=trains_weights(ground, tuning, outlined))
    return min(n_examples, scorer.examples) * mean_tokens * price


def n_answers(examples: list[Example] | tuple[Example, ...], limit: int | None) -> int:
    """Return how many answers evaluation reads: one per option, one without options."""
    return sum(max(1, len(e.options)) for e in list(examples)[:limit])


def _products_per_second(device: torch.device, precision: str, hidden: int) -> float:
    """Measure multiplications and additions per second of a matrix product of the model's width."""
    dtype = getattr(torch, precision)
    a = torch.randn(1024, hidden, device=device, dtype=dtype)
    b = torch.randn(hidden, 4 * hidden, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        c = a @ b
        float(c[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return _EFFICIENCY * 2 * a.numel() * b.shape[1] / best
