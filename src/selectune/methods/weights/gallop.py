"""GaLLoP: weights that the task pulls at and that pre-training left small.

    S = |g| / (|w| + eps)      g = mean over examples of the gradient of the example's loss

Paper  "GaLLoP: Gradient-based Sparse Learning on Low-Magnitude Parameters", arXiv 2510.19778. The
  threshold over sampled scores is threshold="sampled". Ours: which weights are eligible, one
  exact threshold for the model, the number of examples, a mean over examples, relative eps.
Cost   Time: one forward and backward pass over `examples`, once. Memory: four bytes per eligible
  weight in RAM, one dense gradient at a time.
Fails  Where weights start at zero they win whatever they do: eligible="layers" leaves such tensors
  out. Much of the mask is that of low_magnitude, which needs no data; compare with it.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("gallop", needs={"mean_gradient"})
@dataclass(frozen=True, slots=True, kw_only=True)
class GaLLoP(WeightScorer):
    """Gradient over magnitude."""

    eps: Annotated[float, Field(gt=0, description="added to the magnitude")] = 1e-8
    relative_eps: Annotated[
        bool, Field(description="eps in units of the tensor's root mean square (ours)")
    ] = False

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Divide the gradient by the weight."""
        eps = self.eps * float(weight.square().mean().sqrt()) if self.relative_eps else self.eps
        return evidence.values["mean_gradient"].abs().div_(weight.abs().add_(eps))
