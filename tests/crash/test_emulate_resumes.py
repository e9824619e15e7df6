"""An owner's `emulate`, killed between two layers and started again, ends in the same weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from offsite_case import owner_recipe
from selectune.files import CRASH_AT
from selectune.models import fingerprint
from selectune.offsite.loading import load_emulator
from warm import WarmCli

POINTS = ("emulate.layer_done:1", "emulate.layer_done:2", "stage.manifest_written:3")


def weights(folder: Path) -> str:
    return fingerprint(load_emulator(folder / "made/package").state_dict())


@pytest.fixture(scope="module")
def cli() -> Iterator[WarmCli]:
    with WarmCli() as warm:
        yield warm


@pytest.fixture(scope="module")
def undisturbed(cli: WarmCli, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of an emulator whose making nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli("emulate", owner_recipe(folder))
    assert (done.code, done.err) == (0, "")
    assert done.passes["emulate.layer_done"] == 2
    return weights(folder)


@pytest.mark.parametrize("sign", ["KILL", "TERM"])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_emulate_goes_on(
    point: str, sign: str, cli: WarmCli, tmp_path: Path, undisturbed: str
) -> None:
    recipe = owner_recipe(tmp_path)
    crashed = cli("emulate", recipe, env={CRASH_AT: f"{point}:{sign}"})
    assert crashed.code == {"KILL": -9, "TERM": 130}[sign]
    again = cli("emulate", recipe)
    assert (again.code, again.err) == (0, "")
    made = tmp_path / "made"
    assert sorted(p.name for p in made.iterdir() if p.name != ".lock") == ["owner", "package"]
    assert weights(tmp_path) == undisturbed
