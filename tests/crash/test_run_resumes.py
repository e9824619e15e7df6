"""A whole run through the command line: killed at named points, started again, and none the worse.

The undisturbed run starts as a user starts it; the others fork from a warm process.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from selectune.files import CRASH_AT, MANIFEST, KillPoint
from small_run import selectune, small_recipe
from warm import WarmCli

EXIT_CODES = {"KILL": -9, "TERM": 130, "INT": 130}
INTERRUPTED = "interrupted; the same command goes on where this one stopped\n"
# What holds a clock reading, a process id, the name of the folder or the Trainer's wish to stop.
NOT_THE_SAME = frozenset(
    {".lock", "config.yaml", "run.json", "report.html", MANIFEST}
    | {"README.md", "adapter_config.json", "trainer_state.json"}
)
POINTS = (
    "store.shard_done:2",
    "warmup.done:1",
    "tune.step_done:6",  # in the selection's arm, between two checkpoints
    "tune.checkpoint_saved:5",
    "selection.done:1",
    "evaluate.done:2",
    "stage.manifest_written:9",
)
# What owners and grids do besides is killed by test_emulate_resumes.py and test_compare_resumes.py.
NOT_OF_A_RUN = ("emulate.", "generate.", "read.", "cell.")
OF_A_RUN = [point for point in KillPoint if not point.startswith(NOT_OF_A_RUN)]


@pytest.fixture(scope="module")
def cli() -> Iterator[WarmCli]:
    with WarmCli() as warm:
        yield warm


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = selectune("run", small_recipe(folder))
    assert (done.returncode, done.stderr) == (0, "")
    return contents(folder / "run")


@pytest.fixture(scope="module")
def passes(cli: WarmCli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return how often an undisturbed run passes each kill point."""
    return dict(cli("run", small_recipe(tmp_path_factory.mktemp("counted"))).passes)


def contents(run: Path) -> dict[str, bytes]:
    """Return every file of a run: its bytes, or nothing where these cannot be the same twice.

    A price is written after the result that it is of, and may be lost between the two.
    """
    return {
        path.relative_to(run).as_posix(): b"" if path.name in NOT_THE_SAME else path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.name.endswith(".cost.json")
    }


def finished(run: Path) -> dict[Path, int]:
    """Return when each file of a finished result was written.

    Checkpoints come and go. A selection takes a moment, and is made again until it is on record.
    """
    return {
        file: file.stat().st_mtime_ns
        for manifest in run.rglob(MANIFEST)
        if not any(
            part.startswith(("checkpoint-", "selection", "."))
            for part in manifest.relative_to(run).parts
        )
        for file in manifest.parent.iterdir()
    }


def crash_and_go_on(cli: WarmCli, folder: Path, wish: str, expected: dict[str, bytes]) -> None:
    recipe = small_recipe(folder)
    crashed = cli("run", recipe, env={CRASH_AT: wish})
    assert crashed.code == EXIT_CODES[wish.rpartition(":")[2]], crashed.err
    assert crashed.err == (INTERRUPTED if crashed.code == 130 else "")
    assert crashed.out == ""
    kept = finished(folder / "run")
    again = cli("run", recipe)
    assert (again.code, again.err) == (0, "")
    now = finished(folder / "run")
    assert {file: now.get(file) for file in kept} == kept
    found = contents(folder / "run")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_the_comparison_covers_what_the_documents_promise(undisturbed: dict[str, bytes]) -> None:
    compared = {name for name, data in undisturbed.items() if data}
    expected = {
        "scores.parquet", "selected.jsonl", "metrics.jsonl", "evaluation.json",
        "warmup/adapter/adapter_model.safetensors", "store/shard-00002/dots.safetensors",
        "tune/selected/adapter/adapter_model.safetensors",
        "tune/random/adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert expected <= compared


def test_a_run_passes_every_kill_point(passes: dict[str, int]) -> None:
    assert passes.keys() == {str(point) for point in OF_A_RUN}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_bytes_of_an_undisturbed_one(
    point: str, cli: WarmCli, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    crash_and_go_on(cli, tmp_path, f"{point}:KILL", undisturbed)


@pytest.mark.parametrize("sign", ["INT", "TERM"])
@pytest.mark.parametrize("point", ["store.shard_done:2", "tune.step_done:7"])
def test_an_interrupted_run_exits_130_and_goes_on(
    point: str, sign: str, cli: WarmCli, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    crash_and_go_on(cli, tmp_path, f"{point}:{sign}", undisturbed)


def test_a_run_killed_again_and_again_still_arrives(
    cli: WarmCli, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    recipe = small_recipe(tmp_path)
    ends = [
        cli("run", recipe, env={CRASH_AT: f"{point}:KILL"}).code
        for point in ("warmup.done:1", "store.shard_done:2", "tune.step_done:3", "evaluate.done:1")
    ]
    assert ends == [-9] * 4
    assert cli("run", recipe).code == 0
    assert contents(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("sign", sorted(EXIT_CODES))
@pytest.mark.parametrize("point", OF_A_RUN)
def test_whatever_the_point_and_the_signal_a_run_goes_on(
    point: KillPoint,
    sign: str,
    cli: WarmCli,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    passes: dict[str, int],
) -> None:
    n = passes[str(point)]
    for count in sorted({1, 2, n // 2, n} & set(range(1, n + 1))):
        folder = tmp_path / str(count)
        folder.mkdir()
        crash_and_go_on(cli, folder, f"{point}:{count}:{sign}", undisturbed)
