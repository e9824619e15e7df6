"""Layer drop: evenly spaced middle layers stay, the others are gone.

    n of L middle layers: round(i (L - 1) / (n - 1)) for i = 0 .. n - 1; the middle one for n = 1

Paper  Without distillation in Xiao et al., "Offsite-Tuning: Transfer Learning without Full
  Model", arXiv 2302.04870. Ours: n = 1.
Cost   Nothing: no data is read, and the emulator is an ordinary model of fewer layers.
Fails  Layers that stay get inputs they were not made for: below half the layers the emulator hardly
  predicts, and what is tuned on it fits the full model badly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from selectune.offsite.pieces import Absent, CompressedLayer, MiddleLayer
from selectune.offsite.views import StackView
from selectune.registry import compressor


def spaced(layers: Sequence[int], n: int) -> set[int]:
    """Return n of the layers, evenly spaced, first and last among them if n > 1."""
    last = len(layers) - 1
    if n == 1:
        return {layers[len(layers) // 2]}
    return {layers[round(Fraction(i * last, n - 1))] for i in range(n)}  # a half goes to even


def dropped(stack: StackView) -> dict[int, MiddleLayer]:
    """Return what becomes of every middle layer where evenly spaced ones stay."""
    kept = spaced(stack.layout.middle, stack.n_kept)
    return {j: CompressedLayer(j, {}) if j in kept else Absent() for j in stack.layout.middle}


@compressor("layer_drop")
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrop:
    """Every so many layers one."""

    def arrange(self, stack: StackView) -> Mapping[int, MiddleLayer]:
        """Keep evenly spaced layers."""
        return dropped(stack)
