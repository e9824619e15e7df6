"""What compressors leave of a layer: pieces that own their numbers and say no more than planned."""

import json

import pytest
import torch
from deep import deep_model
from tiny import tiny_model, tiny_tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Phi3Config, Phi3ForCausalLM

from selectune import registry
from selectune.data import collate
from selectune.errors import ConfigError, SelectionError
from selectune.methods.compressors.crash import Crash
from selectune.methods.compressors.gradot import GradOT
from selectune.methods.compressors.layer_drop import LayerDrop, spaced
from selectune.methods.compressors.layer_drop_distilled import LayerDropDistilled
from selectune.methods.compressors.random import Random
from selectune.methods.compressors.svd_magnitude import SvdMagnitude
from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of, bias_of, weight_of
from selectune.offsite.budget import count_of, rank_of, stack_size
from selectune.offsite.compressor import (
    compress_layer,
    compress_stack,
    needs_of,
    score_layer,
)
from selectune.offsite.factors import build_layer
from selectune.offsite.layout import Layout
from selectune.offsite.pieces import Absent, CompressedLayer, Fused, LowRank, Narrow, Piece, SameAs
from selectune.offsite.record import LayerPlan
from selectune.offsite.statistics import LayerStatistics, collect
from selectune.offsite.views import LayerCompressor, StackCompressor

FAMILIES = ("llama", "qwen2", "opt", "gpt2")
BATCHES = [collate(tiny_tokens(6, seed=2), pad_id=0)]
KINDS = [entry.options for entry in registry.methods("compressor")]
LAYER_KINDS = [kind for kind in KINDS if isinstance(kind(), LayerCompressor)]
STACK_KINDS = [kind for kind in KINDS if isinstance(kind(), StackCompressor)]


def known(model: nn.Module, kind: type, layer: int = 0) -> LayerStatistics | None:
    return collect(model, BATCHES, [layer], needs=needs_of(kind())).get(layer)


def factors(piece: Piece) -> list[LowRank]:
    return list(piece.parts) if isinstance(piece, Fused) else [piece]


def numbers(piece: Piece) -> list[Tensor]:
    parts = [piece] if isinstance(piece, Narrow) else factors(piece)
    found = [t for part in parts for t in _two(part)]
    return found + [p.bias for p in parts if p.bias is not None]


def _two(part: LowRank | Narrow) -> tuple[Tensor, ...]:
    return (part.weight,) if isinstance(part, Narrow) else (part.first, part.second)


