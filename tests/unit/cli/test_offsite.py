"""emulate, plug, and the packages that tune takes: results, files, messages."""

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from offsite_case import owner_recipe, tuner_recipe
from selectune.cli import main
from unit.cli.fakes import FakeSteps

pytestmark = pytest.mark.filterwarnings("ignore:.*moved by more than their own norm")


@pytest.fixture(autouse=True)
def _quiet_libraries() -> None:
    logging.disable_progress_bar()


def test_the_two_houses_by_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    owner = str(owner_recipe(tmp_path))
    assert main(["plan", owner]) == 0
    assert "layers 0, 3 of 4 go out whole" in capfd.readouterr().out
    assert main(["emulate", owner, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["package"] == str(tmp_path / "made/package")
    assert "layers" not in told
    (tmp_path / "model").rename(tmp_path / "hidden")

    words = ["score.method=random", "tune.controls=[]", "tune.epochs=1"]
    assert main(["tune", told["package"], str(tuner_recipe(tmp_path)), *words]) == 0
    plugin = str(tmp_path / "run/plugin")
    assert f"plugin: {plugin}" in capfd.readouterr().out

    onto, out = str(tmp_path / "hidden"), str(tmp_path / "tuned")
    where = ["--owner", told["owner"], "--onto", onto, "--out", out]
    assert main(["plug", plugin, *where, "--json"]) == 0
    plugged = json.loads(capfd.readouterr().out)
    assert (plugged["form"], plugged["folder"]) == ("full", out)
    assert {name.split(".")[2] for name in plugged["changes"]} == {"0", "3"}
    assert main(["plug", plugin, *where]) == 0
    assert "evaluate it before it is used" in capfd.readouterr().out

    asked = ["evaluate", told["package"], str(tuner_recipe(tmp_path)), *words]
    others = ["--plugged", out, "--original", onto]
    assert main([*asked, *others]) == 0
    lines = capfd.readouterr().out
    assert "PI − ZS" in lines
    assert "not at hand: FT" in lines
    assert main([*asked, *others, "--json"]) == 0
    assert set(json.loads(capfd.readouterr().out)["differences"]) == {"delta", "gain"}
    assert main([*asked, "--original", onto]) == 2
    assert "there is no plugged model to compare" in capfd.readouterr().err


def test_a_package_before_the_recipe_is_its_base(
    recipe: str, steps: FakeSteps, tmp_path: Path
) -> None:
    (tmp_path / "a package").mkdir()
    (tmp_path / "a package" / "emulator.json").write_text("{}")
    assert main(["tune", "a package", recipe, "tune.epochs=2"]) == 0
    [(called, _, loaded)] = steps.calls
    assert (called, loaded.model.base, loaded.tune.epochs) == ("tune", "a package", 2)


@pytest.mark.parametrize("others", [[], ["tune.epochs=2"]])
def test_a_package_without_recipe_is_refused(
    others: list[str], recipe: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "emulator.json").write_text("{}")
    assert main(["tune", str(tmp_path), *others]) == 2
    assert "tune needs a recipe" in capfd.readouterr().err


OWNER = "model: {base: m}\nemulate: {calibration: text.jsonl}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run"], "is the recipe of a model's owner"),
        (["emulate", "emulate.method=gradott"], 'did you mean "gradot"'),
        (["emulate", "emulate.options={lambda: 1}"], '"lambda" is no option of gradot'),
        (["emulate", "emulate.keep_mlp=0"], "emulate.keep_mlp cannot be 0"),
        (["emulate", "emulate.adapters=[]"], "emulate.adapters cannot be []"),
        (["emulate", "model.adapter=lora"], "model.adapter would not be used"),
        (["emulate", "emulate.terms={forms: [dora]}"], "emulate.terms.forms[0] cannot be"),
        (["emulate", "tune.epochs=2"], '"tune" is no key of a recipe'),
    ],
)
def test_a_wrong_owners_recipe_is_refused_before_anything_is_loaded(
    words: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "owner.yaml"
    path.write_text(OWNER)
    assert main([words[0], str(path), *words[1:]]) == 2
    assert says in capfd.readouterr().err


def test_an_owners_recipe_needs_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "owner.yaml"
    path.write_text("model: {base: m}\nemulate: {}\n")
    assert main(["emulate", str(path)]) == 2
    assert '"emulate.calibration" is missing' in capfd.readouterr().err
