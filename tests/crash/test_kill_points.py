import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crash.scenario import observe, scenario, tree
from selectune.files import CRASH_AT, KillPoint

WRITER_POINTS = [p for p in KillPoint if p.partition(".")[0] in ("stage", "promote")]
EXIT_CODES = {"KILL": -9, "TERM": 130, "INT": 130}


@pytest.mark.parametrize("starts_with_older", [False, True], ids=["fresh", "replacing"])
@pytest.mark.parametrize("sign", sorted(EXIT_CODES))
@pytest.mark.parametrize("point", WRITER_POINTS)
def test_after_a_signal_a_result_is_old_or_new_and_a_rerun_ends_as_if_undisturbed(
    point: KillPoint,
    sign: str,
    starts_with_older: bool,
    child: Callable[..., dict],
    fast_dir: Path,
    undisturbed: dict[str, bytes],
) -> None:
    start = fast_dir / "start"
    start.mkdir()
    if starts_with_older:
        scenario(start, 1)
    old = observe(start)
    count = 0
    while True:
        count += 1
        root = fast_dir / str(count)
        shutil.copytree(start, root)
        done = child(root, 2, {CRASH_AT: f"{point}:{count}:{sign}"})
        if done["code"] == 0:
            break
        assert done["code"] == EXIT_CODES[sign], done["message"]
        result, single = observe(root)
        assert result in (old[0], 2)
        assert single in (old[1], 2)
        again = child(root, 2)
        assert again["code"] == 0, again["message"]
        assert tree(root) == undisturbed
    assert count > 1, f"the scenario never passes {point}"


def test_two_crashes_in_a_row_are_no_worse_than_one(
    child: Callable[..., dict], fast_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    scenario(fast_dir / "start", 1)
    points = [
        KillPoint.STAGE_FILE_WRITTEN,
        KillPoint.PROMOTE_OLD_MOVED,
        KillPoint.PROMOTE_RENAMED,
    ]
    for first in points:
        for second in points:
            root = fast_dir / f"{first}-{second}"
            shutil.copytree(fast_dir / "start", root)
            for point in (first, second):
                child(root, 2, {CRASH_AT: f"{point}:1:KILL"})
                assert observe(root)[0] in (1, 2)
            assert child(root, 2)["code"] == 0
            assert tree(root) == undisturbed


def test_a_kill_leaves_the_lock_free(child: Callable[..., dict], fast_dir: Path) -> None:
    assert child(fast_dir, 1, {CRASH_AT: "stage.opened:1:KILL"})["code"] == -9
    assert child(fast_dir, 1)["code"] == 0


@pytest.mark.parametrize(
    "wish", ["stage.opend:1:KILL", "stage.opened:0:KILL", "stage.opened:1:HUP", "stage.opened"]
)
def test_a_wish_that_names_nothing_is_refused(
    wish: str, child: Callable[..., dict], fast_dir: Path
) -> None:
    done = child(fast_dir, 1, {CRASH_AT: wish})
    assert done["code"] == 1
    assert done["message"].startswith("ConfigError")
