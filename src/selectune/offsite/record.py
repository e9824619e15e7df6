"""What a compressor thought of a layer and what it kept: plain values for the owner alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class MatrixScores:
    """The singular components of one matrix of attention, in the order of their singular values.

    Attributes:
        shape: of the matrix, [m, n].
        scores: the highest are kept.
        spectrum: singular values, falling.
        n_protected: so many of the first are kept whatever their score.
        is_part: whether it is a part of a fused module, which is replaced as a whole.
    """

    shape: tuple[int, int]
    scores: Float[Tensor, " k"]
    spectrum: Float[Tensor, " k"]
    n_protected: int
    is_part: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScores:
    """The channels of one MLP.

    Attributes:
        scores: the highest are kept.
        size: numbers that leave with one channel, biases counted.
    """

    scores: Float[Tensor, " c"]
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerScores:
    """Everything in one layer that competes.

    Attributes:
        original: the layer's index.
        matrices: by `Matrix.key`; empty where attention is left as it is.
        channels: None where the MLP is left as it is.
        svd_seconds: spent on decompositions.
    """

    original: int
    matrices: Mapping[str, MatrixScores]
    channels: ChannelScores | None
    svd_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What is kept of one layer.

    Attributes:
        components: by `Matrix.key`, ascending; a matrix that is not named stays as it is.
        channels: ascending; None where the MLP stays as it is.
    """

    components: Mapping[str, tuple[int, ...]]
    channels: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerRecord:
    """Scores, spectra and what was kept of one compressed layer. It never leaves the owner."""

    scores: LayerScores
    plan: LayerPlan

    @property
    def original(self) -> int:
        """The layer's index in the original."""
        return self.scores.original

    @property
    def svd_seconds(self) -> float:
        """Seconds spent on decompositions."""
        return self.scores.svd_seconds

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        matrices = {
            key: {
                "shape": list(found.shape),
                "kept": self._kept(key),
                "protected": found.n_protected,
                "scores": found.scores.tolist(),
                "spectrum": found.spectrum.tolist(),
            }
            for key, found in self.scores.matrices.items()
        }
        channels = self.scores.channels
        kept = self.plan.channels
        return {
            "original": self.original,
            "svd_seconds": self.svd_seconds,
            "matrices": matrices,
            "channels": None
            if channels is None
            else {
                "kept": None if kept is None else list(kept),
                "scores": channels.scores.tolist(),
            },
        }

    def _kept(self, key: str) -> list[int] | None:
        kept = self.plan.components.get(key)
        return None if kept is None else list(kept)


@dataclass(frozen=True, slots=True)
class StackRecord:
    """Which whole layers were kept. It never leaves the owner.

    Attributes:
        middle: original indices of the middle layers.
        kept: of those that stay as they are.
    """

    middle: tuple[int, ...]
    kept: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"middle": list(self.middle), "kept": list(self.kept)}
