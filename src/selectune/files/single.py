"""Single files, replaced as a whole."""

import os
from contextlib import suppress
from pathlib import Path

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
