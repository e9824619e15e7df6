"""A grid, killed again and again and started again, ends in the table of an undisturbed one."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from selectune.files import CRASH_AT, KillPoint
from small_grid import TRANSFER, Found, command, contents
from warm import WarmCli

# A run scores and selects on record; a grid looks for what it needs. `emulate` is an owner's.
NOT_OF_A_GRID = {KillPoint.SCORES_DONE, KillPoint.SELECTION_DONE, KillPoint.EMULATE_LAYER_DONE}
OF_A_GRID = [point for point in KillPoint if point not in NOT_OF_A_GRID]
N_KILLS = 3
TRANSFER_POINTS = (
    "tune.step_done:6",
    "generate.done:1",
    "read.done:1",
    "cell.done:2",
    "generate.done:4",
    "report.done:1",
)


@pytest.fixture(scope="module")
def cli() -> Iterator[WarmCli]:
    with WarmCli() as warm:
        yield warm


@pytest.fixture(scope="module")
def undisturbed(cli: WarmCli, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """Return what a grid leaves that nothing disturbed, and how often it passes each point."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cli("compare", *command(folder))
    assert (done.code, done.err) == (0, "")
    return contents(folder / "run"), dict(done.passes)


def random_kills(passes: Found) -> list[str]:
    """Return wishes, none of which asks for more than its share of a grid's passings."""
    rng = random.Random(0)
    often = sorted(point for point, count in passes.items() if count >= N_KILLS)
    drawn = rng.sample(often, N_KILLS)
    return [f"{point}:{rng.randint(1, passes[point] // N_KILLS)}:KILL" for point in drawn]


def go_on(cli: WarmCli, words: list[str | Path], folder: Path) -> Found:
    """Return what the same command arrives at, with no word of what had happened."""
    again = cli("compare", *words)
    assert (again.code, again.err) == (0, "")
    left = [path.name for path in (folder / "run").rglob(".*") if path.name != ".lock"]
    assert left == []  # no half-written name
    return contents(folder / "run")


def test_what_is_compared_is_what_a_grid_finds(undisturbed: tuple[Found, Found]) -> None:
    found, _ = undisturbed
    assert sorted(found["table.json"]) == ["rows", "text", "tried"]
    assert len(found) == 1 + 3 * 3 * 2  # recipe, numbers, choice: three methods, two seeds
    assert found["cells/less-colours-seed-1/cell.json"]["generated"].keys() == {"colours"}


def test_a_grid_passes_every_kill_point_of_its_own(undisturbed: tuple[Found, Found]) -> None:
    assert undisturbed[1].keys() == {str(point) for point in OF_A_GRID}


def test_a_grid_killed_at_random_again_and_again_still_arrives(
    cli: WarmCli, tmp_path: Path, undisturbed: tuple[Found, Found]
) -> None:
    expected, passes = undisturbed
    words = command(tmp_path)
    for wish in random_kills(passes):
        crashed = cli("compare", *words, env={CRASH_AT: wish})
        assert (crashed.code, crashed.err) == (-9, ""), wish
    assert go_on(cli, words, tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("point", OF_A_GRID)
def test_whatever_the_point_a_grid_goes_on(
    point: KillPoint, cli: WarmCli, tmp_path: Path, undisturbed: tuple[Found, Found]
) -> None:
    expected, passes = undisturbed
    n = passes[str(point)]
    for count in sorted({1, n // 2, n - 1, n} & set(range(1, n + 1))):
        folder = tmp_path / str(count)
        folder.mkdir()
        words = command(folder)
        assert cli("compare", *words, env={CRASH_AT: f"{point}:{count}:KILL"}).code == -9
        assert go_on(cli, words, folder) == expected


@pytest.mark.slow
def test_a_grid_killed_after_each_of_its_results_still_arrives(
    cli: WarmCli, tmp_path: Path, undisturbed: tuple[Found, Found]
) -> None:
    expected, passes = undisturbed
    words, wish = command(tmp_path), f"{KillPoint.PROMOTE_DONE}:1:KILL"
    n_kills = 0
    while cli("compare", *words, env={CRASH_AT: wish}).code == -9:
        n_kills += 1
    assert n_kills == passes[KillPoint.PROMOTE_DONE]  # nothing finished was made anew
    assert go_on(cli, words, tmp_path) == expected


@pytest.mark.slow
def test_a_killed_transfer_goes_on_to_the_same_table(cli: WarmCli, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    done = cli("compare", *command(whole, TRANSFER))
    assert (done.code, done.err) == (0, "")
    words = command(broken, TRANSFER)
    for point in TRANSFER_POINTS:
        assert cli("compare", *words, env={CRASH_AT: f"{point}:KILL"}).code == -9, point
    assert go_on(cli, words, broken) == contents(whole / "run")
