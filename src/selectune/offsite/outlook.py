"""What an emulator will be, told from shapes alone; and whether it can be made at all."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from selectune.errors import SelectionError
from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of, channel_size, weight_of
from selectune.offsite.budget import stack_size, uniform
from selectune.offsite.compressor import LayerCompressor, StackCompressor, needs_of
from selectune.offsite.layout import Layout
from selectune.offsite.record import ChannelScores, LayerScores, MatrixScores
from selectune.offsite.statistics import statistics_bytes

Compressor = LayerCompressor | StackCompressor

_STATISTICS_BYTES = 2 << 30  # of the layers whose statistics are held at once


@dataclass(frozen=True, slots=True)
class Outlook:
    """The emulator to come.

    Attributes:
        layout: which layers train.
        n_kept: whole middle layers that stay; None where every layer stays, made smaller.
        ranks: of a middle layer's attention, by matrix; empty where it is left as it is.
        channels: of a middle layer's MLP; None where it is left as it is.
        n_adapter: parameters of the adapter layers.
        n_middle: of the original's middle.
        n_emulated: of what stands in for it, layers that are shared counted once.
        n_whole: of the original.
        statistics_bytes: what the statistics of one layer take.
    """

    layout: Layout
    n_kept: int | None
    ranks: Mapping[str, int]
    channels: int | None
    n_adapter: int
    n_middle: int
    n_emulated: int
    n_whole: int
    statistics_bytes: int

    def layers_at_once(self, asked: int | None = None) -> int:
        """Return how many middle layers have their statistics taken in one pass over the text.

        Args:
            asked: as the user wants it; None for as many as fit into 2 GiB.
        """
        fitting = max(1, _STATISTICS_BYTES // max(1, self.statistics_bytes))
        return min(asked or fitting, len(self.layout.middle))


def outlook(
    model: nn.Module,
    layout: Layout,
    compressor: Compressor,
    *,
    keep_attention: float,
    keep_mlp: float,
) -> Outlook:
    """Return what a compressor will leave of a model whose middle layers are alike.

    Args:
        model: the original; its parameters may be on "meta".
        layout: which layers train.
        compressor: a registered one.
        keep_attention: share of attention's numbers to keep.
        keep_mlp: share of the channels.

    Raises:
        SelectionError: nothing would be freed, a share leaves too little, or a layer is written in
            no known way.
    """
    every = blocks(model)
    sizes = [sum(p.numel() for p in block.parameters()) for block in every]
    n_middle = sum(sizes[j] for j in layout.middle)
    n_kept, ranks, channels, freed = None, dict[str, int](), None, 0
    if isinstance(compressor, StackCompressor):
        n_kept = stack_size(model, layout, keep_attention, keep_mlp)
        # Which ones is not known yet, and they are alike.
        freed = n_middle - n_middle * n_kept // len(layout.middle)
    else:
        for j in layout.middle:
            ranks, channels, less = _layer(every[j], j, compressor, keep_attention, keep_mlp)
            freed += less
    if freed <= 0:
        raise SelectionError(
            "the emulator would be the model itself",
            where=f"keep_attention={keep_attention}, keep_mlp={keep_mlp}",
            why="all layers would stay whole: the ratios free nothing"
            if n_kept is None
            else f"all {n_kept} middle layers would stay",
            do="lower keep_attention or keep_mlp",
        )
    return Outlook(
        layout, n_kept, ranks, channels,
        sum(sizes[j] for j in layout.adapters), n_middle, n_middle - freed,
        sum(p.numel() for p in model.parameters()),
        statistics_bytes(every[layout.middle[0]], needs_of(compressor)),
    )  # fmt: skip


def _layer(
    block: nn.Module,
    original: int,
    compressor: LayerCompressor,
    keep_attention: float,
    keep_mlp: float,
) -> tuple[dict[str, int], int | None, int]:
    """Return ranks and channels of one layer, and how many numbers leave it."""
    anatomy = anatomy_of(block)
    shapes = {m.key: weight_of(block.get_submodule(m.name))[m.rows].shape for m in anatomy.matrices}
    matrices: dict[str, MatrixScores] = {}
    for key, (m, n) in shapes.items():
        none = torch.zeros(min(m, n))
        matrices[key] = MatrixScores((m, n), none, none, compressor.protected(len(none)))
    n_channels = len(weight_of(block.get_submodule(anatomy.mlp.up)))
    size = channel_size(block, anatomy.mlp)
    scores = LayerScores(original, matrices, ChannelScores(torch.zeros(n_channels), size))
    plan = uniform(scores, keep_attention, keep_mlp)
    ranks = {key: len(kept) for key, kept in plan.components.items()}
    freed = sum(m * n - ranks[key] * (m + n) for key, (m, n) in shapes.items() if key in ranks)
    if plan.channels is None:
        return ranks, None, freed
    return ranks, len(plan.channels), freed + (n_channels - len(plan.channels)) * size
