"""Writing: temp name, write, fsync, manifest last, fsync, rename, fsync of the parent.

Whatever kills the process, and at whatever instant, a result is the old one or the new one. An
older result is moved aside, the new one takes its name, the older one goes; a cut between the
first two steps is undone by the next reader or writer of that name.
"""

import errno
import os
import re
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from selectune.errors import StorageError
from selectune.files.disk import (
    MANIFEST,
    aside_path,
    exists,
    is_disk_state,
    is_temp_name,
    make_dirs,
    put_back,
    remove,
    remove_aside,
    remove_staging,
    sha256_file,
    staging_path,
    storage_error,
    storage_errors,
    sync_dir,
    sync_file,
    write_new,
)
from selectune.files.kill import KillPoint, kill_point
from selectune.files.manifest import Entry, Manifest, is_ours, is_safe_name, to_json
from selectune.files.tensors import AnyTensor, Table, table_to_bytes, tensors_to_bytes

_PROMOTE_ATTEMPTS = 3


class StagedDir:
    """A result in the making: write into it; it gets its name when the `with` block ends.

    Args:
        path: the temp folder. Others' writers (peft's `save_pretrained`) may write here too.
        meta: plain facts for the manifest; may be added to until the block ends.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        self.meta: dict[str, Any] = dict(meta)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one file and make it durable.

        Args:
            name: relative; `a/b.json` makes the folder `a`.
            data: its content.

        Raises:
            StorageError: the disk refuses, or the name leaves the folder or is taken.
        """
        if not is_safe_name(name):
            raise StorageError(
                f"a result cannot hold a file called {name!r}",
                why="names are relative, without .. and other than manifest.json",
            )
        path = self.path / name
        with storage_errors(path):
            make_dirs(path.parent)
            write_new(path, data)
        kill_point(KillPoint.STAGE_FILE_WRITTEN)

    def write_text(self, name: str, text: str) -> None:
        """Write one file as UTF-8; a lone surrogate, which UTF-8 cannot say, becomes `?`."""
        self.write_bytes(name, text.encode(errors="replace"))

    def write_json(self, name: str, value: object) -> None:
        """Write plain values as JSON with sorted keys; NaN and infinity are refused."""
        self.write_bytes(name, to_json(value, name))

    def write_table(self, name: str, table: Table) -> None:
        """Write a table as parquet."""
        self.write_bytes(name, table_to_bytes(table))

    def write_tensors(self, name: str, tensors: Mapping[str, AnyTensor]) -> None:
        """Write arrays or torch tensors, from any device, as safetensors."""
        self.write_bytes(name, tensors_to_bytes(tensors, name))


@contextmanager
def staged(path: Path, *, kind: str, meta: Mapping[str, Any]) -> Generator[StagedDir]:
    """Make a result folder that appears under its name complete, or not at all.

    Args:
        path: the name of the result. An older result of ours there is replaced; anything else
            is refused.
        kind: what it is; `open_dir` asks for the same word.
        meta: plain facts for the manifest; tuples come back as lists.

    Raises:
        StorageError: the disk refuses, or the name is taken by what is not ours.
        DataError: a value cannot be written as JSON, parquet or safetensors.
    """
    with storage_errors(path):
        make_dirs(path.parent)
        put_back(path)
        remove_aside(path)
        remove_staging(path)
        _refuse_foreign(path)
        stage = StagedDir(staging_path(path), meta)
        os.mkdir(stage.path)
    try:
        kill_point(KillPoint.STAGE_OPENED)
        try:
            yield stage
        except _foreign_errors() as error:
            # Others' writers fail with their own errors; a full disk is ours to explain.
            if cause := _disk_state(error):
                raise storage_error(cause, path, "write") from error
            raise
        seal(stage.path, kind=kind, meta=stage.meta)
        with storage_errors(path):
            _promote(stage.path, path)
    except BaseException:
        # Ctrl-C included. What cannot be removed now goes with the next write of this name.
        with suppress(OSError):
            remove(stage.path)
        raise
    kill_point(KillPoint.PROMOTE_DONE)


