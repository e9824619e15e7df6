"""Reading: every byte is checked against the manifest before a parser sees it."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from selectune.errors import CorruptFileError
from selectune.files.disk import MANIFEST, exists, put_back, read_file, sha256_file, storage_errors
from selectune.files.manifest import Manifest, corrupt, parse_json, read_manifest
from selectune.files.tensors import (
    Array,
    Schema,
    Table,
    Torch,
    table_from_bytes,
    tensors_from_bytes,
    torch_from_bytes,
)


class Opened:
    """A finished result; `open_dir` makes one."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.kind = manifest.kind
        self.meta: dict[str, Any] = manifest.meta
        self._files = manifest.files

    @property
    def names(self) -> tuple[str, ...]:
        """The files of the result, sorted; others in the folder do not belong to it."""
        return tuple(sorted(self._files))

    def read_bytes(self, name: str) -> bytes:
        """Return one file.

        Raises:
            CorruptFileError: the result has no such file, or it is not what the manifest says.
        """
        if name not in self._files:
            raise CorruptFileError(
                f"this result has no file {name!r}",
                where=str(self.path),
                why=f"its files are {', '.join(self.names) or 'none'}",
            )
        entry, path = self._files[name], self.path / name
        data = read_file(path, limit_bytes=entry.n_bytes)
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.sha256:
            raise corrupt(path, f"sha256 {entry.sha256}", digest)
        return data

    def read_text(self, name: str) -> str:
        """Return one file as UTF-8 text."""
        try:
            return self.read_bytes(name).decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path / name, "UTF-8 text", str(error)) from None

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        """Return the value of a JSON file; a key that stands twice and NaN are refused."""
        return parse_json(self.read_bytes(name), self.path / name)

    def read_table(self, name: str, *, schema: Schema | None = None) -> Table:
        """Return a table.

        Args:
            name: a parquet file.
            schema: columns and types that it must have; further columns are let through.
        """
        return table_from_bytes(self.read_bytes(name), self.path / name, schema)

    def read_tensors(self, name: str, *, expect: Collection[str] | None = None) -> dict[str, Array]:
        """Return the arrays of a safetensors file; bfloat16 comes widened to float32, exactly.

        Args:
            name: the file.
            expect: the tensors that it must hold, all of them and no others.
        """
        path = self.path / name
        arrays = tensors_from_bytes(self.read_bytes(name), path)
        if expect is not None and set(arrays) != set(expect):
            raise corrupt(path, f"tensors {sorted(expect)}", f"{sorted(arrays)}")
        return arrays

    def read_torch(self, name: str) -> dict[str, Torch]:
        """Return the tensors of a safetensors file as torch tensors on the CPU, types kept."""
        return torch_from_bytes(self.read_bytes(name), self.path / name)


def open_dir(path: Path, *, kind: str) -> Opened:
    """Open a finished result and check every file of it.

    Args:
        path: the folder that `staged` or `seal` made.
        kind: what it should be.

    Raises:
        CorruptFileError: it is missing, unfinished, of another kind, or a byte is not as written.
        IncompatibleRunError: a newer selectune wrote it.
        StorageError: the system refuses to read it.
    """
    with storage_errors(path, "read"):
        put_back(path)
    manifest = read_manifest(path, kind)
    with storage_errors(path, "read"):
        root = path.resolve()
        for name, entry in manifest.files.items():
            file = path / name
            if file.parent.resolve() != (root / name).parent:
                raise CorruptFileError(
                    f"{name} lies behind a symbolic link",
                    where=str(file),
                    why="results hold plain files only",
                )
            # Size first: it is free, and most damage shows in it.
            if file.is_file() and file.stat().st_size != entry.n_bytes:
                raise corrupt(file, f"{entry.n_bytes} bytes", f"{file.stat().st_size}")
            digest = sha256_file(file)
            if digest != entry.sha256:
                raise corrupt(file, f"sha256 {entry.sha256}", digest)
    return Opened(path, manifest)


def is_complete(path: Path, kind: str) -> bool:
    """Return whether a finished result stands under this name, checked in every byte.

    Args:
        path: the folder; False when it is missing or has no manifest.
        kind: what it should be.

    Raises:
        CorruptFileError: it has a manifest, and something is not as that says.
        IncompatibleRunError: a newer selectune wrote it.
    """
    with storage_errors(path, "read"):
        put_back(path)
    if not exists(path / MANIFEST):
        return False
    open_dir(path, kind=kind)
    return True
