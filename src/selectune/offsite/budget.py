"""From a share of the parameters to what is kept: the same share everywhere, or one threshold.

    rank      floor(keep * m n / (m + n))      rank r of an [m, n] matrix costs r (m + n) numbers
    channels  ceil(keep * d_ff)

Keep 1 leaves weights as they are. A budget for all layers together measures each component and each
channel in units of its matrix's mean score, per number that it costs, and takes the highest until
the numbers are spent; every matrix and every MLP first gets a floor of its own. Low rank pays up to
mn / (m + n) components: a matrix that would get so many stays as it is, at its full cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from jaxtyping import Float
from torch import Tensor, nn

from selectune.errors import SelectionError
from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of, channel_size, weight_of
from selectune.offsite.layout import Layout
from selectune.offsite.record import ChannelScores, LayerPlan, LayerScores, MatrixScores

# Of every matrix and every MLP, where all share one budget (ours).
_FLOOR = 0.2


def rank_of(keep: float, m: int, n: int) -> int:
    """Return the rank at which an [m, n] matrix as two factors has this share of its numbers."""
    return floor(_exact(keep) * m * n / (m + n))


def count_of(share: float, n: int) -> int:
    """Return how many of n this share is, rounded up: channels to keep, components to protect."""
    return ceil(_exact(share) * n)


def uniform(scores: LayerScores, keep_attention: float, keep_mlp: float) -> LayerPlan:
    """Keep the same share of every matrix.

    Args:
        scores: of one layer.
        keep_attention: share of the numbers of q, k, v and o, in (0, 1]; 1 leaves them alone.
        keep_mlp: share of the MLP's channels, alike.

    Raises:
        SelectionError: a share is none, or so small that no component is left, or fewer than are
            protected.
    """
    _refuse_share(keep_attention, "keep_attention")
    _refuse_share(keep_mlp, "keep_mlp")
    components: dict[str, tuple[int, ...]] = {}
    if keep_attention < 1:
        for key, found in scores.matrices.items():
            rank = _rank(scores, key, keep_attention)
            components[key] = tuple(sorted(_order(found)[:rank]))
    channels = None
    if keep_mlp < 1 and scores.channels is not None:
        of = scores.channels.scores
        channels = _top(of, count_of(keep_mlp, len(of)))
    return LayerPlan(components, channels)


def together(
    scores: Sequence[LayerScores], keep_attention: float, keep_mlp: float
) -> dict[int, LayerPlan]:
    """Keep as many numbers of all layers together as `uniform` would, where they are worth most.

    Args:
        scores: of all layers.
        keep_attention: share of the numbers of all q, k, v and o; 1 leaves them alone and out.
        keep_mlp: of all MLPs, alike.

    Raises:
        SelectionError: as for `uniform`.
    """
    _refuse_share(keep_attention, "keep_attention")
    _refuse_share(keep_mlp, "keep_mlp")
    budget = 0
    counts: dict[_Owner, int] = {}
    items: list[_Item] = []
    for layer in scores:
        for key, found in layer.matrices.items() if keep_attention < 1 else ():
            owner, size = (layer.original, key), sum(found.shape)
            counts[owner] = _rank(layer, key, min(_FLOOR, keep_attention))
            budget += (_rank(layer, key, keep_attention) - counts[owner]) * size
            items += _components(found, owner, counts[owner])
        if keep_mlp < 1 and layer.channels is not None:
            owner, of = (layer.original, _CHANNELS), layer.channels
            counts[owner] = count_of(min(_FLOOR, keep_mlp), len(of.scores))
            budget += (count_of(keep_mlp, len(of.scores)) - counts[owner]) * of.size
            items += _channels(of, owner, counts[owner])
    for item in sorted(items, key=lambda i: -i.worth):  # stable: ties in the order of the layers
        if item.cost > budget:
            break
        budget -= item.cost
        counts[item.owner] += 1
    return {layer.original: _plan(layer, counts) for layer in scores}


def stack_size(model: nn.Module, layout: Layout, keep_attention: float, keep_mlp: float) -> int:
    """Return how many whole middle layers have no more numbers than all of them at these shares.

    Returns:
        At least 1.

    Raises:
        SelectionError: a share is none, or the two differ and a layer is written in no known way.
    """
    _refuse_share(keep_attention, "keep_attention")
    _refuse_share(keep_mlp, "keep_mlp")
    every = blocks(model)
    total = freed = 0
    for j in layout.middle:
        total += sum(p.numel() for p in every[j].parameters())
        freed += _freed(every[j], keep_attention, keep_mlp)
    return max(1, len(layout.middle) * (total - freed) // total)


def _freed(block: nn.Module, keep_attention: float, keep_mlp: float) -> int:
    """Return how many numbers leave a layer, biases counted."""
    try:
        anatomy, freed = anatomy_of(block), 0
    except SelectionError:
        if keep_attention != keep_mlp:
            raise
        size = sum(p.numel() for p in block.parameters())  # whole layers need no anatomy
        return size - count_of(keep_mlp, size)
    if keep_attention < 1:
        for matrix in anatomy.matrices:
            m, n = weight_of(block.get_submodule(matrix.name))[matrix.rows].shape
            freed += m * n - rank_of(keep_attention, m, n) * (m + n)
    if keep_mlp < 1:
        n_channels = weight_of(block.get_submodule(anatomy.mlp.up)).shape[0]
        freed += (n_channels - count_of(keep_mlp, n_channels)) * channel_size(block, anatomy.mlp)
    return freed


_Owner = tuple[int, str]  # layer, and matrix or the channels
_CHANNELS = ""


@dataclass(frozen=True, slots=True)
class _Item:
    """One component or channel that competes."""

    worth: float  # score in units of its matrix's mean, per number
    owner: _Owner
    cost: int


def _components(found: MatrixScores, owner: _Owner, n_floor: int) -> list[_Item]:
    m, n = found.shape
    most = rank_of(1.0, m, n)
    worth = _normalised(found.scores)
    items = [_Item(worth[c] / (m + n), owner, m + n) for c in _order(found)[n_floor:most]]
    if items and not found.is_part:  # with the last one, the matrix stays as it is
        items[-1] = _Item(items[-1].worth, owner, m * n - (most - 1) * (m + n))
    return items


def _channels(found: ChannelScores, owner: _Owner, n_floor: int) -> list[_Item]:
    worth = _normalised(found.scores)
    order = found.scores.argsort(descending=True, stable=True).tolist()
    return [_Item(worth[c] / found.size, owner, found.size) for c in order[n_floor:]]


def _plan(layer: LayerScores, counts: Mapping[_Owner, int]) -> LayerPlan:
    components: dict[str, tuple[int, ...]] = {}
    for key, found in layer.matrices.items():
        count = counts.get((layer.original, key))
        if count is not None and (found.is_part or count < rank_of(1.0, *found.shape)):
            components[key] = tuple(sorted(_order(found)[:count]))
    channels, count = None, counts.get((layer.original, _CHANNELS))
    if layer.channels is not None and count is not None and count < len(layer.channels.scores):
        channels = _top(layer.channels.scores, count)
    return LayerPlan(components, channels)


def _rank(layer: LayerScores, key: str, keep: float) -> int:
    found = layer.matrices[key]
    rank = rank_of(keep, *found.shape)
    if rank < max(1, found.n_protected):
        why = (
            f"the {found.n_protected} components with the largest singular values are kept in any "
            "case"
            if found.n_protected
            else "nothing of the matrix would be left"
        )
        raise SelectionError(
            f"keep_attention={keep} leaves rank {rank} of {key}, [{found.shape[0]}, "
            f"{found.shape[1]}]",
            where=f"layer {layer.original}",
            why=why,
            do="raise keep_attention, or lower `protect`",
        )
    return rank


def _order(found: MatrixScores) -> list[int]:
    """Return the components in the order in which they are kept: protected, then by score."""
    order = found.scores.argsort(descending=True, stable=True).tolist()
    return [*range(found.n_protected), *(c for c in order if c >= found.n_protected)]


def _top(scores: Float[Tensor, " c"], count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def _normalised(scores: Float[Tensor, " c"]) -> list[float]:
    mean = scores.abs().mean()
    return (scores / mean if bool(mean) else scores).tolist()


def _refuse_share(keep: float, name: str) -> None:
    if not 0 < keep <= 1:
        raise SelectionError(
            f"{name}={keep} is no share to keep",
            where=name,
            why="it is the part of the numbers that the emulator has, above 0 and up to 1",
            do=f"use {name}=0.6",
        )


def _exact(keep: float) -> Fraction:
    """Return the decimal number that a share was written as: 0.55 of 100 is 55, and not 56."""
    return Fraction(repr(float(keep)))
