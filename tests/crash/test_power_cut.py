import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crash.scenario import observe, scenario, tree
from selectune.files import KillPoint, disk, kill_point, rundir, single, stage

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")

Names = dict[int, dict[str, int]]


class Recorder:
    """Know at every instant what a disk holds for sure: what was synced, and nothing else.

    A file is its bytes at its last fsync, a folder its names at its last fsync. Numbers of inodes
    must not be used again while we watch, so each is held open until the end.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes: dict[int, bytes] = {}
        self.names: Names = {}
        self.moments: list[tuple[dict[int, bytes], Names, Names]] = []
        self._held: dict[int, int] = {}
        self._real: dict[str, Callable[..., Any]] = {}
        for folder in [root, *(p for p in root.rglob("*"))]:
            self._hold(folder)
            self._sync(folder)
        self._remember()

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            result = real(*args, **kwargs)
            with self._unwatched():
                if name == "open":
                    self._hold(Path(f"/proc/self/fd/{result}"))
                elif name == "mkdir":
                    self._hold(Path(args[0]))
                elif name == "fsync":
                    self._sync(Path(f"/proc/self/fd/{args[0]}"))
                self._remember()
            return result

        self._real[name] = real
        return call

    def rebuild(self, moment: int, target: Path, *, names_kept: bool) -> None:
        """Make the folder that a machine finds after a power cut.

        Names may be older than bytes or newer: `names_kept` takes every name there was, synced or
        not, with the synced bytes only, as a file system with delayed allocation may leave it.
        """
        held, synced, current = self.moments[moment]
        names = current if names_kept else synced

        def place(inode: int, path: Path) -> None:
            for name, child in names.get(inode, {}).items():
                if child in self._folders:
                    (path / name).mkdir()
                    place(child, path / name)
                else:
                    (path / name).write_bytes(held.get(child, b""))

        target.mkdir()
        place(self.root.stat().st_ino, target)

    def close(self) -> None:
        for fd in self._held.values():
            os.close(fd)

    @property
    def _folders(self) -> set[int]:
        return {i for i, fd in self._held.items() if stat.S_ISDIR(os.fstat(fd).st_mode)}

    def _hold(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)

    def _sync(self, path: Path) -> None:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            for entry in path.iterdir():
                self._hold(entry)  # others' files are opened out of our sight
            self.names[found.st_ino] = {e.name: e.stat().st_ino for e in path.iterdir()}
        else:
            self.bytes[found.st_ino] = path.read_bytes()

    def _remember(self) -> None:
        current = {
            p.stat().st_ino: {e.name: e.stat().st_ino for e in p.iterdir()}
            for p in [self.root, *self.root.rglob("*")]
            if p.is_dir()
        }
        for path in self.root.rglob("*"):
            self._hold(path)
        self.moments.append((dict(self.bytes), dict(self.names), current))

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        watched = {name: getattr(os, name) for name in self._real}
        for name, real in self._real.items():
            setattr(os, name, real)
        try:
            yield
        finally:
            for name, call in watched.items():
                setattr(os, name, call)


class KilledError(BaseException):
    """Stands for a kill: raised where no clean-up is left to run."""


def record(root: Path, generation: int, *, kill_after_rename: bool = False) -> Recorder:
    recorder = Recorder(root)

    def kill(point: KillPoint) -> None:
        if point is KillPoint.PROMOTE_RENAMED:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, recorder.wrap(name, getattr(os, name)))
        if kill_after_rename:
            patch.setattr(stage, "kill_point", kill)
            with pytest.raises(KilledError):
                scenario(root, generation)
            patch.setattr(stage, "kill_point", kill_point)
        scenario(root, generation)
    return recorder


@pytest.mark.parametrize("kill_after_rename", [False, True], ids=["unbroken", "killed before"])
@pytest.mark.parametrize("names_kept", [False, True], ids=["names lost", "names kept"])
@pytest.mark.parametrize("starts_with_older", [False, True], ids=["fresh", "replacing"])
def test_after_a_power_cut_a_result_is_old_or_new(
    starts_with_older: bool,
    names_kept: bool,
    kill_after_rename: bool,
    fast_dir: Path,
    undisturbed: dict[str, bytes],
) -> None:
    root = fast_dir / "root"
    root.mkdir()
    if starts_with_older:
        scenario(root, 1)
    old = observe(root)
    recorder = record(root, 2, kill_after_rename=kill_after_rename)
    newest = 0
    for moment in range(len(recorder.moments)):
        found = fast_dir / "found"
        recorder.rebuild(moment, found, names_kept=names_kept)
        result, file = observe(found)
        assert result in (old[0], 2)
        assert file in (old[1], 2)
        assert result >= newest, "a result that was there went away again"
        newest = result
        scenario(found, 2)
        assert tree(found) == undisturbed
        shutil.rmtree(found)
    recorder.close()
    assert newest == 2


def test_what_a_finished_writer_wrote_is_there_after_a_power_cut(
    fast_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    root = fast_dir / "root"
    root.mkdir()
    recorder = record(root, 2)
    recorder.rebuild(-1, fast_dir / "found", names_kept=False)
    recorder.close()
    assert tree(fast_dir / "found") == undisturbed


@pytest.mark.parametrize("forgotten", ["sync_dir", "sync_file", "fsync in write_new"])
def test_the_recorder_notices_a_forgotten_fsync(
    forgotten: str, fast_dir: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fast_dir / "root"
    root.mkdir()
    if forgotten == "fsync in write_new":

        def write_unsynced(path: Path, data: bytes) -> None:
            path.write_bytes(data)

        for module in (stage, single):
            monkeypatch.setattr(module, "write_new", write_unsynced)
    else:
        for module in (disk, rundir, single, stage):
            if forgotten in vars(module):
                monkeypatch.setattr(module, forgotten, lambda path: None)
    recorder = record(root, 2)
    recorder.rebuild(-1, fast_dir / "found", names_kept=False)
    recorder.close()
    assert tree(fast_dir / "found") != undisturbed
