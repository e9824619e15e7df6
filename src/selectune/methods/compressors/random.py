"""Random: components and channels drawn evenly, the control that every compressor must beat.

    score = uniform in [0, 1), drawn by seed, layer and matrix; no rank is protected

Paper  Ours, to be run beside the others: as many components and channels, none of them chosen.
Cost   Time: one decomposition per matrix of attention. No data is read.
Fails  Less often than one would like: report it beside every other compressor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selectune.offsite.views import MatrixView, MlpView
from selectune.registry import compressor
from selectune.seeds import seeded


@compressor("random")
@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """Even draw."""

    def rank_scores(self, view: MatrixView, seed: int) -> Float[Tensor, " k"]:
        """Draw a number for each component."""
        return torch.rand(len(view.sigma), generator=seeded(seed, "random", view.name))

    def channel_scores(self, view: MlpView, seed: int) -> Float[Tensor, " c"]:
        """Draw a number for each channel."""
        return torch.rand(len(view.up.weight), generator=seeded(seed, "random", view.name))

    def protected(self, n: int) -> int:
        """Return 0."""
        return 0
