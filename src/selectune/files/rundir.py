"""A run folder as a whole: one writer at a time, no left-overs, enough room."""

import errno
import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from selectune.errors import StorageError
from selectune.files.disk import (
    exists,
    is_temp_name,
    make_dirs,
    put_back,
    remove,
    remove_aside,
    replaced_name,
    storage_errors,
    write_all,
)


def sweep(path: Path) -> list[Path]:
    """Remove the temp names that killed writers left anywhere under a run folder.

    Only to be called by the one writer of the folder (`lock`): a living writer's temp names
    look the same.

    Args:
        path: the run folder; nothing happens when it is missing.

    Returns:
        The names that were removed, or that were put back as the older result they hold.
    """
    found: list[Path] = []
    with storage_errors(path, "clean"):
        for root, folders, files in os.walk(path):
            here = Path(root)
            for name in [n for n in (*folders, *files) if is_temp_name(n)]:
                found.append(here / name)
                older_of = replaced_name(name)
                if older_of:
                    put_back(here / older_of)
                    remove_aside(here / older_of)
                elif exists(here / name):
                    remove(here / name)
            folders[:] = [n for n in folders if not is_temp_name(n)]
    return found


def check_free_space(path: Path, n_bytes: int) -> None:
    """Refuse work whose result would not fit on the disk.

    Args:
        path: where it will be written; need not exist yet.
        n_bytes: how much will be written.

    Raises:
        StorageError: fewer bytes are free for this user.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    with storage_errors(path, "measure the disk of"):
        free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise StorageError(
            f"{_size(n_bytes)} are needed on disk, {_size(free)} are free",
            where=str(place),
            why="the work would stop half way with a full disk",
            do="free some space, or choose an output on another disk",
        )


def _size(n_bytes: int) -> str:
    size, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


@contextmanager
def lock(path: Path) -> Generator[None]:
    """Hold a run folder for this process: one writer at a time.

    The kernel drops the lock when the process ends, however it ends; the lock file stays.

    Args:
        path: the run folder; created when missing.

    Raises:
        StorageError: another process holds it, or the folder cannot be written.
    """
    with storage_errors(path):
        make_dirs(path)
        fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with storage_errors(path):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                raise StorageError(
                    f"{path.name or path} is in use by another process",
                    where=str(path),
                    why=f"the lock is held by {holder or 'a process that has just started'}",
                    do="wait until it is done, or give this run another output folder",
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                warnings.warn(
                    f"{path} lies on a file system without locks: "
                    "see to it that one process at a time writes there",
                    stacklevel=3,
                )
            os.ftruncate(fd, 0)
            write_all(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(fd)
