"""SVD + magnitude: the largest singular values, and the channels with the largest weights.

    component j   s_j                channel c   ||u_c|| + ||g_c|| + ||d_c||

Paper  Ours, the plain way of making a model smaller without data; rows u_c and g_c with their bias.
Cost   Time: one decomposition per matrix of attention. Memory: that of one matrix. No data is read.
Fails  Where inputs have a few strong directions: a small weight on one of them matters more than a
  large one elsewhere. Compare with activation_aware.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selectune.offsite.views import LinearView, MatrixView, MlpView
from selectune.registry import compressor


@compressor("svd_magnitude")
@dataclass(frozen=True, slots=True, kw_only=True)
class SvdMagnitude:
    """By size."""

    def rank_scores(self, view: MatrixView, seed: int) -> Float[Tensor, " k"]:
        """Return the singular values."""
        return view.sigma

    def channel_scores(self, view: MlpView, seed: int) -> Float[Tensor, " c"]:
        """Add up the norms of what belongs to a channel."""
        total = view.down.weight.norm(dim=0) + _row_norms(view.up)
        return total if view.gate is None else total + _row_norms(view.gate)

    def protected(self, n: int) -> int:
        """Return 0: the largest win by themselves."""
        return 0


def _row_norms(view: LinearView) -> Tensor:
    rows = view.weight if view.bias is None else torch.cat([view.weight, view.bias[:, None]], 1)
    return rows.norm(dim=1)
