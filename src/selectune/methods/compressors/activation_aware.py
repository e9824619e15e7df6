"""Activation-aware: what removing a component or a channel changes in the output, on real text.

    component j   s_j sqrt(v_j^T A v_j)          channel c   ||d_c|| sqrt(mean h_c^2)

The root of the mean squared change of the matrix's output, exactly, for each removal by itself.

Paper  Ours, after "ASVD", arXiv 2312.05821, and "SVD-LLM", arXiv 2403.07378, which scale by
  activations; here components stay those of the plain decomposition.
Cost   Time: one forward pass per group of layers, 2 T n^2 for each A, one decomposition per matrix
  of attention. Memory: A of the layers of one group, in fp32.
Fails  Where an output does not matter to the loss: it looks no further than one matrix.
"""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from selectune.offsite.budget import count_of
from selectune.offsite.views import MatrixView, MlpView
from selectune.registry import compressor


@compressor("activation_aware", needs={"inputs"})
@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationAware:
    """By the error of the output."""

    protect: Annotated[
        float,
        Field(ge=0, le=1, description="share of ranks, by singular value, kept in any case"),
    ] = 0.05

    def rank_scores(self, view: MatrixView, seed: int) -> Float[Tensor, " k"]:
        """Measure each right singular vector in the inputs' second moments."""
        n = view.weight.shape[1]
        A = view.known().A[:n, :n]
        return view.sigma * ((view.Vh @ A) * view.Vh).sum(1).clamp(min=0).sqrt()

    def channel_scores(self, view: MlpView, seed: int) -> Float[Tensor, " c"]:
        """Multiply a channel's column of down with how strongly it is active."""
        moments = view.down.known().A.diagonal()[: view.down.weight.shape[1]]
        return view.down.weight.norm(dim=0) * moments.sqrt()

    def protected(self, n: int) -> int:
        """Return a share of the ranks, rounded up."""
        return count_of(self.protect, n)
