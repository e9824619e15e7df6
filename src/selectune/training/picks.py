"""What a row picker reads, and how picks become the factors of a layer's gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Aggregate = Literal["mean", "share", "unbiased"]

# Spread below this share of the largest score is rounding: all examples are alike.
_FLAT = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Alignments:
    """What one layer knows of one batch of n examples.

    Attributes:
        score: <g_n, target gradient>, or its cosine; larger pulls the layer towards the target.
        noise: standard Gumbel draws, one per example, the same whatever the order of the batch.
        is_valid: examples with a target token; the others ask for nothing and are never picked.
        k: how many to pick, at most as many as are valid.
        temperature: of the softmax.
        norm2: |g_n|^2, for pickers that ask for it.
        gram: <g_n, g_m>, for pickers that ask for it.
        learning_rate: of the coming step.
    """

    score: Float[Tensor, " n"]
    noise: Float[Tensor, " n"]
    is_valid: Bool[Tensor, " n"]
    k: int
    temperature: float = 1.0
    norm2: Float[Tensor, " n"] | None = None
    gram: Float[Tensor, "n n"] | None = None
    learning_rate: float = 0.0

    def standardised(self) -> Float[Tensor, " n"]:
        """Return the scores less their mean, over their standard deviation; 0 if all are alike."""
        # In units of the largest, as the loss may come at any size.
        score = self.score.where(self.is_valid, 0.0)
        score = score / score.abs().max().clamp_min(torch.finfo(score.dtype).tiny)
        mean, spread = _moments(score, self.is_valid)
        centred = (score - mean).where(self.is_valid, 0.0)
        return torch.where(spread <= _FLAT, 0.0, centred / spread.clamp_min(_FLAT))

    def moments(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return mean and standard deviation of the scores."""
        return _moments(self.score.where(self.is_valid, 0.0), self.is_valid)

    def largest(self, key: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return 1 at the k valid examples with the largest keys, 0 elsewhere."""
        ranked = key.where(self.is_valid, -torch.inf).topk(self.k).indices
        return torch.zeros_like(self.score).index_fill_(0, ranked, 1.0)


def _moments(
    score: Float[Tensor, " n"], is_valid: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    n = is_valid.sum().clamp_min(1)  # a batch without any target token
    mean = score.sum() / n
    return mean, ((score - mean).where(is_valid, 0.0).square().sum() / n).sqrt()


def wanted(keep: float | int, n: int) -> int:
    """Return how many of n examples an option `keep` asks for, which may be none."""
    return round(keep * n) if isinstance(keep, float) else keep


Picker = Callable[[Alignments], Float[Tensor, " n"]]


def factors(
    picked: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
    aggregate: Aggregate,
    alignments: Alignments,
) -> Float[Tensor, " n"]:
    """Return by how much each example's own share of the loss gradient is multiplied.

    The rows of a batch already carry the weight that the loss gives their example, times an unknown
    constant; the sum of rows times these factors is the layer's gradient.

    Args:
        picked: 1 where picked, else 0.
        weight: of each example in the loss, up to one constant.
        aggregate: "mean" keeps the size of the plain gradient, "share" sums what is picked and
            leaves the rest out, "unbiased" divides each pick by its odds of being picked.
        alignments: what the picks were drawn from, for "unbiased".

    Source: "Stochastic Beams and Where to Find Them", arXiv 1903.06059, for "unbiased".
    """
    match aggregate:
        case "mean":
            # With everything picked the quotient is exactly 1.
            return picked * (weight.sum() / (picked * weight).sum().clamp_min(1e-30))
        case "share":
            return picked
        case "unbiased":
            if alignments.k >= int(alignments.is_valid.sum()):
                return picked
            logits = alignments.standardised() / alignments.temperature
            logits = logits.where(alignments.is_valid, -torch.inf)
            logits = logits - logits.logsumexp(0)
            keys = logits + alignments.noise
            threshold = keys.topk(alignments.k + 1).values[-1]
            odds = -torch.expm1(-torch.exp(logits - threshold))
            return torch.where(picked > 0, 1 / odds.clamp_min(1e-12), 0.0)
