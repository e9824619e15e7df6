"""Fisher: the weights with the largest mean squared gradient, the diagonal of the Fisher matrix.

    S = mean over micro-batches of (gradient of the micro-batch's mean loss)^2

Paper  RoSA, arXiv 2401.04679, its mask: one batch of 32, per tensor. Ours: a micro-batch is one
  example, which does not depend on how examples are batched; RoSA's is micro_batch=8 or so.
Cost   Time: one forward and backward pass per micro-batch, each alone. Memory: four bytes per
  eligible weight in RAM, one dense gradient at a time.
Fails  One odd example with a large loss can decide the mask; with larger micro-batches its
  gradient averages out.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.registry import weight_scorer
from selectune.weights.options import Scope, TensorEvidence
from selectune.weights.scorer import WeightScorer


@weight_scorer("fisher", needs={"square_gradient"})
@dataclass(frozen=True, slots=True, kw_only=True)
class Fisher(WeightScorer):
    """Mean squared gradient."""

    default_scope: ClassVar[Scope] = "per_tensor"

    examples: Annotated[
        int, Field(ge=1, description="examples that the evidence is taken from")
    ] = 32
    micro_batch: Annotated[
        int, Field(ge=1, description="examples whose mean gradient is squared")
    ] = 1

    def micro_batch_size(self) -> int:
        """Return how many examples one micro-batch has."""
        return self.micro_batch

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the mean square."""
        _ = weight
        return evidence.values["square_gradient"]
