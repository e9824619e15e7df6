"""Finished layers on disk come back as they were, and those of other facts not at all."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from deep import deep_model
from torch.testing import assert_close

from selectune.errors import CorruptFileError
from selectune.methods.compressors.random import Random
from selectune.models import blocks, fingerprint
from selectune.offsite.compressor import compress_layer, score_layer
from selectune.offsite.pieces import Fused, LowRank, Narrow, Piece
from selectune.offsite.work import Work


def tensors(pieces: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    """Return every tensor of some pieces by place."""
    found: dict[str, torch.Tensor] = {}
    for name, piece in pieces.items():
        parts = piece.parts if isinstance(piece, Fused) else (piece,)
        for k, part in enumerate(parts):
            match part:
                case LowRank(first, second, bias):
                    found |= {f"{name} {k} first": first, f"{name} {k} second": second}
                case Narrow(weight, bias):
                    found[f"{name} weight"] = weight
            if bias is not None:
                found[f"{name} {k} bias"] = bias
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_layer_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    block = blocks(deep_model(3, family))[1]
    layer, record = compress_layer(block, 1, Random(), None, keep_attention=0.6, keep_mlp=0.6)
    work = Work(tmp_path, {"seed": 0})
    assert work.layer(1) is None
    work.keep_layer(layer, record.to_json())
    found, told = work.layer(1)
    assert found.original == 1
    assert {n: type(p) for n, p in found.pieces.items()} == {
        n: type(p) for n, p in layer.pieces.items()
    }
    assert fingerprint(tensors(found.pieces)) == fingerprint(tensors(layer.pieces))
    assert told == record.to_json()
    assert Work(tmp_path, {"seed": 1}).layer(1) is None


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    block = blocks(deep_model(3, "gpt2"))[1]
    scores = score_layer(block, 1, Random(), None)
    work = Work(tmp_path, {})
    work.keep_scores(scores)
    found = work.scores(1)
    assert found.matrices.keys() == scores.matrices.keys()
    for key, one in scores.matrices.items():
        other = found.matrices[key]
        assert_close(other.scores, one.scores, rtol=0, atol=0)
        assert_close(other.spectrum, one.spectrum, rtol=0, atol=0)
        assert (other.shape, other.n_protected, other.is_part) == (
            one.shape, one.n_protected, one.is_part,
        )  # fmt: skip
    assert_close(found.channels.scores, scores.channels.scores, rtol=0, atol=0)
    assert found.channels.size == scores.channels.size


def test_a_trained_middle_comes_back_as_it_was(tmp_path: Path) -> None:
    trained, fresh = deep_model(4, seed=1), deep_model(4, seed=2)
    work = Work(tmp_path, {})
    assert not work.has_trained_middle(fresh, [1, 2])
    work.keep_trained_middle(trained, [1, 2])
    assert work.has_trained_middle(fresh, [1, 2])
    same = [
        fingerprint(a.state_dict()) == fingerprint(b.state_dict())
        for a, b in zip(blocks(trained), blocks(fresh), strict=True)
    ]
    assert same == [False, True, True, False]


def test_a_damaged_layer_is_refused(tmp_path: Path) -> None:
    block = blocks(deep_model(3))[1]
    layer, record = compress_layer(block, 1, Random(), None, keep_attention=0.6, keep_mlp=0.6)
    work = Work(tmp_path, {})
    work.keep_layer(layer, record.to_json())
    file = tmp_path / "layer-1" / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptFileError):
        work.layer(1)
