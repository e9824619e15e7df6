import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crash.scenario import observe, scenario, tree
from selectune.errors import StorageError

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


class Faults:
    """Make the N-th call to the system fail, or all from the N-th on.

    `short` writes half and says so, as the system may; `torn` writes half and then fails.
    """

    def __init__(self, at: int, mode: str, *, for_good: bool) -> None:
        self.at, self.mode, self.for_good = at, mode, for_good
        self.n_calls = 0
        self.failed: list[str] = []

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self.n_calls += 1
            hit = self.n_calls >= self.at if self.for_good else self.n_calls == self.at
            if not hit:
                return real(*args, **kwargs)
            self.failed.append(name)
            if self.mode in ("short", "torn"):
                if name == "write":
                    fd, data = args
                    written = real(fd, data[: max(1, len(data) // 2)])
                    if self.mode == "short":
                        return written
                elif self.mode == "short":
                    return real(*args, **kwargs)
            number = errno.EIO if self.mode == "EIO" else errno.ENOSPC
            raise OSError(number, os.strerror(number))

        return call


@pytest.mark.parametrize("starts_with_older", [False, True], ids=["fresh", "replacing"])
@pytest.mark.parametrize(
    ("mode", "for_good"),
    [("ENOSPC", False), ("ENOSPC", True), ("EIO", False), ("short", True), ("torn", False)],
)
def test_whichever_call_fails_a_result_is_old_or_new_and_the_error_is_ours(
    mode: str,
    for_good: bool,
    starts_with_older: bool,
    fast_dir: Path,
    undisturbed: dict[str, bytes],
) -> None:
    start = fast_dir / "start"
    start.mkdir()
    if starts_with_older:
        scenario(start, 1)
    old = observe(start)
    reached: set[str] = set()
    n_errors = 0
    for at in range(1, 1000):
        root = fast_dir / "root"
        shutil.copytree(start, root)
        faults = Faults(at, mode, for_good=for_good)
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, faults.wrap(name, getattr(os, name)))
            try:
                scenario(root, 2)
            except StorageError:
                n_errors += 1
        reached.update(faults.failed)
        result, single = observe(root)
        assert result in (old[0], 2)
        assert single in (old[1], 2)
        scenario(root, 2)
        assert tree(root) == undisturbed
        shutil.rmtree(root)
        if not faults.failed:
            break
    else:
        pytest.fail("no run got through untouched")
    assert {"open", "write", "fsync", "replace", "rename", "mkdir"} <= reached
    if starts_with_older:
        assert {"unlink", "rmdir"} <= reached
    assert (n_errors == 0) == (mode == "short")


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "denied"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_the_error_says_what_is_wrong_with_the_disk_and_where(
    number: int, word: str, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match=word) as caught:
        scenario(fast_dir / "root", 1)
    assert "root" in caught.value.where
    assert caught.value.do
