"""What a compressor looks at, and what it is asked for.

A `LayerCompressor` says what a singular component of attention and a channel of an MLP are worth;
a `StackCompressor` says what becomes of whole layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from selectune.errors import SelectionError
from selectune.offsite.layout import Layout
from selectune.offsite.pieces import MiddleLayer
from selectune.offsite.statistics import MatrixStatistics


@dataclass(frozen=True, slots=True, eq=False)
class LinearView:
    """One linear map, as a compressor sees it: y = W x + b.

    Attributes:
        weight: W, in fp32 (fp64 for an fp64 model).
        bias: b.
        statistics: what calibration text says about it; None where nothing was asked for.
    """

    weight: Float[Tensor, "m n"]
    bias: Float[Tensor, " m"] | None
    statistics: MatrixStatistics | None

    def known(self) -> MatrixStatistics:
        """Return the statistics.

        Raises:
            SelectionError: there are none.
        """
        if self.statistics is None:
            raise SelectionError(
                "the compressor needs statistics of calibration text, and got none",
                where="statistics",
                do="give what `collect` returns, with the needs that the compressor registered",
            )
        return self.statistics


@dataclass(frozen=True, slots=True, eq=False)
class MatrixView(LinearView):
    """One matrix of attention with its singular value decomposition, W = U diag(sigma) Vh.

    Attributes:
        name: of layer and matrix, for draws.
        U: left singular vectors, in columns.
        sigma: singular values, falling.
        Vh: right singular vectors, in rows.
    """

    name: str
    U: Float[Tensor, "m k"]
    sigma: Float[Tensor, " k"]
    Vh: Float[Tensor, "k n"]


@dataclass(frozen=True, slots=True, eq=False)
class MlpView:
    """One MLP. Channel c is row c of up and gate, with its bias, and column c of down.

    Attributes:
        name: of layer and MLP, for draws.
        up: from the hidden state to the channels.
        gate: alike; None where there is none.
        down: from the channels back.
    """

    name: str
    up: LinearView
    gate: LinearView | None
    down: LinearView


@dataclass(frozen=True, slots=True, eq=False)
class StackView:
    """The middle of a model, as whole layers.

    Attributes:
        layout: which layers it has.
        n_kept: how many of them stay.
        states: output of every middle layer, the mean over each example's tokens; None where it was
            not asked for.
    """

    layout: Layout
    n_kept: int
    states: Float[Tensor, "l n d"] | None


@runtime_checkable
class LayerCompressor(Protocol):
    """Says what parts of a layer are worth; the highest scores are kept."""

    def rank_scores(self, view: MatrixView, seed: int) -> Float[Tensor, " k"]:
        """Score the singular components of a matrix of attention."""
        ...

    def channel_scores(self, view: MlpView, seed: int) -> Float[Tensor, " c"]:
        """Score the channels of an MLP."""
        ...

    def protected(self, n: int) -> int:
        """Return how many of n components, by singular value, stay whatever their score."""
        ...


@runtime_checkable
class StackCompressor(Protocol):
    """Says what becomes of every middle layer as a whole."""

    def arrange(self, stack: StackView) -> Mapping[int, MiddleLayer]:
        """Return what becomes of each, by its index in the original; `n_kept` of them stay."""
        ...
