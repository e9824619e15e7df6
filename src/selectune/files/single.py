"""Single files: replaced as a whole, or grown by whole lines."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from selectune.errors import CorruptFileError, DataError
from selectune.files.disk import (
    exists,
    make_dirs,
    read_file,
    remove,
    remove_staging,
    staging_path,
    storage_errors,
    sync_dir,
    write_all,
    write_new,
)
from selectune.files.kill import KillPoint, kill_point
from selectune.files.manifest import parse_json


def write_file(path: Path, data: bytes) -> None:
    """Write one file that is the old one or the new one at every instant.

    Raises:
        StorageError: the disk refuses.
    """
    with storage_errors(path):
        make_dirs(path.parent)
        remove_staging(path)
        temp = staging_path(path)
        try:
            write_new(temp, data)
            kill_point(KillPoint.STAGE_FILE_WRITTEN)
            os.replace(temp, path)
            sync_dir(path.parent)
        except BaseException:
            with suppress(OSError):
                remove(temp)
            raise


def append_line(path: Path, value: object) -> None:
    """Add one JSON object to a file of lines: all of the line is there afterwards, or none.

    A line that an earlier crash cut off is dropped first.

    Raises:
        StorageError: the disk refuses; the file is as it was.
        DataError: JSON cannot say the value.
    """
    try:
        line = json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        what = f"a line of {path.name} cannot be written as JSON"
        raise DataError(what, why=str(error), do="use plain, finite values") from error
    with storage_errors(path):
        is_new = not exists(path)
        if is_new:
            make_dirs(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            n_bytes = _drop_cut_off_line(fd)
            try:
                write_all(fd, line)
                os.fsync(fd)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(fd, n_bytes)
                raise
        finally:
            os.close(fd)
        if is_new:
            sync_dir(path.parent)
    kill_point(KillPoint.LINE_APPENDED)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects that `append_line` wrote; a last line that a crash cut off is left out.

    Raises:
        CorruptFileError: a whole line is not a JSON object.
        StorageError: the system refuses to read it.
    """
    if not exists(path):
        return []
    lines = read_file(path).split(b"\n")[:-1]
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line, path)
        except CorruptFileError as error:
            raise CorruptFileError(
                f"line {number} of {path.name} is damaged", where=f"{path}:{number}", why=error.why
            ) from None
        if not isinstance(value, dict):
            raise CorruptFileError(
                f"line {number} of {path.name} is not a JSON object", where=f"{path}:{number}"
            )
        found.append(cast("dict[str, Any]", value))
    return found


def _drop_cut_off_line(fd: int) -> int:
    """Cut the file after its last whole line and return its size."""
    size = os.fstat(fd).st_size
    end = size
    while end and os.pread(fd, 1, end - 1) != b"\n":
        end -= 1
    if end != size:
        os.ftruncate(fd, end)
    return end
