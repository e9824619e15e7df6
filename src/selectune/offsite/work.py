"""What an owner's work has finished so far, on disk: a killed `emulate` goes on from there."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selectune.digests import digest
from selectune.files import Opened, is_complete, kill_point, open_dir, staged
from selectune.files.kill import KillPoint
from selectune.models import blocks
from selectune.offsite.pieces import CompressedLayer, Fused, LowRank, Narrow, Piece
from selectune.offsite.record import ChannelScores, LayerScores, MatrixScores

_LAYER, _SCORES, _MIDDLE = "emulated layer", "layer scores", "trained middle"
_TENSORS = "tensors.safetensors"


class Work:
    """The finished parts of one emulator, in a folder that only the owner sees.

    Args:
        folder: where they lie.
        facts: plain values that decide them; parts of other facts are made anew.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self._fingerprint = digest(facts)

    def layer(self, j: int) -> tuple[CompressedLayer, dict[str, Any]] | None:
        """Return a compressed layer and what is on record of it; None where it is to be made."""
        opened = self._opened(f"layer-{j}", _LAYER)
        if opened is None:
            return None
        tensors, forms = opened.read_torch(_TENSORS), opened.read_json("pieces.json")
        pieces = {name: _piece(form, name, tensors) for name, form in forms.items()}
        return CompressedLayer(j, pieces), opened.read_json("record.json")

    def keep_layer(self, layer: CompressedLayer, record: Mapping[str, Any]) -> None:
        """Write a compressed layer and what is on record of it."""
        tensors: dict[str, Tensor] = {}
        forms = {name: _form(piece, name, tensors) for name, piece in layer.pieces.items()}
        with staged(self.folder / f"layer-{layer.original}", kind=_LAYER, meta=self._meta) as stage:
            stage.write_tensors(_TENSORS, tensors)
            stage.write_json("pieces.json", forms)
            stage.write_json("record.json", record)
        kill_point(KillPoint.EMULATE_LAYER_DONE)

    def scores(self, j: int) -> LayerScores | None:
        """Return the scores of a layer; None where they are to be made."""
        opened = self._opened(f"scores-{j}", _SCORES)
        if opened is None:
            return None
        tensors, facts = opened.read_torch(_TENSORS), opened.read_json("scores.json")
        matrices = {
            key: MatrixScores(
                (one["shape"][0], one["shape"][1]),
                tensors[f"scores of {key}"],
                tensors[f"spectrum of {key}"],
                one["n_protected"],
                is_part=one["is_part"],
            )
            for key, one in facts["matrices"].items()
        }
        channels = None
        if facts["channel_size"] is not None:
            channels = ChannelScores(tensors["channels"], facts["channel_size"])
        return LayerScores(j, matrices, channels, facts["svd_seconds"])

    def keep_scores(self, scores: LayerScores) -> None:
        """Write the scores of a layer."""
        tensors: dict[str, Tensor] = {}
        matrices: dict[str, Any] = {}
        for key, one in scores.matrices.items():
            tensors |= {f"scores of {key}": one.scores, f"spectrum of {key}": one.spectrum}
            matrices[key] = {
                "shape": list(one.shape),
                "n_protected": one.n_protected,
                "is_part": one.is_part,
            }
        if scores.channels is not None:
            tensors["channels"] = scores.channels.scores
        size = None if scores.channels is None else scores.channels.size
        facts = {
            "matrices": matrices,
            "channel_size": size,
            "svd_seconds": scores.svd_seconds,
        }
        with staged(
            self.folder / f"scores-{scores.original}", kind=_SCORES, meta=self._meta
        ) as stage:
            stage.write_tensors(_TENSORS, tensors)
            stage.write_json("scores.json", facts)
        kill_point(KillPoint.EMULATE_LAYER_DONE)

    def has_trained_middle(self, emulator: nn.Module, indices: Iterable[int]) -> bool:
        """Put a trained middle into an emulator; False where it is to be trained.

        Args:
            emulator: as it was before the training.
            indices: of its middle layers.
        """
        opened = self._opened("middle", _MIDDLE)
        if opened is None:
            return False
        every, tensors = blocks(emulator), opened.read_torch(_TENSORS)
        for i in indices:
            own = {k.removeprefix(f"{i}."): t for k, t in tensors.items() if k.startswith(f"{i}.")}
            every[i].load_state_dict(own)
        return True

    def keep_trained_middle(self, emulator: nn.Module, indices: Iterable[int]) -> None:
        """Write the middle layers of an emulator."""
        every = blocks(emulator)
        tensors = {f"{i}.{k}": t for i in indices for k, t in every[i].state_dict().items()}
        with staged(self.folder / "middle", kind=_MIDDLE, meta=self._meta) as stage:
            stage.write_tensors(_TENSORS, tensors)
        kill_point(KillPoint.EMULATE_LAYER_DONE)

    def remove(self) -> None:
        """Remove the folder: what it holds is in the package, or nobody's business."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _meta(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint}

    def _opened(self, name: str, kind: str) -> Opened | None:
        path = self.folder / name
        if not is_complete(path, kind):
            return None
        opened = open_dir(path, kind=kind)
        return opened if opened.meta == self._meta else None


def _form(piece: Piece, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a piece's tensors among the others, and return the rest of what it is."""
    match piece:
        case LowRank(first, second, bias):
            tensors |= {f"{name}|first": first, f"{name}|second": second}
        case Narrow(weight, bias):
            tensors[f"{name}|weight"] = weight
        case Fused(parts):
            forms = [_form(part, f"{name}|{k}", tensors) for k, part in enumerate(parts)]
            return {"kind": "fused", "parts": forms}
    if bias is not None:
        tensors[f"{name}|bias"] = bias
    return {"kind": "low rank" if isinstance(piece, LowRank) else "narrow"}


def _piece(form: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Piece:
    bias = tensors.get(f"{name}|bias")
    match form["kind"]:
        case "fused":
            parts = [_low_rank(f"{name}|{k}", tensors) for k in range(len(form["parts"]))]
            return Fused(tuple(parts))
        case "low rank":
            return _low_rank(name, tensors)
        case _:
            return Narrow(tensors[f"{name}|weight"], bias)


def _low_rank(name: str, tensors: Mapping[str, Tensor]) -> LowRank:
    bias = tensors.get(f"{name}|bias")
    return LowRank(tensors[f"{name}|first"], tensors[f"{name}|second"], bias)
