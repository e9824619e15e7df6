"""A training that chooses anew, killed within phases and between them, ends in the same bits."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.test_run_resumes import contents
from selectune.files import CRASH_AT
from small_run import small_recipe
from warm import WarmCli

# Three steps of warm-up, then six of the selection: it chooses anew after 2, 3 and 4 of them.
WISHES = (
    "tune.reselect_every=0.25",
    "tune.controls=[]",
    "tune.method=gast",
    "tune.options={refresh_every: 4, momentum: 0.5}",
)
POINTS = (
    "tune.step_done:5",  # the last step of the first phase, before its checkpoint
    pytest.param("tune.step_done:8", marks=pytest.mark.slow),
    "tune.checkpoint_saved:4",
    "store.shard_done:6",  # within the first shortlist
    pytest.param("stage.manifest_written:12", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def cli() -> Iterator[WarmCli]:
    with WarmCli() as warm:
        yield warm


@pytest.fixture(scope="module")
def undisturbed(cli: WarmCli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cli("tune", small_recipe(folder), *WISHES)
    assert done.code == 0, done.err
    return contents(folder / "run")


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_training_goes_on_to_the_same_bytes(
    point: str, cli: WarmCli, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    recipe = small_recipe(tmp_path)
    assert cli("tune", recipe, *WISHES, env={CRASH_AT: f"{point}:KILL"}).code == -9
    again = cli("tune", recipe, *WISHES)
    assert (again.code, again.err) == (0, "")
    found = contents(tmp_path / "run")
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []
