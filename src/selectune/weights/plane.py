"""Where chosen weights stand among all of them, counted by magnitude and by gradient.

    cell of a weight = (log10 |weight|, log10 |gradient|), eight cells to a power of ten

One tensor after the other is counted on a grid that spans all of float32, so nothing has to be
known beforehand and no two tensors are held at once; then the grid is cut down to where weights
are. One grid takes the masks of several methods, as long as one of them has looked at gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from selectune.errors import ConfigError, SelectionError
from selectune.registry import WeightNeed
from selectune.weights.base import flat
from selectune.weights.mask import WeightMask
from selectune.weights.scores import WeightScores

_PER_DECADE = 8
_LOWEST = -46  # log10 of the smallest float32 is -44.9, of the largest 38.5
_N = 1 + _PER_DECADE * (40 - _LOWEST)  # the first cell holds what is exactly zero
_TAIL = 0.0001  # share of weights on either side that does not widen the axes
_MOST = 64  # cells of an axis
_CHUNK = 2**24  # entries counted at a time, which bounds the temporaries
_READ: tuple[WeightNeed, ...] = ("mean_gradient", "first_gradient", "square_gradient", "drift")


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """Weights counted in cells of |weight| by |gradient|.

    Args:
        statistic: what stands for the gradient, as scorers name it. Of a mean square, the root.
        magnitude: exponents of ten at the edges of the cells of |weight|, ascending.
        gradient: those of |gradient|.
        eligible: all weights: a row per cell of |weight|, a column per cell of |gradient|. The
            first row and the first column hold exact zeros; the outermost ones also hold the few
            that lie beyond the edges.
        chosen: the same of each mask.
        outside: weights of each mask in tensors that were not scored, and are not counted.
    """

    statistic: WeightNeed
    magnitude: tuple[float, ...]
    gradient: tuple[float, ...]
    eligible: Int[np.ndarray, "m g"]
    chosen: Mapping[str, Int[np.ndarray, "m g"]]
    outside: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "statistic": self.statistic,
            "magnitude": list(self.magnitude),
            "gradient": list(self.gradient),
            "eligible": self.eligible.tolist(),
            "chosen": {name: counts.tolist() for name, counts in self.chosen.items()},
            "outside": dict(self.outside),
        }


def plane_of(scores: WeightScores, masks: Mapping[str, WeightMask]) -> Plane:
    """Count all eligible weights, and those that masks choose, by magnitude and gradient.

    Args:
        scores: of any method that looks at gradients; before the weights are trained.
        masks: by name, of any method.

    Raises:
        ConfigError: the scores rest on no gradient.
        SelectionError: a mask is of another base, or the weights have changed since.
    """
    statistic = min(scores.statistics.values, key=_READ.index, default=None)
    if statistic is None:
        raise ConfigError(
            f"{scores.scorer.entry.name} has looked at no gradient",
            where="scores",
            why="weights are placed by their magnitude and their gradient",
            do="give the scores of a method such as gallop or saft: masks of any method can be "
            "placed by them",
        )
    for label, mask in masks.items():
        _refuse_another_base(label, mask, scores)
    every = torch.zeros(_N * _N, dtype=torch.int64)
    chosen = {label: torch.zeros_like(every) for label in masks}
    for name, weight in scores.weights.items():
        scores.of(name)  # refuses weights that have changed since they were scored
        values = flat(weight.parameter)
        grads = scores.statistics.values[statistic][name].flatten()
        if statistic == "square_gradient":
            grads = grads.sqrt()
        _count(every, values, grads)
        for label, mask in masks.items():
            if name in mask.indices:
                places = mask.indices[name].long()
                _count(chosen[label], values[places.to(values.device)], grads[places])
    grids = [c.view(_N, _N).numpy() for c in (every, *chosen.values())]
    axes = [_axis([grid.sum(1 - k) for grid in grids]) for k in (0, 1)]
    summed = [_summed(grid, axes) for grid in grids]
    return Plane(
        statistic,
        axes[0].edges,
        axes[1].edges,
        summed[0],
        dict(zip(masks, summed[1:], strict=True)),
        {
            label: sum(i.numel() for name, i in mask if name not in scores.weights)
            for label, mask in masks.items()
        },
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """How an axis of the full grid is cut down."""

    edges: tuple[float, ...]
    starts: tuple[int, ...]  # where each cell begins in the full grid, that of zeros first


def _refuse_another_base(label: str, mask: WeightMask, scores: WeightScores) -> None:
    for name, weight in scores.weights.items():
        shape = tuple(weight.parameter.shape)
        if mask.base != scores.base or tuple(mask.shapes.get(name, shape)) != shape:
            raise SelectionError(
                "a mask and the scores were made for different base models",
                where=label,
                why=f"their fingerprints are {mask.base} and {scores.base}"
                if mask.base != scores.base
                else f"the shapes of {name} are {list(mask.shapes[name])} and {list(shape)}",
                do="make both from one model, before it is trained",
            )


def _count(counts: Int[Tensor, " nn"], values: Tensor, grads: Tensor) -> None:
    """Add each entry to its cell of the full grid."""
    one = torch.ones(1, dtype=torch.int64)
    for w, g in zip(values.split(_CHUNK), grads.split(_CHUNK), strict=True):
        cells = _cells(w) * _N + _cells(g)
        # Not `bincount`: of a small tensor, it would take its time for the size of the grid.
        counts.index_add_(0, cells, one.expand(len(cells)))


def _cells(values: Tensor) -> Int[Tensor, " n"]:
    """Return the cell of each value along one axis."""
    exponents = values.cpu().float().abs().log10_()
    found = exponents.sub_(_LOWEST).mul_(_PER_DECADE).floor_().add_(1)
    return found.clamp_(0, _N - 1).int()  # the logarithm of zero is minus infinity


def _axis(margins: Sequence[Int[np.ndarray, " n"]]) -> _Axis:
    """Return cells from where the first margin begins to where the last one ends, tails aside."""
    ends: list[int] = []
    for counts in (margin[1:] for margin in margins):
        tail = _TAIL * int(counts.sum())
        if tail:
            ends.append(int(np.searchsorted(np.cumsum(counts), tail, side="right")))
            last = int(np.searchsorted(np.cumsum(counts[::-1]), tail, side="right"))
            ends.append(_N - 2 - last)
    low, high = (min(ends), max(ends)) if ends else (-_LOWEST * _PER_DECADE,) * 2
    step = -(-(high - low + 1) // _MOST)
    n = -(-(high - low + 1) // step)
    edges = tuple((low + step * i) / _PER_DECADE + _LOWEST for i in range(n + 1))
    return _Axis(edges, (0, 1, *(1 + low + step * i for i in range(1, n))))


def _summed(counts: Int[np.ndarray, "n n"], axes: Sequence[_Axis]) -> Int[np.ndarray, "m g"]:
    rows = np.add.reduceat(counts, axes[0].starts, axis=0)
    return np.add.reduceat(rows, axes[1].starts, axis=1)
