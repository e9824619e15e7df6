"""Several processes at one grid leave what one process leaves, and do nothing twice."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offsite_case import owner_recipe
from selectune.files import CRASH_AT, KillPoint
from small_grid import TRANSFER, Found, command, contents
from unit.test_offsite_in_compare import TUNE, grid_recipe
from unit.test_processes import LAUNCHED
from warm import Done, WarmCli

# What is made once, whoever makes it: a kill point is passed as often as in one process.
ONCE = (
    KillPoint.TUNE_STEP_DONE,
    KillPoint.EVALUATE_DONE,
    KillPoint.GENERATE_DONE,
    KillPoint.READ_DONE,
    KillPoint.STORE_SHARD_DONE,
)
Clis = tuple[WarmCli, WarmCli]


@pytest.fixture(scope="module")
def clis() -> Iterator[Clis]:
    with WarmCli() as one, WarmCli() as other:
        yield one, other


@pytest.fixture(scope="module")
def alone(clis: Clis, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Counter[str]]:
    """Return what one process leaves, and how often it passed each point."""
    folder = tmp_path_factory.mktemp("alone")
    done = clis[0]("compare", *command(folder))
    assert (done.code, done.err) == (0, "")
    return contents(folder / "run"), Counter(done.passes)


def launch(clis: Clis, words: list[str | Path], *, kills: str = "") -> tuple[Done, Done]:
    """Start two processes as a launcher does; the second may be told when to die."""

    def start(rank: int) -> Done:
        env = {**LAUNCHED, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if kills and rank == 1:
            env[CRASH_AT] = kills
        return clis[rank]("compare", *words, env=env)

    with ThreadPoolExecutor(2) as threads:
        leader, helper = threads.map(start, range(2))
    return leader, helper


def test_two_processes_leave_the_grid_of_one_and_do_nothing_twice(
    clis: Clis, alone: tuple[Found, Counter[str]], tmp_path: Path
) -> None:
    expected, once = alone
    leader, helper = launch(clis, command(tmp_path))
    assert (leader.code, leader.err, helper.code, helper.err) == (0, "", 0, "")
    assert "random" in leader.out
    assert helper.out == ""
    assert contents(tmp_path / "run") == expected
    both = Counter(leader.passes) + Counter(helper.passes)
    assert {p: both[p] for p in ONCE} == {p: once[p] for p in ONCE}
    assert helper.passes[KillPoint.TUNE_STEP_DONE] > 0
    assert not list((tmp_path / "run").rglob("*.staging-*"))


@pytest.mark.parametrize("point", [KillPoint.TUNE_STEP_DONE, KillPoint.EVALUATE_DONE])
def test_what_a_dead_process_had_taken_is_done_by_the_other(
    point: KillPoint, clis: Clis, alone: tuple[Found, Counter[str]], tmp_path: Path
) -> None:
    leader, helper = launch(clis, command(tmp_path), kills=f"{point}:2:KILL")
    assert (helper.code, leader.code, leader.err) == (-9, 0, "")
    assert contents(tmp_path / "run") == alone[0]


def test_a_launch_goes_on_where_one_process_was_killed_and_the_other_way_round(
    clis: Clis, alone: tuple[Found, Counter[str]], tmp_path: Path
) -> None:
    words = command(tmp_path)
    killed = clis[0]("compare", *words, env={CRASH_AT: f"{KillPoint.CELL_DONE}:2:KILL"})
    assert killed.code == -9
    leader, helper = launch(clis, words)
    assert (leader.code, helper.code) == (0, 0)
    assert contents(tmp_path / "run") == alone[0]
    again = clis[0]("compare", *words)
    assert (again.code, again.err) == (0, "")
    assert not {str(p) for p in ONCE} & again.passes.keys()
    assert contents(tmp_path / "run") == alone[0]


def test_a_grid_that_is_being_changed_is_one_process_s(clis: Clis, tmp_path: Path) -> None:
    leader, helper = launch(clis, [*command(tmp_path), "--allow", "seed"])
    assert leader.code == helper.code == 2
    assert "several processes cannot share a run that is being changed" in leader.err


def offsite(folder: Path) -> list[str | Path]:
    owner_recipe(folder)
    grid_recipe(folder)
    return ["--quiet", folder / "grid.yaml", *TUNE]


def transfer(folder: Path) -> list[str | Path]:
    return command(folder, TRANSFER)


def for_all_tasks(folder: Path) -> list[str | Path]:
    """A row that chooses anew while it trains, settings for all tasks, and cheaper gradients."""
    again = "{name: again, method: gist, tune: {reselect_every: 0.5}}"
    words = ["tune.epochs=2", "matrix.tune.choose=all", "score.fast=true"]
    return [*command(folder), *words, f"matrix.methods=[{again}, less]"]


@pytest.mark.slow
@pytest.mark.parametrize("written", [offsite, transfer, for_all_tasks])
def test_grids_of_every_kind_are_shared(
    written: Callable[[Path], list[str | Path]], clis: Clis, tmp_path: Path
) -> None:
    words = written(tmp_path)
    done = clis[0]("compare", *words)
    assert (done.code, done.err) == (0, "")
    alone = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    leader, helper = launch(clis, words)
    assert (leader.code, leader.err, helper.code, helper.err) == (0, "", 0, "")
    assert contents(tmp_path / "run") == alone
    assert KillPoint.TUNE_STEP_DONE in helper.passes
