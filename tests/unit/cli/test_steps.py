"""Each verb takes its own step of a run, with the recipe and the overrides it was given."""

from pathlib import Path

import pytest

from selectune.cli import main
from unit.cli.fakes import FakeSteps

STEPS = ["plan", "score", "select", "tokens", "tune", "evaluate", "report"]


@pytest.mark.parametrize(("verb", "step"), [*zip(STEPS, STEPS, strict=True), ("run", "all")])
def test_a_verb_takes_its_step(
    verb: str, step: str, recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, recipe, "tune.epochs=2", "output=elsewhere"]) == 0
    [(called, out, loaded)] = steps.calls
    assert (called, out, loaded.tune.epochs) == (step, Path("elsewhere"), 2)
    assert capfd.readouterr().out == f"{step} is done\nreport: elsewhere/report.html\n"


def test_allowed_changes_reach_the_run(recipe: str, steps: FakeSteps) -> None:
    assert main(["run", recipe, "--allow", "tune.epochs, data,data.target.csqa"]) == 0
    assert steps.allowed == ("tune.epochs", "data", "data.target.csqa")
    assert main(["demo"]) == 0
    assert steps.allowed == ()


def test_a_grid_is_no_run(recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "score", "report"):
        assert main([verb, recipe, "matrix.methods=[gist]"]) == 2
        assert f"and {verb} would do one run of it" in capfd.readouterr().err
    assert steps.calls == []


def test_a_grid_takes_what_may_differ(recipe: str, steps: FakeSteps) -> None:
    assert main(["compare", recipe, "matrix.methods=[gist]", "--allow", "tune.epochs,data"]) == 0
    assert steps.allowed == ("tune.epochs", "data")


def test_a_report_is_written_of_a_run_by_its_folder(recipe: str, steps: FakeSteps) -> None:
    home = Path("some where")
    home.mkdir()
    (home / "run.json").write_text("{}")
    (home / "config.yaml").write_text(Path(recipe).read_text())
    assert main(["report", str(home)]) == 0
    ((verb, out, _),) = steps.calls
    assert (verb, out) == ("report", home)


def test_tokens_takes_a_form_and_ids(recipe: str, steps: FakeSteps) -> None:
    assert main(["tokens", recipe, "--form", "position", "--ids", "a-0, b-0"]) == 0
    assert steps.options == {"form": "position", "ids": ["a-0", "b-0"]}
    assert main(["tokens", recipe, "--form", "length"]) == 2


def test_compare_runs_the_matrix(
    recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", recipe, "matrix.methods=[gist, full]"]) == 0
    [(called, out, loaded)] = steps.calls
    assert (called, out, loaded.matrix.methods) == ("compare", Path("runs/demo"), ["gist", "full"])
    assert capfd.readouterr().out.startswith("compare is done\n")


@pytest.mark.parametrize("flag", ["--json", "--quiet", None])
def test_the_log_of_a_batch_job_holds_the_forecast(
    flag: str | None, recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", recipe, "matrix.methods=[gist]", *([flag] if flag else [])]) == 0
    told = capfd.readouterr()
    assert told.err == ("" if flag == "--quiet" else "grid        as foreseen\n")
    assert "foreseen" not in told.out


def test_demo_runs_the_shipped_recipe(
    recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo"]) == 0
    assert main(["demo", "--quick", "seed=3"]) == 0
    [(_, whole_out, whole), (_, quick_out, quick)] = steps.calls
    assert (whole.model.base, whole.data.pool, whole.tune.epochs) == ("demo:model", "demo:pool", 4)
    assert (quick.data.pool, quick.tune.epochs, quick.seed) == ("demo:pool/30", 1, 3)
    assert whole_out != quick_out  # the quick one must not resume from the whole one
    assert "report.html" in capfd.readouterr().out
