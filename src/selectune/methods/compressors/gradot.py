"""GradOT: keep what shapes the gradients; on request, drop what makes the emulator good by itself.

    GCS(delta) = ||H delta||_1 - lambda <G, delta>       H vec(delta) ~ vec(S delta A)

    component j   delta = -s_j u_j v_j^T   h_j = s_j ||S u_j||_1 ||A v_j||_1   f_j = s_j u_j^T G v_j
    channel c     h_c = sum over up, gate, down of ||S col||_1 ||A row||_1     f_c = <w_c, G_c>
    score = h / mean h + lambda f / mean |f|             the highest are kept

Paper  "GradOT: Training-free Gradient-preserving Offsite-tuning for Large Language Models", arXiv
  2507.04455: the score, Dynamic Rank Decomposition of attention, Selective Channel Pruning of
  MLPs, KFAC, the top 5 % of ranks always kept, a lambda for each. Ours: the closed forms, the
  second term summed, the scale of lambda and its default 0, either Fisher, the rounding.
Cost   Time: one forward and backward pass per group of layers (sampled Fisher: two), 2 T (m^2 +
  n^2 + m n) for the statistics of each matrix over T tokens, one decomposition per matrix of
  attention. Memory: A, S and G of the layers of one group, in fp32.
Fails  A lambda above 0 costs gradient fidelity before it costs the emulator much: print the
  emulator's own accuracy beside it. The gain over svd_magnitude comes from channels, little of it
  from ranks.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from selectune.offsite.budget import count_of
from selectune.offsite.statistics import MatrixStatistics
from selectune.offsite.views import LinearView, MatrixView, MlpView
from selectune.registry import CompressorNeed, compressor


@compressor("gradot", needs={"gradients"})
@dataclass(frozen=True, slots=True, kw_only=True)
class GradOT:
    """Gradient-preserving components and channels."""

    lambda_attention: Annotated[
        float, Field(ge=0, description="how much a component is held against by what it is worth")
    ] = 0.0
    lambda_mlp: Annotated[float, Field(ge=0, description="the same of a channel")] = 0.0
    protect: Annotated[
        float,
        Field(ge=0, le=1, description="share of ranks, by singular value, kept in any case"),
    ] = 0.05
    fisher: Annotated[
        Literal["empirical", "sampled"],
        Field(
            description="S from the text's own tokens, or from tokens that the model draws: the "
            "Fisher matrix, for a second pass"
        ),
    ] = "empirical"

    @property
    def more_needs(self) -> frozenset[CompressorNeed]:
        """What these options need beside what every GradOT needs."""
        return frozenset({"sampled_labels"} if self.fisher == "sampled" else ())

    def rank_scores(self, view: MatrixView, seed: int) -> Float[Tensor, " k"]:
        """Score components by two products with A and S, and one with G."""
        A, S, G = _moments(view.known())
        U, V, n = view.U, view.Vh.mT, view.weight.shape[1]
        h = view.sigma * (S @ U).abs().sum(0) * (A[:, :n] @ V).abs().sum(0)  # v has a 0 at the bias
        f = view.sigma * (U * (G[:, :n] @ V)).sum(0)
        return _score(h, f, self.lambda_attention)

    def channel_scores(self, view: MlpView, seed: int) -> Float[Tensor, " c"]:
        """Add up the three terms of every channel, two where there is no gate."""
        terms = [_down(view.down), _into(view.up)]
        if view.gate is not None:
            terms.append(_into(view.gate))
        h, f = (torch.stack(part).sum(0) for part in zip(*terms, strict=True))
        return _score(h, f, self.lambda_mlp)

    def protected(self, n: int) -> int:
        """Return the share of ranks that a Taylor expansion is not trusted for, rounded up."""
        return count_of(self.protect, n)


def _into(view: LinearView) -> tuple[Tensor, Tensor]:
    """Return h and f of the rows of up or gate; a row's bias leaves with it."""
    A, S, G = _moments(view.known())
    rows = view.weight if view.bias is None else torch.cat([view.weight, view.bias[:, None]], 1)
    return S.abs().sum(0) * (rows @ A).abs().sum(1), (rows * G).sum(1)


def _down(view: LinearView) -> tuple[Tensor, Tensor]:
    """Return h and f of the columns of down; its bias stays."""
    A, S, G = _moments(view.known())
    n = view.weight.shape[1]
    h = (S @ view.weight).abs().sum(0) * A[:n].abs().sum(1)
    return h, (view.weight * G[:, :n]).sum(0)


def _moments(found: MatrixStatistics) -> tuple[Tensor, Tensor, Tensor]:
    assert found.S is not None
    assert found.G is not None
    return found.A, found.S, found.G


def _score(h: Tensor, f: Tensor, weight: float) -> Tensor:
    return _in_units_of(h, h.mean()) + weight * _in_units_of(f, f.abs().mean())


def _in_units_of(x: Tensor, mean: Tensor) -> Tensor:
    return x / mean if bool(mean > 0) else x  # all zero, as where no gradient arrives