def seal(path: Path, *, kind: str, meta: Mapping[str, Any]) -> None:
    """Make every file of a folder durable and write its manifest, in place.

    For folders that others write under their final name, such as the Trainer's `checkpoint-N`:
    without a manifest they are not a result. Sealing again replaces the manifest.

    Args:
        path: the folder.
        kind: what it is.
        meta: plain facts for the manifest.

    Raises:
        StorageError: the disk refuses, or the folder holds a link or a device.
        DataError: `meta` cannot be written as JSON.
    """
    with storage_errors(path):
        remove_staging(path / MANIFEST)
        entries: dict[str, Entry] = {}
        for root, folders, names in os.walk(path, topdown=False):
            here = Path(root)
            for name in sorted([*names, *folders]):
                file = here / name
                found = os.lstat(file)
                if stat.S_ISREG(found.st_mode):
                    relative = file.relative_to(path).as_posix()
                    if relative != MANIFEST:
                        sync_file(file)
                        entries[relative] = Entry(found.st_size, sha256_file(file))
                elif not stat.S_ISDIR(found.st_mode):
                    raise StorageError(
                        f"{file.name} is not a plain file",
                        where=str(file),
                        why="a result holds plain files only, so that it can be moved and checked",
                    )
            sync_dir(here)
        for name in entries:
            if not is_safe_name(name):
                raise StorageError(f"a result cannot hold a file called {name!r}", where=str(path))
        kill_point(KillPoint.STAGE_FILES_SYNCED)
        temp = staging_path(path / MANIFEST)
        write_new(temp, Manifest(kind, entries, dict(meta)).to_bytes())
        os.replace(temp, path / MANIFEST)
        kill_point(KillPoint.STAGE_MANIFEST_WRITTEN)
        sync_dir(path)
        kill_point(KillPoint.STAGE_MANIFEST_SYNCED)


def refuse_other_result(path: Path, kind: str) -> None:
    """Refuse to replace a result of another kind, which `staged` would do.

    Raises:
        StorageError: there is one, or files of somebody else.
    """
    with storage_errors(path):
        put_back(path)
        file = path / MANIFEST
        is_same = file.is_file() and f'"selectune/{kind}"'.encode() in file.read_bytes()
        is_other = path.is_dir() and any(path.iterdir()) and not is_same
    if is_other:
        raise StorageError(
            f"{path.name} holds something else than a {kind}",
            where=str(path),
            why="writing the result would replace the whole folder",
            do="choose another output",
        )


def _refuse_foreign(path: Path) -> None:
    if not exists(path):
        return
    if not path.is_dir():
        raise StorageError(
            f"{path.name} is a file", where=str(path), do="move it, or choose another output"
        )
    if any(not is_temp_name(p.name) for p in path.iterdir()) and not is_ours(path):
        raise StorageError(
            f"{path.name} holds files that selectune did not write",
            where=str(path),
            why="writing the result would replace the whole folder",
            do="move the folder away, or choose another output",
        )


def _promote(temp: Path, path: Path) -> None:
    """Give a sealed folder its name."""
    for attempt in range(_PROMOTE_ATTEMPTS):
        try:
            if exists(path):
                os.rename(path, aside_path(path))
            kill_point(KillPoint.PROMOTE_OLD_MOVED)
            os.rename(temp, path)
            break
        except BaseException as error:
            # A reader that met the gap has put the older result back: move it aside again.
            if attempt + 1 < _PROMOTE_ATTEMPTS and _is_taken(error) and exists(path):
                continue
            with suppress(OSError):
                put_back(path)
            raise
    kill_point(KillPoint.PROMOTE_RENAMED)
    sync_dir(path.parent)
    # The new result is durable. What cannot be removed now goes with the next write of this name.
    with suppress(OSError):
        remove_aside(path)


def _is_taken(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Return what others' writers raise; looked up when something was raised, to import late."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _disk_state(error: Exception) -> OSError | None:
    """Return the error of the disk that another's writer ran into, None when it was none."""
    if not isinstance(error, OSError):
        # safetensors writes "I/O error: No space left on device (os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        error = OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError()
    return error if is_disk_state(error) else None
