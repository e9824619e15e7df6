"""A pass shared by processes leaves the bytes of one that was not, whoever dies on the way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CREW = Path(__file__).parent / "crew.py"
Round = list[dict[str, Any]]


def crew(n: int, **more: bool) -> Round:
    """Return the processes of a launch."""
    return [{"index": k, "n": n, "is_fixed": False, "waits": k == 0, **more} for k in range(n)]


def shard(i: int, n: int) -> dict[str, Any]:
    """Return the process that `--shard i/n` is."""
    return {"index": i - 1, "n": n, "is_fixed": True, "waits": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crew")


@pytest.fixture(scope="module")
def rounds(folder: Path) -> dict[str, list[Round]]:
    """Run every case, all in one child process: its imports take longer than the work."""
    survivor, victim = crew(2)
    cases: dict[str, list[tuple[Round, bool]]] = {
        "alone": [([{}], False)],
        "two": [(crew(2), True)],
        "three": [(crew(3), True)],
        # The targets first, so that the victim's files are those of shards.
        "dies": [
            ([shard(99, 99)], False),
            ([{**victim, "dies": True}, {**survivor, "outlives": True}], False),
        ],
        "by_hand": [([shard(i, 3)], False) for i in (3, 1, 2)] + [([{}], False)],
        "one_missing": [([shard(i, 3)], False) for i in (2, 3)] + [([{}], False)],
        "twice": [([shard(1, 2), shard(1, 2)], False), ([{}], False)],
    }
    jobs = [(str(folder / name), *one) for name, case in cases.items() for one in case]
    done = subprocess.run(
        [sys.executable, str(CREW)], input=json.dumps(jobs), capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = iter(json.loads(done.stdout))
    return {name: [next(results) for _ in case] for name, case in cases.items()}


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted((path / "store").rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("name", ["two", "three", "dies", "by_hand", "one_missing", "twice"])
def test_the_store_of_many_is_that_of_one(
    folder: Path, rounds: dict[str, list[Round]], name: str
) -> None:
    assert rounds["alone"][0][0]["n"] >= 4
    assert contents(folder / name) == contents(folder / "alone")


@pytest.mark.parametrize("name", ["two", "three", "by_hand", "one_missing", "twice"])
def test_no_shard_is_computed_twice(rounds: dict[str, list[Round]], name: str) -> None:
    processes = [one for ended in rounds[name] for one in ended]
    assert {one["code"] for one in processes} == {0}
    assert sum(one["n_computed"] for one in processes) == processes[0]["n"]


@pytest.mark.parametrize("name", ["two", "three"])
def test_every_process_of_a_launch_takes_what_is_free(
    rounds: dict[str, list[Round]], name: str
) -> None:
    assert min(one["n_computed"] for one in rounds[name][0]) >= 1
    assert rounds[name][0][0]["n_done"] == rounds[name][0][0]["n"]  # the leader waited


def test_what_a_killed_process_had_finished_is_kept_and_the_rest_taken_over(
    rounds: dict[str, list[Round]],
) -> None:
    victim, survivor = rounds["dies"][1]
    assert victim["code"] == -9
    assert survivor["n_computed"] == survivor["n"] - 1  # all but the one that was finished
    assert survivor["n_done"] == survivor["n"]


def test_a_shard_by_hand_is_every_nth_and_no_more(rounds: dict[str, list[Round]]) -> None:
    third, first, second, last = (ended[0] for ended in rounds["by_hand"])
    n = last["n"]
    assert third["n_computed"] == len(range(2, n, 3))
    assert first["n_done"] == third["n_computed"] + len(range(0, n, 3))
    assert second["n_done"] == n
    assert last["n_computed"] == 0
