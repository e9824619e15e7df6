"""CRaSh: cluster like layers, keep the middle one of each cluster, share it with its neighbours.

    C   one cluster per layer; merge the two adjacent clusters whose facing layers (last of the
        left, first of the right) are most alike, until as many are left as layers may stay
    R   of each cluster keep the middle layer: the (length // 2)-th
    Sh  every other position runs the weights of the nearest kept layer, ties to the right

    like  linear CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred pooled states [n, d]

Paper  Zhang et al., "CRaSh: Clustering, Removing, and Sharing Enhance Fine-tuning without Full
  Large Language Model", arXiv 2310.15477: 512 samples of the task, mean pooling. Ours: calibration
  text, and clusters over the middle layers only, across adapter layers that stand between them.
Cost   Time: one forward pass over the calibration text. Memory: one vector per layer and example.
Fails  On a few examples: with n examples not far above d, all states look alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from selectune.errors import SelectionError
from selectune.offsite.pieces import CompressedLayer, MiddleLayer, SameAs
from selectune.offsite.views import StackView
from selectune.registry import compressor


@compressor("crash", needs={"hidden_states"})
@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """Clustered and shared layers."""

    def arrange(self, stack: StackView) -> Mapping[int, MiddleLayer]:
        """Keep one layer per cluster, and fill the stack up again.

        Raises:
            SelectionError: there are no states, or too few examples to compare them.
        """
        if stack.states is None or stack.states.shape[1] < 2:
            raise SelectionError(
                "CRaSh compares what layers make of at least 2 examples",
                where="calibration",
                do="give more calibration text",
            )
        middle = stack.layout.middle
        clusters = clustered(stack.states, stack.n_kept)
        kept = [middle[cluster[len(cluster) // 2]] for cluster in clusters]
        return {
            j: CompressedLayer(j, {}) if j in kept else SameAs(nearest(kept, j)) for j in middle
        }


def linear_cka(X: Float[Tensor, "n d"], Y: Float[Tensor, "n d"]) -> float:
    """Return how alike two representations of the same examples are, from 0 to 1."""
    X, Y = X.double() - X.double().mean(0), Y.double() - Y.double().mean(0)
    # ||Y^T X||_F^2 = <X X^T, Y Y^T>: with fewer examples than features, n by n is smaller.
    K, L = X @ X.mT, Y @ Y.mT
    size = K.norm() * L.norm()
    return float((K * L).sum() / size) if bool(size) else 0.0


def clustered(states: Float[Tensor, "l n d"], n_clusters: int) -> list[list[int]]:
    """Merge adjacent layers until so many clusters are left; of equals the first two."""
    alike = [linear_cka(states[k], states[k + 1]) for k in range(len(states) - 1)]
    # Facing layers are neighbours, so a merge never changes how alike the others are.
    cuts = sorted(range(len(alike)), key=lambda k: (alike[k], -k))[: n_clusters - 1]
    edges = [0, *sorted(k + 1 for k in cuts), len(states)]
    return [list(range(a, b)) for a, b in pairwise(edges)]


def nearest(kept: Sequence[int], layer: int) -> int:
    """Return the kept layer that is nearest to another; of two as near the right one."""
    return min(kept, key=lambda k: (abs(k - layer), -k))
