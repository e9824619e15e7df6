"""Single files, replaced as a whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from selectune.files.disk import (
    make_dirs,
    remove,
    remove_staging,
    staging_path,
    storage_errors,
    sync_dir,
    write_new,
)
from selectune.files.kill import KillPoint, kill_point

if TYPE_CHECKING:
    from pyarrow import Table


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


def write_parquet(path: Path, table: Table) -> None:
    """Write a table that people open with their own tools, as `write_file` does.

    Raises:
        StorageError: the disk refuses.
    """
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    write_file(path, sink.getvalue().to_pybytes())
