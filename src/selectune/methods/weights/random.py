"""Random: weights drawn evenly, the control that every mask must beat.

    S = uniform in [0, 1), drawn by seed and tensor name

Paper  SHiRA-Rand of "Sparse High Rank Adapters", arXiv 2406.13175. Ours: a seed per tensor name,
  so that the order of tensors does not change the draw, and `random_matched`, which gives every
  tensor as many weights as another mask does.
Cost   Nothing: no data is read.
Fails  Less often than one would like: report it beside every other mask.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from selectune.registry import weight_scorer
from selectune.seeds import seeded
from selectune.weights.mask import WeightMask
from selectune.weights.options import Scope, TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("random")
@dataclass(frozen=True, slots=True, kw_only=True)
class Random(WeightScorer):
    """Even draw."""

    default_scope: ClassVar[Scope] = "per_tensor"

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Draw a number for each entry."""
        return torch.rand(weight.shape, generator=seeded(self.seed, "random", evidence.name))


def random_matched(mask: WeightMask, seed: int = 0) -> WeightMask:
    """Return a mask with as many weights in every tensor as another one, at random places.

    What it trains worse than the other is what the other's scores are worth inside tensors.

    Args:
        mask: to be matched.
        seed: of the draw.
    """
    found: dict[str, Tensor] = {}
    for name, index in mask:
        draw = torch.rand(prod(mask.shapes[name]), generator=seeded(seed, "matched", name))
        found[name] = draw.topk(index.numel(), sorted=False).indices.sort().values
    about = {
        "method": "random_matched",
        "seed": seed,
        "matched": mask.about.get("method", ""),
        "budget": mask.about.get("budget", {}),
    }
    return WeightMask(found, mask.shapes, mask.base, about)
