"""SIFT: the weights that the first micro-batch pulls at most.

    S = |g1|      g1 = gradient of the first micro-batch, which makes no update

Paper  "Sparse is Enough in Fine-tuning Pre-trained Large Language Models", arXiv 2312.11875:
  per tensor, floor(rate * numel) + 1 of them. Ours: the micro-batch is drawn by seed and id, and
  its loss is a mean over examples; weighting="token" is the usual batch loss.
Cost   Time: one micro-batch. Memory: four bytes per eligible weight in RAM, one dense gradient at
  a time.
Fails  One micro-batch is a noisy witness; SAFT asks many.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import Scope, TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("sift", needs={"first_gradient"})
@dataclass(frozen=True, slots=True, kw_only=True)
class SIFT(WeightScorer):
    """Gradient of one micro-batch."""

    default_scope: ClassVar[Scope] = "per_tensor"

    micro_batch: Annotated[int, Field(ge=1, description="examples in the first micro-batch")] = 16

    def micro_batch_size(self) -> int:
        """Return how many examples one micro-batch has."""
        return self.micro_batch

    def tensor_count(self, share: Fraction, n: int) -> int:
        """Return one more than the share, as the paper's release has it."""
        return floor(share * n) + 1

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the size of the gradient."""
        _ = weight
        return evidence.values["first_gradient"].abs()