def test_every_compressor_is_of_one_kind() -> None:
    assert len(LAYER_KINDS) == 4
    assert {*LAYER_KINDS, *STACK_KINDS} == set(KINDS)
    assert not {*LAYER_KINDS} & {*STACK_KINDS}


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_have_the_planned_sizes_and_own_their_numbers(family: str, kind: type) -> None:
    model = tiny_model(family)
    block = blocks(model)[1]
    layer, record = compress_layer(
        block, 1, kind(), known(model, kind, 1), keep_attention=0.6, keep_mlp=0.5
    )
    anatomy = anatomy_of(block)
    assert layer.original == record.original == 1
    assert layer.pieces.keys() == {m.name for m in anatomy.matrices} | set(anatomy.mlp.names)
    for matrix in anatomy.matrices:
        m, n = weight_of(block.get_submodule(matrix.name))[matrix.rows].shape
        assert len(record.plan.components[matrix.key]) == rank_of(0.6, m, n)
    planned = {m.key: len(record.plan.components[m.key]) for m in anatomy.matrices}
    for name, piece in layer.pieces.items():
        module = block.get_submodule(name)
        o, i = weight_of(module).shape
        if isinstance(piece, Narrow):
            c = count_of(0.5, weight_of(block.get_submodule(anatomy.mlp.up)).shape[0])
            assert piece.weight.shape == ((o, c) if name == anatomy.mlp.down else (c, i))
        else:
            keys = [m.key for m in anatomy.matrices if m.name == name]
            assert [p.first.shape[0] for p in factors(piece)] == [planned[k] for k in keys]
            assert sum(p.second.shape[0] for p in factors(piece)) == o
        for part in factors(piece) if not isinstance(piece, Narrow) else [piece]:
            assert (part.bias is None) == (bias_of(module) is None)
        for tensor in numbers(piece):
            assert tensor.device.type == "cpu"
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # nothing removed behind it
    json.dumps(record.to_json(), allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_components_as_factors_are_the_matrix(family: str) -> None:
    block = blocks(tiny_model(family))[0]
    scores = score_layer(block, 0, SvdMagnitude(), None)
    every = {key: tuple(range(len(of.scores))) for key, of in scores.matrices.items()}
    layer = build_layer(block, 0, LayerPlan(every, tuple(range(len(scores.channels.scores)))))
    for name, piece in layer.pieces.items():
        module = block.get_submodule(name)
        if isinstance(piece, Narrow):
            assert torch.equal(piece.weight, weight_of(module))
            assert_close(piece.bias, bias_of(module))
            continue
        product = torch.cat([p.second @ p.first for p in factors(piece)])
        assert_close(product, weight_of(module), rtol=1e-4, atol=1e-5)
        bias = bias_of(module)
        if bias is not None:
            assert torch.equal(torch.cat([p.bias for p in factors(piece)]), bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_the_kept_components_rows_and_columns(family: str) -> None:
    model = tiny_model(family)
    block = blocks(model)[0]
    statistics = known(model, GradOT)
    layer, record = compress_layer(block, 0, GradOT(), statistics, keep_attention=0.5, keep_mlp=0.4)
    anatomy = anatomy_of(block)
    for matrix in anatomy.matrices:
        weight = weight_of(block.get_submodule(matrix.name))[matrix.rows]
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        kept = list(record.plan.components[matrix.key])
        names = [m.key for m in anatomy.matrices if m.name == matrix.name]
        piece = factors(layer.pieces[matrix.name])[names.index(matrix.key)]
        expected = sum(sigma[j] * torch.outer(left[:, j], right[j]) for j in kept)
        assert_close(piece.second @ piece.first, expected, rtol=1e-4, atol=1e-5)
        assert_close(piece.first.norm(dim=1), sigma[kept].sqrt(), rtol=1e-4, atol=1e-5)
        assert_close(piece.second.norm(dim=0), sigma[kept].sqrt(), rtol=1e-4, atol=1e-5)
    kept = list(record.plan.channels)
    assert kept == record.scores.channels.scores.topk(len(kept)).indices.sort().values.tolist()
    for name in anatomy.mlp.names:
        module, piece = block.get_submodule(name), layer.pieces[name]
        weight, bias = weight_of(module), bias_of(module)
        is_down = name == anatomy.mlp.down
        assert torch.equal(piece.weight, weight[:, kept] if is_down else weight[kept])
        if bias is not None:
            assert torch.equal(piece.bias, bias if is_down else bias[kept])


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda k: k.__name__)
def test_keeping_all_leaves_the_weights_alone(kind: type) -> None:
    model = tiny_model("llama")
    block = blocks(model)[0]
    statistics = known(model, kind)
    layer, record = compress_layer(block, 0, kind(), statistics, keep_attention=1.0, keep_mlp=1.0)
    assert layer.pieces == {}
    assert record.svd_seconds == 0.0
    half, _ = compress_layer(block, 0, kind(), statistics, keep_attention=1.0, keep_mlp=0.5)
    assert half.pieces.keys() == {"mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"}
    half, _ = compress_layer(block, 0, kind(), statistics, keep_attention=0.5, keep_mlp=1.0)
    assert half.pieces.keys() == {f"self_attn.{x}_proj" for x in "qkvo"}


def test_half_precision_weights_are_scored_in_fp32_and_stored_as_they_were() -> None:
    model = tiny_model("llama")
    block = blocks(model)[0].bfloat16()
    layer, record = compress_layer(block, 0, SvdMagnitude(), None, keep_attention=0.6, keep_mlp=0.6)
    assert all(t.dtype == torch.bfloat16 for p in layer.pieces.values() for t in numbers(p))
    spectrum = record.scores.matrices["self_attn.q_proj"].spectrum
    assert spectrum.dtype == torch.float32
    weight = block.get_submodule("self_attn.q_proj").weight.float()
    assert_close(spectrum, torch.linalg.svdvals(weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_largest_components_are_kept_whatever_their_score(share: float) -> None:
    model = tiny_model("llama")
    block, statistics = blocks(model)[0], known(model, GradOT)
    # A large lambda would throw out large components that hurt.
    gradot = GradOT(lambda_attention=1e6, protect=share)
    _, record = compress_layer(block, 0, gradot, statistics, keep_attention=0.6, keep_mlp=0.6)
    for key, of in record.scores.matrices.items():
        n = count_of(share, len(of.scores))
        assert of.n_protected == n
        kept = record.plan.components[key]
        assert set(range(n)) <= set(kept)
        rest = of.scores[n:].topk(len(kept) - n).indices + n
        assert set(kept) == set(range(n)) | set(rest.tolist())


def test_random_draws_depend_on_seed_layer_and_matrix_alone() -> None:
    model = deep_model(2)
    first, second = blocks(model)
    draws = [
        score_layer(block, j, Random(), None, seed=seed)
        for block, j, seed in ((first, 0, 0), (first, 0, 0), (first, 0, 1), (second, 1, 0))
    ]
    q = [d.matrices["self_attn.q_proj"].scores for d in draws]
    o = draws[0].matrices["self_attn.o_proj"].scores
    assert torch.equal(q[0], q[1])
    assert not any(torch.equal(q[0], other) for other in (q[2], q[3], o))
    assert all(of.n_protected == 0 for of in draws[0].matrices.values())


def test_a_layer_without_gradients_still_has_scores() -> None:
    model = tiny_model("llama")
    block, found = blocks(model)[0], known(model, GradOT)
    for of in found.matrices.values():
        of.S.zero_()
        of.G.zero_()
    scores = score_layer(block, 0, GradOT(lambda_attention=1.0, lambda_mlp=1.0), found)
    assert not scores.channels.scores.any()
    assert not any(of.scores.any() for of in scores.matrices.values())


@pytest.mark.parametrize(
    ("keep", "protect", "words"),
    [
        ({"keep_attention": 0.0}, 0.05, "keep_attention=0.0 is no share"),
        ({"keep_mlp": 1.5}, 0.05, "keep_mlp=1.5 is no share"),
        ({"keep_attention": 0.05}, 0.0, "leaves rank 0"),
        ({"keep_attention": 0.3}, 0.5, "largest singular values"),
    ],
)
def test_shares_that_leave_too_little_are_refused(
    keep: dict[str, float], protect: float, words: str
) -> None:
    model = tiny_model("llama")
    shares = {"keep_attention": 0.6, "keep_mlp": 0.6, **keep}
    with pytest.raises(SelectionError, match=words):
        compress_layer(blocks(model)[0], 0, GradOT(protect=protect), known(model, GradOT), **shares)


def test_missing_statistics_and_wrong_options_are_refused() -> None:
    block = blocks(tiny_model("llama"))[0]
    with pytest.raises(SelectionError, match="needs statistics"):
        compress_layer(block, 0, GradOT(), None, keep_attention=0.6, keep_mlp=0.6)
    with pytest.raises(ConfigError, match="lambda_mlp"):
        GradOT(lambda_mlp=-1.0)
    with torch.no_grad():
        block.get_submodule("mlp.up_proj").weight[0, 0] = float("inf")
    with pytest.raises(SelectionError, match="not a number"):
        compress_layer(block, 0, SvdMagnitude(), None, keep_attention=1.0, keep_mlp=0.6)


def test_evenly_spaced_layers_are_offsite_tuning_s() -> None:
    assert spaced(range(20), 8) == {round(i * 19 / 7) for i in range(8)}
    assert spaced([2, 3, 4, 5, 6], 1) == {4}
    assert spaced([2, 3, 4, 5, 6], 5) == {2, 3, 4, 5, 6}
    for n_layers in range(1, 40):
        for n in range(1, n_layers + 1):
            assert len(spaced(range(n_layers), n)) == n


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [0.3, 0.6, 1.0])
def test_as_many_whole_layers_stay_as_compressed_ones_cost(family: str, keep: float) -> None:
    model = deep_model(9, family)
    layout = Layout.of(9, [0, -1])
    cost = total = 0
    for j in layout.middle:
        block = blocks(model)[j]
        layer, _ = compress_layer(
            block, j, SvdMagnitude(), None, keep_attention=keep, keep_mlp=keep
        )
        size = sum(p.numel() for p in block.parameters())
        replaced = sum(
            p.numel() for name in layer.pieces for p in block.get_submodule(name).parameters()
        )
        stored = sum(t.numel() for piece in layer.pieces.values() for t in numbers(piece))
        cost += size - replaced + stored
        total += size
    assert stack_size(model, layout, keep, keep) == max(1, int(7 * cost / total))


def test_whole_layers_need_no_anatomy_where_one_share_holds_for_all() -> None:
    facts = tiny_model("llama").config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = Phi3Config(**{key: facts[key] for key in keys}, num_hidden_layers=7, pad_token_id=0)
    model, layout = Phi3ForCausalLM(config), Layout.of(7, [0])
    assert [stack_size(model, layout, keep, keep) for keep in (0.5, 0.4, 0.01, 1.0)] == [3, 2, 1, 6]
    with pytest.raises(SelectionError, match="no known way"):
        stack_size(model, layout, 0.5, 0.6)


def test_layer_drop_leaves_spaced_layers_and_nothing_else() -> None:
    model, layout = deep_model(9), Layout.of(9, [0, 4, -1])
    for kind in (LayerDrop, LayerDropDistilled):
        found, record = compress_stack(model, layout, kind(), keep_attention=0.6, keep_mlp=0.6)
        n = stack_size(model, layout, 0.6, 0.6)
        kept = spaced(layout.middle, n)
        assert found.keys() == set(layout.middle)
        assert set(record.kept) == kept
        for j, layer in found.items():
            assert isinstance(layer, CompressedLayer if j in kept else Absent)
        json.dumps(record.to_json())


def test_crash_fills_the_stack_with_kept_layers() -> None:
    model, layout = deep_model(9), Layout.of(9, [0, 4, -1])
    found, record = compress_stack(
        model, layout, Crash(), keep_attention=0.6, keep_mlp=0.6, batches=BATCHES
    )
    assert len(record.kept) == stack_size(model, layout, 0.6, 0.6)
    assert found.keys() == set(layout.middle)
    for j, layer in found.items():
        if isinstance(layer, SameAs):
            assert layer.original in record.kept
            gaps = [abs(layer.original - j), *(abs(k - j) for k in record.kept)]
            assert gaps[0] == min(gaps)
        else:
            assert (layer.original, layer.pieces) == (j, {})
            assert j in record.kept


def test_crash_needs_two_examples() -> None:
    one = [collate(tiny_tokens(1), pad_id=0)]
    with pytest.raises(SelectionError, match="at least 2 examples"):
        compress_stack(
            deep_model(6), Layout.of(6), Crash(), keep_attention=0.6, keep_mlp=0.6, batches=one
        )
