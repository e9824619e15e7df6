"""The verbs around a run tell what the registry, the schema and the files say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from selectune import registry
from selectune.cli import main
from selectune.recipe import describe, describe_owner
from unit.cli.fakes import FakeSteps


def plain(text: str) -> str:
    """Return printed text without its line breaks."""
    return " ".join(text.split())


def test_methods_lists_every_registered_method(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = plain(capfd.readouterr().out)
    for family in ("data_scorer", "selection_rule", "training_method", "row_picker"):
        for entry in registry.methods(family):
            assert f" {entry.name} {entry.summary}" in out


def test_methods_tells_one_method_in_full(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "gist", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    gist = registry.get("data_scorer", "gist")
    assert (told["paper"], told["cost"], told["fails"]) == (gist.paper, gist.cost, gist.fails)
    defaults = {option["key"]: option["default"] for option in told["options"]}
    assert defaults["aggregate"] == "max_example"
    assert main(["methods", "gist"]) == 0
    out = plain(capfd.readouterr().out)
    assert all(option["description"] in out for option in told["options"])


def test_a_training_method_is_told_with_options_and_defaults(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "gast", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    defaults = {option["key"]: option["default"] for option in told["options"]}
    assert (told["family"], defaults["keep"], defaults["pick"]) == (
        "training_method",
        "0.5",
        "softmax",
    )
    assert told["others"] == []


def test_a_name_of_two_families_tells_both(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "random"]) == 0
    out = capfd.readouterr().out
    assert "random (score.method): " in out
    assert "random (tune.options.pick): " in out
    assert main(["methods", "random", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    families = [told["family"], *(o["family"] for o in told["others"])]
    assert families == ["data_scorer", "row_picker", "weight_scorer", "compressor"]


def test_methods_keys_shows_every_key_of_a_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--keys"]) == 0
    out = plain(capfd.readouterr().out)
    assert main(["methods", "--keys", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["keys"]
    every = [*describe(), *describe_owner()]
    assert len(told) == len(every)
    for key, kind, default, text in every:
        assert f"{key}: {kind}; {default} {text}" in out
        assert {"key": key, "type": kind, "default": default, "description": text} in told


@pytest.mark.parametrize("word", ["runs/demo", "demo.yaml"])
def test_verify_takes_a_run_or_its_recipe(
    word: str, recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("runs/demo").mkdir(parents=True)
    assert main(["verify", word]) == 0
    assert steps.calls == [("verify", Path("runs/demo"), None)]
    assert "every file" in capfd.readouterr().out


def test_verify_waits_for_no_torch(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from selectune.cli import main; sys.exit(main(['verify', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "run.json lacks format" in done.stdout


def test_verify_exits_1_and_names_each_problem(
    recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("runs/demo").mkdir(parents=True)
    steps.problems = ("scores.parquet: expected abc, found def", "run.json: no seed")
    assert main(["verify", "runs/demo"]) == 1
    out = capfd.readouterr().out
    assert all(problem in out for problem in steps.problems)
    assert main(["verify", "runs/demo", "--json"]) == 1
    told = json.loads(capfd.readouterr().out)
    assert told == {"ok": False, "folder": "runs/demo", "problems": list(steps.problems)}
