"""The one way from a compressor's scores to what stands in for the middle of a model.

Decompositions, protected ranks, budgets, factors and narrowed matrices are the same for all
compressors; see `views` for what they say themselves. For one layer after the other with the same
budget in each: `compress_layer`. For one budget over all layers: `score_layer` for each, then
`budget.together`, then `factors.build_layer` for each.
"""

from collections.abc import Iterable
from time import perf_counter
from typing import cast

from torch import Tensor, nn

from selectune.data import Batch
from selectune.errors import SelectionError
from selectune.gradients.kernels import exact
from selectune.offsite.anatomy import anatomy_of, bias_of, channel_size, weight_of
from selectune.offsite.budget import stack_size, uniform
from selectune.offsite.factors import Decomposition, build_layer, decompose
from selectune.offsite.layout import Layout
from selectune.offsite.pieces import CompressedLayer, MiddleLayer
from selectune.offsite.pooling import pooled_states
from selectune.offsite.record import (
    ChannelScores,
    LayerRecord,
    LayerScores,
    MatrixScores,
    StackRecord,
)
from selectune.offsite.statistics import Advance, LayerStatistics, MatrixStatistics
from selectune.offsite.views import (
    LayerCompressor,
    LinearView,
    MatrixView,
    MlpView,
    StackCompressor,
    StackView,
)
from selectune.registry import CompressorNeed, entry_of


def needs_of(compressor: object) -> frozenset[CompressorNeed]:
    """Return what a registered compressor with these options reads beside the weights."""
    needs = cast("frozenset[CompressorNeed]", entry_of("compressor", type(compressor)).needs)
    return needs | getattr(compressor, "more_needs", frozenset())


def compress_layer(
    block: nn.Module,
    original: int,
    compressor: LayerCompressor,
    statistics: LayerStatistics | None,
    *,
    keep_attention: float,
    keep_mlp: float,
    seed: int = 0,
) -> tuple[CompressedLayer, LayerRecord]:
    """Compress one layer by itself; the block is only read.

    Args:
        block: the layer in the original.
        original: its index.
        compressor: gives the scores.
        statistics: of the layer, from `collect`; None for compressors without data.
        keep_attention: share of the numbers of q, k, v and o, in (0, 1]; 1 leaves them alone.
        keep_mlp: share of the MLP's channels, alike.
        seed: of draws.

    Returns:
        What stands in for the layer, on the CPU; and what only the owner may know about it.

    Raises:
        SelectionError: the block is written in no known way, a share leaves too little, or
            statistics are missing.
    """
    scores, found = _scored(
        block, original, compressor, statistics, keep_attention < 1, keep_mlp < 1, seed
    )
    plan = uniform(scores, keep_attention, keep_mlp)
    return build_layer(block, original, plan, found), LayerRecord(scores, plan)


def score_layer(
    block: nn.Module,
    original: int,
    compressor: LayerCompressor,
    statistics: LayerStatistics | None,
    *,
    attention: bool = True,
    mlp: bool = True,
    seed: int = 0,
) -> LayerScores:
    """Return what the parts of a layer are worth, for a budget over all layers.

    Args:
        block: the layer in the original.
        original: its index.
        compressor: gives the scores.
        statistics: of the layer, from `collect`; None for compressors without data.
        attention: whether its matrices compete.
        mlp: whether its channels do.
        seed: of draws.

    Raises:
        SelectionError: the block is written in no known way, or statistics are missing.
    """
    return _scored(block, original, compressor, statistics, attention, mlp, seed)[0]


def compress_stack(
    model: nn.Module,
    layout: Layout,
    compressor: StackCompressor,
    *,
    keep_attention: float,
    keep_mlp: float,
    batches: Iterable[Batch] = (),
    precision: str = "float32",
    advance: Advance | None = None,
) -> tuple[dict[int, MiddleLayer], StackRecord]:
    """Say which whole layers stay: as many as cost no more than all of them at these shares.

    Args:
        model: the original.
        layout: which of its layers are the middle.
        compressor: a registered one.
        keep_attention: share of attention's numbers that a layer compressor would keep.
        keep_mlp: share of channels that it would keep.
        batches: of calibration text, for compressors that look at hidden states.
        precision: autocast of the forward pass.
        advance: called with the number of examples just done.

    Raises:
        SelectionError: a share is none, or the two differ and a layer is written in no known way.
        DataError: hidden states are needed and there is no text.
    """
    states = None
    if "hidden_states" in needs_of(compressor):
        states = pooled_states(model, batches, layout.middle, precision=precision, advance=advance)
    n_kept = stack_size(model, layout, keep_attention, keep_mlp)
    found = dict(compressor.arrange(StackView(layout, n_kept, states)))
    kept = tuple(j for j, layer in sorted(found.items()) if isinstance(layer, CompressedLayer))
    return found, StackRecord(layout.middle, kept)


def _scored(
    block: nn.Module,
    original: int,
    compressor: LayerCompressor,
    statistics: LayerStatistics | None,
    attention: bool,
    mlp: bool,
    seed: int,
) -> tuple[LayerScores, dict[str, Decomposition]]:
    anatomy = anatomy_of(block)
    known = {} if statistics is None else statistics.matrices
    decompositions: dict[str, Decomposition] = {}
    matrices: dict[str, MatrixScores] = {}
    seconds = 0.0
    for matrix in anatomy.matrices if attention else ():
        module = block.get_submodule(matrix.name)
        weight, bias = exact(weight_of(module)[matrix.rows]), bias_of(module)
        start = perf_counter()
        found = decompose(weight)
        spectrum = found.sigma.cpu()  # waits for the device
        seconds += perf_counter() - start
        view = MatrixView(
            weight, None if bias is None else exact(bias[matrix.rows]), known.get(matrix.key),
            f"{original}:{matrix.key}", found.U, found.sigma, found.Vh,
        )  # fmt: skip
        matrices[matrix.key] = MatrixScores(
            (weight.shape[0], weight.shape[1]),
            _finite(compressor.rank_scores(view, seed), view.name),
            spectrum,
            compressor.protected(len(spectrum)),
            is_part=matrix.part is not None,
        )
        decompositions[matrix.key] = found
    channels = None
    if mlp:
        names = anatomy.mlp
        seen = {name: _view(block, name, known.get(name)) for name in names.names}
        gate = None if names.gate is None else seen[names.gate]
        view = MlpView(f"{original}:{names.up}", seen[names.up], gate, seen[names.down])
        scores = _finite(compressor.channel_scores(view, seed), view.name)
        channels = ChannelScores(scores, channel_size(block, names))
    return LayerScores(original, matrices, channels, seconds), decompositions


def _view(block: nn.Module, name: str, statistics: MatrixStatistics | None) -> LinearView:
    module = block.get_submodule(name)
    bias = bias_of(module)
    return LinearView(exact(weight_of(module)), None if bias is None else exact(bias), statistics)


def _finite(scores: Tensor, name: str) -> Tensor:
    """Return scores on the CPU.

    Raises:
        SelectionError: one is not a number.
    """
    if not bool(scores.isfinite().all()):
        raise SelectionError(
            f"a score of {name} is not a number",
            where=name,
            why="a weight is not, or a product of statistics overflowed",
            do="check the weights, and calibrate in float32",
        )
    return scores.detach().cpu()
