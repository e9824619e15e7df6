"""A sparse delta on disk: `sparse.safetensors` and, with the checksum of both, `sparse.json`.

The folder may hold other files, as a tokenizer's, and may be copied without its manifest: the two
files vouch for each other.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.errors import (
    CorruptFileError,
    IncompatibleRunError,
    SelectionError,
    TrainingError,
)
from selectune.files import MANIFEST, staged, write_file
from selectune.files.disk import exists, put_back, read_file, storage_errors
from selectune.files.manifest import parse_json, to_json
from selectune.files.tensors import tensors_to_bytes, torch_from_bytes
from selectune.weights import gaps

if TYPE_CHECKING:
    from selectune.weights.delta import Indices, SparseDelta, Stored

KIND = "sparse delta"
TENSORS, FACTS = "sparse.safetensors", "sparse.json"
_FORMAT, _VERSION = "selectune/sparse-delta", 1
_LIMIT_BYTES = 64 << 20  # of facts: a quarter of a million tensors
_REPAIR = "copy the folder again, or save the delta again"


def write(delta: "SparseDelta", path: Path, dtype: "Stored | None", indices: "Indices") -> Path:
    """Write a delta; see `SparseDelta.save`."""
    from selectune.weights.delta import STORED

    tensors: dict[str, Tensor] = {}
    for name, index in delta.indices.items():
        if indices == "gaps":
            tensors[f"{name}.gaps"] = gaps.encode(index)
        else:
            tensors[f"{name}.idx"] = index
        held = delta.deltas[name]
        tensors[f"{name}.delta"] = held if dtype is None else held.to(STORED[dtype])
    weights = tensors_to_bytes(tensors, TENSORS)
    facts = {
        "format": _FORMAT,
        "version": _VERSION,
        "base": delta.base,
        "n_entries": delta.n_entries,
        "tensors": {
            name: {
                "shape": list(shape),
                "dtype": delta.dtypes[name],
                "n_entries": delta.indices[name].numel(),
            }
            for name, shape in delta.shapes.items()
        },
        "about": dict(delta.about),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    head = _sealed(facts)
    if _is_own(path):
        with staged(path, kind=KIND, meta={"n_entries": delta.n_entries}) as stage:
            stage.write_bytes(TENSORS, weights)
            stage.write_bytes(FACTS, head)
        return path
    # Beside files of others. A cut between the two shows: their checksums then disagree.
    with storage_errors(path):
        if _has_manifest(path):
            (path / MANIFEST).unlink()
    write_file(path / TENSORS, weights)
    write_file(path / FACTS, head)
    return path


def read(path: Path) -> "SparseDelta":
    """Read a delta; see `SparseDelta.load`."""
    from selectune.weights.delta import SparseDelta

    facts, weights = _checked(path)
    tensors = torch_from_bytes(weights, path / TENSORS)
    try:
        known: Mapping[str, Mapping[str, Any]] = facts["tensors"]
        shapes = {name: tuple(map(int, found["shape"])) for name, found in known.items()}
        dtypes = {name: str(found["dtype"]) for name, found in known.items()}
        deltas = {name: tensors[f"{name}.delta"] for name in known}
        indices = {name: _index(tensors, name, int(known[name]["n_entries"])) for name in known}
        made = SparseDelta(indices, deltas, shapes, dtypes, facts["base"], facts["about"])
        if made.n_entries != facts["n_entries"] or len(tensors) != 2 * len(known):
            raise ValueError(f"it holds {made.n_entries} entries in {len(tensors)} tensors")
    except (
        CorruptFileError, SelectionError, TrainingError,
        KeyError, AttributeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise CorruptFileError(
            "the delta does not fit its own description",
            where=str(path),
            why=str(error).split("\n", 1)[0],
            do=_REPAIR,
        ) from error
    return made


def is_delta(path: Path) -> bool:
    """Return whether a folder claims to hold a sparse delta."""
    with storage_errors(path, "read"):
        put_back(path)
    return exists(path / FACTS)


def _index(tensors: Mapping[str, Tensor], name: str, n_entries: int) -> Tensor:
    if f"{name}.gaps" in tensors:
        return gaps.decode(tensors[f"{name}.gaps"], n_entries)
    index = tensors[f"{name}.idx"]
    if index.dtype not in (torch.int32, torch.int64) or index.shape != (n_entries,):
        raise ValueError(f"{name}.idx is not a row of {n_entries} whole numbers")
    return index


def _sealed(facts: Mapping[str, Any]) -> bytes:
    """Return facts as JSON that carries the checksum of its own rendering."""
    body = {k: v for k, v in facts.items() if k != "sha256"}
    # Through JSON and back: keys that are numbers become text, and then sort as text.
    body = parse_json(to_json(body, FACTS), Path(FACTS))
    digest = hashlib.sha256(to_json(body, FACTS)).hexdigest()
    return to_json({**body, "sha256": digest}, FACTS)


def _checked(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return both files after every byte was checked."""
    if not is_delta(path):
        raise CorruptFileError(
            f"{path.name or path} is no sparse delta",
            where=str(path),
            why=f"it has no {FACTS}" if exists(path) else "there is no such folder",
            do="give the folder that `save_pretrained` or `SparseDelta.save` wrote",
        )
    # Resolved: the Hub's cache keeps links to its files.
    raw = read_file((path / FACTS).resolve(), limit_bytes=_LIMIT_BYTES)
    facts: Any = parse_json(raw, path / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise _damaged(path / FACTS, f'it does not say that its format is "{_FORMAT}"')
    version: Any = facts.get("version")
    if not isinstance(version, int) or version < 1:
        raise _damaged(path / FACTS, f"its version is {version!r:.80}")
    if version > _VERSION:
        raise IncompatibleRunError(
            f"{path.name} was written by a newer selectune",
            where=str(path),
            why=f"its format has version {version}, this selectune reads up to {_VERSION}",
            do="upgrade selectune",
        )
    if raw != _sealed(facts):
        raise _damaged(path / FACTS, "it was changed after it was written")
    weights = read_file((path / TENSORS).resolve())
    digest = hashlib.sha256(weights).hexdigest()
    if digest != facts.get("weights_sha256"):
        why = f"{FACTS} expects sha256 {facts.get('weights_sha256')}, the file has {digest}"
        raise _damaged(path / TENSORS, why)
    return facts, weights


def _damaged(file: Path, why: str) -> CorruptFileError:
    return CorruptFileError(f"{file.name} is damaged", where=str(file), why=why, do=_REPAIR)


def _is_own(path: Path) -> bool:
    """Return whether the folder is free, or holds a delta and nothing else: it may be replaced."""
    with storage_errors(path):
        put_back(path)
        if not path.is_dir():
            return True
        names = {file.name for file in path.iterdir()}
    return not names or (names <= {TENSORS, FACTS, MANIFEST} and _has_manifest(path))


def _has_manifest(path: Path) -> bool:
    """Return whether the manifest in a folder is that of a delta."""
    file = path / MANIFEST
    return file.is_file() and f'"selectune/{KIND}"'.encode() in file.read_bytes()
