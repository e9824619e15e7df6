"""A run folder as a whole: one writer at a time, no left-overs, enough room."""

import fcntl
import os
import shutil
import socket
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from selectune.errors import StorageError
from selectune.files.claims import NO_LOCKS
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

_SIGNING_TRIES, _SIGNING_SECONDS = 20, 0.1


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
def lock(path: Path, *, waits: bool = False, launch: str = "") -> Generator[None]:
    """Hold a run folder for this process: one writer at a time.

    The kernel drops the lock when the process ends, however it ends; the lock file stays.

    Args:
        path: the run folder; created when missing.
        waits: wait for other processes to leave it, instead of refusing.
        launch: the launch that this process leads, for others of it to read.

    Raises:
        StorageError: another process holds it, or the folder cannot be written.
    """
    fd = _open_lock(path)
    try:
        if not _take(fd, path, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB)):
            raise _in_use(fd, path)
        _sign(fd, path, f", leader of {launch}" if launch else "")
        yield
    finally:
        os.close(fd)


@contextmanager
def share(path: Path, *, launch: str = "") -> Generator[bool]:
    """Hold a run folder together with others that share its work, and keep its writer out.

    Args:
        path: the run folder; created when missing.
        launch: the launch that this process belongs to.

    Yields:
        Whether it is held; False where the leader of this launch already writes there alone,
        because nothing is left to share.

    Raises:
        StorageError: another process writes there, or the folder cannot be written.
    """
    fd = _open_lock(path)
    try:
        is_held = _join(fd, path, launch)
        if is_held:
            _sign(fd, path, ", which works with others")
        yield is_held
    finally:
        os.close(fd)


def _join(fd: int, path: Path, launch: str) -> bool:
    for _ in range(_SIGNING_TRIES if launch else 1):
        if _take(fd, path, fcntl.LOCK_SH | fcntl.LOCK_NB):
            return True
        if launch and _holder(fd).endswith(f", leader of {launch}"):
            return False
        if launch:  # a writer signs a moment after it has the lock
            time.sleep(_SIGNING_SECONDS)
    raise _in_use(fd, path)


def _open_lock(path: Path) -> int:
    with storage_errors(path):
        make_dirs(path)
        return os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _take(fd: int, path: Path, how: int) -> bool:
    """Return whether the lock was free; on a file system without locks it always is."""
    with storage_errors(path):
        try:
            fcntl.flock(fd, how)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{path} lies on a file system without locks: "
                "see to it that one process at a time writes there",
                stacklevel=5,
            )
    return True


def _sign(fd: int, path: Path, more: str) -> None:
    with storage_errors(path):
        os.ftruncate(fd, 0)
        text = f"process {os.getpid()} on {socket.gethostname()}{more}\n"
        # At the start, wherever others that share the folder have written.
        os.lseek(fd, 0, os.SEEK_SET)
        write_all(fd, text.encode())


def _holder(fd: int) -> str:
    return os.pread(fd, 300, 0).decode(errors="replace").strip()


def _in_use(fd: int, path: Path) -> StorageError:
    return StorageError(
        f"{path.name or path} is in use by another process",
        where=str(path),
        why=f"the lock is held by {_holder(fd) or 'a process that has just started'}",
        do="wait until it is done, or give this run another output folder",
    )
