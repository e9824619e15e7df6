"""SNIP: the weights whose removal would change the loss most, to first order.

    S = |g w|      g = mean over examples of the gradient of the example's loss

Paper  SHiRA-SNIP of "Sparse High Rank Adapters", arXiv 2406.13175, after SNIP, arXiv 1810.02340:
  per tensor, 1 to 2 %. The same ranking as the first-order Taylor score (g w)^2. Ours: the pass is
  over many examples, and the mean over examples.
Cost   Time: one forward and backward pass over `examples`, once. Memory: four bytes per eligible
  weight in RAM, one dense gradient at a time.
Fails  It favours large weights, of which half-precision trainers round away most small updates.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import Scope, TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("snip", needs={"mean_gradient"})
@dataclass(frozen=True, slots=True, kw_only=True)
class SNIP(WeightScorer):
    """Gradient times weight."""

    default_scope: ClassVar[Scope] = "per_tensor"

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Multiply the gradient with the weight."""
        return (evidence.values["mean_gradient"] * weight).abs_()
