"""Parts of one work, shared by processes: each part is done by one of them at a time.

A part is claimed by a lock on one byte of the claim file; which byte, the hash of its name says.
The kernel drops the lock when the process ends, however it ends, so nobody has to notice a death:
the part is free again.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

from selectune.errors import StorageError
from selectune.files.disk import storage_errors

CLAIMS = ".claims"
"""The claim file of a run's or a grid's folder."""

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system answers that knows no locks."""

_BUSY = (errno.EACCES, errno.EAGAIN)


@runtime_checkable
class Hands(Protocol):
    """Who does which part of a work."""

    @property
    def waits(self) -> bool:
        """Whether to stay until parts that others hold are done or free again."""
        ...

    @property
    def name(self) -> str:
        """What this process is called beside what it cost; "" where it is the only one."""
        ...

    @property
    def waited(self) -> float:
        """Seconds so far in which this process waited for others."""
        ...

    def turn(self, part: str, is_done: Callable[[], bool]) -> AbstractContextManager[None]:
        """Wait until nobody else holds a part that all need, and hold it.

        Args:
            part: its name.
            is_done: whether nothing is left to do for it.
        """
        ...

    def claim(self, part: str, number: int) -> AbstractContextManager[bool]:
        """Hold a part if it is ours to do; yield whether it is.

        Args:
            part: its name.
            number: its place among the parts that are dealt out, from 0.
        """
        ...


class Alone:
    """One process that does everything."""

    waits = False
    name = ""
    waited = 0.0

    def turn(self, part: str, is_done: Callable[[], bool]) -> AbstractContextManager[None]:
        """Hold a part that nobody else wants."""
        return nullcontext()

    def claim(self, part: str, number: int) -> AbstractContextManager[bool]:
        """Hold a part that nobody else wants."""
        return nullcontext(True)


class Crew:
    """One of several processes at the same work.

    A process must have one crew per file: closing any handle of the file drops its locks.

    Args:
        file: where claims lie, in a folder that all processes see; made when missing, left behind.
        index: which of the processes this is, from 0.
        n: how many there are.
        is_fixed: do the parts whose number leaves `index` when divided by `n`, instead of any that
            is free.
        waits: stay until parts that others hold are done or free again.
        instead: what a person can do on a file system without locks, where parts cannot go to
            whoever is free.

    Raises:
        StorageError: the file cannot be made; or parts are to go to whoever is free, on a file
            system without locks.
    """

    def __init__(
        self, file: Path, *, index: int, n: int, is_fixed: bool, waits: bool, instead: str = ""
    ) -> None:
        self._file, self._index, self._n, self._is_fixed = file, index, n, is_fixed
        self.waits, self.name, self.waited = waits, f"{index + 1}-of-{n}", 0.0
        with storage_errors(file):
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._has_locks = self._knows_locks()
        if not (self._has_locks or is_fixed):
            self.close()
            raise StorageError(
                "processes cannot share a folder that knows no locks",
                where=str(file.parent),
                why="nothing tells one process what another has taken",
                do=instead,
            )

    def close(self) -> None:
        """Give the file back, and with it whatever is held."""
        os.close(self._fd)

    @contextmanager
    def turn(self, part: str, is_done: Callable[[], bool]) -> Generator[None]:
        """Wait until nobody else holds a part that all need, and hold it.

        Raises:
            StorageError: on a file system without locks, by another than the first process: the
                part is not done.
        """
        if not self._has_locks and self._index > 0 and not is_done():
            raise StorageError(
                f"{part} is not there yet",
                where=str(self._file.parent),
                why="the folder knows no locks, so the first shard alone makes what all need",
                do=f"run --shard 1/{self._n} to its end, then this one",
            )
        byte = _byte(part)
        start = time.perf_counter()
        self._lock(fcntl.LOCK_EX, byte)
        self.waited += time.perf_counter() - start
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, byte)

    @contextmanager
    def claim(self, part: str, number: int) -> Generator[bool]:
        """Hold a part if it is ours to do and nobody else holds it; yield whether it is."""
        if self._is_fixed and number % self._n != self._index:
            yield False
            return
        byte = _byte(part)
        try:
            self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, byte)
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            yield False
            return
        try:
            yield True
        finally:
            self._lock(fcntl.LOCK_UN, byte)

    def _knows_locks(self) -> bool:
        byte = _byte("")
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, byte)
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
        return True

    def _lock(self, how: int, byte: int) -> None:
        if self._has_locks:
            fcntl.lockf(self._fd, how, 1, byte)


def _byte(part: str) -> int:
    # 56 bits: two parts of one byte would only wait for each other, and hardly ever are.
    return int.from_bytes(hashlib.sha256(part.encode()).digest()[:7])
