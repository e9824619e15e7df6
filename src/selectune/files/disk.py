"""The few calls that touch the disk: everything above reaches files through these.

Only functions of `os` are used for writing, so that tests can make the N-th call fail and can
record what was synced. A Python file object would hide both.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from selectune.errors import CorruptFileError, StorageError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_STAGING = re.compile(r"\.(?P<name>.+)\.staging-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.(?P<name>.+)\.replaced")
_FULL = "free some space, or choose an output on another disk; then run the same command again"
_ADVICE = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("the quota of this user is used up", _FULL),
    errno.EFBIG: ("the file would be larger than the system allows here", _FULL),
    errno.EROFS: ("the file system is read-only", "choose an output folder that can be written"),
    errno.EACCES: ("permission denied", "change its rights, or choose another output folder"),
    errno.EPERM: ("not permitted", "change its rights, or choose another output folder"),
    errno.EIO: ("the device reports an input/output error", "check the disk, then run it again"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another output folder"),
    errno.EEXIST: ("a file of that name is in the way", "move it, or choose another output"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter path"),
    errno.ELOOP: ("a symbolic link is in the way", "give the real path"),
    errno.ENOENT: (
        "it vanished, or its folder did, while in use",
        "see that no other process cleans or uses this folder, then run it again",
    ),
}
_DISK_STATE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


def storage_error(error: OSError, path: Path, doing: str) -> StorageError:
    """Return the failure of the system as one of ours, saying what to do about it."""
    why, do = _ADVICE.get(error.errno or 0, (error.strerror or str(error), "look at the path"))
    name = errno.errorcode.get(error.errno or 0, "OSError")
    what = f"cannot {doing} {path.name or path}"
    return StorageError(what, where=str(path), why=f"{why} ({name})", do=do)


@contextmanager
def storage_errors(path: Path, doing: str = "write") -> Generator[None]:
    """Turn every OSError of the block into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, doing) from error


def is_disk_state(error: OSError) -> bool:
    """Return whether the disk, not the path, is the reason: full, over quota, read-only, broken."""
    return error.errno in _DISK_STATE


def staging_path(path: Path) -> Path:
    """Return a fresh temp name beside `path`; never reused, so that two writers cannot mix."""
    return path.with_name(f".{path.name}.staging-{secrets.token_hex(4)}")


def aside_path(path: Path) -> Path:
    """Return where the older result waits while a new one takes the name of `path`."""
    return path.with_name(f".{path.name}.replaced")


def is_temp_name(name: str) -> bool:
    """Return whether a file name is one that only an unfinished write leaves behind."""
    return bool(_STAGING.fullmatch(name) or _REPLACED.fullmatch(name))


def replaced_name(name: str) -> str:
    """Return whose older result a name holds, "" when it is no such name."""
    found = _REPLACED.fullmatch(name)
    return found["name"] if found else ""


def exists(path: Path) -> bool:
    """Return whether the name is taken, be it by a dangling link."""
    return os.path.lexists(path)


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable, where the file system knows how to."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder, and say so in this way.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable that somebody else wrote."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Create a folder and its parents, each durable in the one above it."""
    if path.is_dir():
        return
    make_dirs(path.parent)
    with suppress(FileExistsError):
        os.mkdir(path)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    sync_dir(path.parent)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte: one call of the system may take fewer than it was given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_new(path: Path, data: bytes) -> None:
    """Write a file under a name that is free, and make its bytes durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def share_file(source: Path, to: Path) -> None:
    """Give a file a second name, or a copy where the file system has no second names.

    Raises:
        StorageError: neither can be made.
    """
    with storage_errors(to):
        to.unlink(missing_ok=True)
        try:
            os.link(source, to)
        except OSError:
            shutil.copyfile(source, to)


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder stops being a result with the first name it loses."""
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            os.unlink(path / MANIFEST)
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def remove_staging(path: Path) -> None:
    """Remove what killed writers of `path` left beside it."""
    if not path.parent.is_dir():
        return
    with os.scandir(path.parent) as entries:
        names = [e.name for e in entries]
    for name in names:
        found = _STAGING.fullmatch(name)
        if found and found["name"] == path.name:
            remove(path.with_name(name))


def put_back(path: Path) -> None:
    """Undo a promotion of `path` that was cut off half way; nothing is lost or deleted by it."""
    aside = aside_path(path)
    if not exists(path) and (aside / MANIFEST).is_file():
        # Another process may be doing the same.
        with suppress(FileNotFoundError):
            os.rename(aside, path)
        sync_dir(path.parent)


def remove_aside(path: Path) -> None:
    """Remove the older result that a promotion of `path` moved aside."""
    aside = aside_path(path)
    if exists(aside):
        # First the new name must be durable: else a power cut brings back the old name, emptied.
        sync_dir(path.parent)
        remove(aside)


def read_file(path: Path, *, limit_bytes: int | None = None) -> bytes:
    """Read a regular file, never through a link and never a pipe that would wait for ever.

    Raises:
        CorruptFileError: it is missing, is no regular file, or is larger than the limit.
        StorageError: the system refuses to read it.
    """
    fd, size = _open_regular(path)
    with storage_errors(path, "read"), os.fdopen(fd, "rb", buffering=0) as file:
        if limit_bytes is not None and size > limit_bytes:
            raise CorruptFileError(
                f"{path.name} has {size} bytes, expected at most {limit_bytes}", where=str(path)
            )
        return file.read()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a regular file as hex, reading it in pieces.

    Raises:
        CorruptFileError: it is missing or no regular file.
        StorageError: the system refuses to read it.
    """
    fd, _ = _open_regular(path)
    with storage_errors(path, "read"), os.fdopen(fd, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _open_regular(path: Path) -> tuple[int, int]:
    with storage_errors(path, "read"):
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptFileError(f"{path.name} is missing", where=str(path)) from None
        if not stat.S_ISREG(found.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
            raise CorruptFileError(
                f"{path.name} is {kind}", where=str(path), why="results hold plain files only"
            )
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    return fd, found.st_size
