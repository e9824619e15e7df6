"""SAFT: the weights that the task pulls at most.

    S = |g|      g = mean over examples of the gradient of the example's loss

Paper  "SAFT: Towards Out-of-Distribution Generalization in Fine-Tuning", arXiv 2407.03036: 0.1 % of
  all weights, embeddings and norms among them: SAFT(density=0.001, eligible="all"). Ours: matrices
  inside layers by default, so that methods compete for the same weights.
Cost   Time: one forward and backward pass over `examples`, once. Memory: four bytes per eligible
  weight in RAM, one dense gradient at a time.
Fails  Gradients differ in scale between tensors: a few of them may take most of the budget.
"""

from dataclasses import dataclass

from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("saft", needs={"mean_gradient"})
@dataclass(frozen=True, slots=True, kw_only=True)
class SAFT(WeightScorer):
    """Gradient alone."""

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the size of the gradient."""
        _ = weight
        return evidence.values["mean_gradient"].abs()
