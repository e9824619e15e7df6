"""LoTA: the weights that full fine-tuning moved most; training starts anew from the base.

    S = |w after full fine-tuning - w|

Paper  "Lottery Ticket Adaptation: Mitigating Destructive Interference in LLMs", arXiv 2406.16797:
  one threshold over attention and MLP weights, sparsity 0.9. A next task trains the complement:
  `mask.complement()`. Ours: matrices inside layers, which in Llama are the same weights.
Cost   Time: a full fine-tune before. Memory: the fine-tuned model beside the base while scores are
  taken, then four bytes per eligible weight in RAM.
Fails  It costs the full fine-tune that sparse training was to avoid.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("lota", needs={"drift"})
@dataclass(frozen=True, slots=True, kw_only=True)
class LoTA(WeightScorer):
    """What fine-tuning changed."""

    default_density: ClassVar[float] = 0.1

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the size of the change."""
        _ = weight
        return evidence.values["drift"].abs()
