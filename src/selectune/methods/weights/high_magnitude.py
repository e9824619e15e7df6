"""High magnitude: the weights that pre-training made largest, whatever the task.

    S = |w|

Paper  SHiRA-WM of "Sparse High Rank Adapters", arXiv 2406.13175, 1 to 2 % per tensor; also
  Super-Tuning, arXiv 2607.09287, 1 %.
Cost   Nothing: no data is read.
Fails  It does not know the task. In half precision most updates of large weights are rounded away:
  train them through an fp32 copy, as `selectune.sparsify` does, and count what moved.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import Scope, TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("high_magnitude")
@dataclass(frozen=True, slots=True, kw_only=True)
class HighMagnitude(WeightScorer):
    """Largest weights first."""

    default_scope: ClassVar[Scope] = "per_tensor"

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the magnitude."""
        _ = evidence
        return weight.abs()
