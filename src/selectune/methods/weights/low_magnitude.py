"""Low magnitude: the weights that pre-training left smallest, whatever the task.

    S = -|w|

Paper  PaFi of "Parameter-Efficient Fine-Tuning without Introducing New Latency", arXiv 2305.16742.
  Ours: one threshold for the model, matrices inside layers.
Cost   Nothing: no data is read.
Fails  It does not know the task; weights that start at zero win if they are eligible.
"""

from dataclasses import dataclass

from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("low_magnitude")
@dataclass(frozen=True, slots=True, kw_only=True)
class LowMagnitude(WeightScorer):
    """Smallest weights first."""

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the magnitude, negated."""
        _ = evidence
        return weight.abs().neg_()
