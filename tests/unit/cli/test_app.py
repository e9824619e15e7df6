"""Every way out of the program: what is printed where, and with which exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selectune.cli import main
from selectune.errors import StorageError
from unit.cli.fakes import SOURCES, Child, FakeSteps

VERBS = (
    "plan", "score", "select", "tokens", "tune", "evaluate", "run", "report", "compare", "methods",
    "doctor", "verify", "demo", "merge", "export", "scores",
)  # fmt: skip
HEAVY = ("torch", "peft", "transformers", "numpy", "pandas", "pyarrow", "datasets", "rich")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run", "--help"], ["rnu"], []])
def test_help_and_typos_import_nothing_heavy(argv: list[str], child: Child) -> None:
    code = (
        "import sys\n"
        "from selectune.cli import main\n"
        f"main({argv!r})\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=child.folder,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "heavy: []"


def test_help_names_every_verb_whole(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out
        assert main([verb, "--help"]) == 0
        assert "--debug" in capfd.readouterr().out
    assert "..." not in out.split("Commands:")[1].split("Start with")[0]  # nothing cut off


def test_no_word_at_all_shows_help_and_is_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in "".join(capfd.readouterr())


def test_version_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("selectune ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu", "demo.yaml"], 'did you mean "run"?'),
        (["demo.yaml"], "selectune run demo.yaml"),
        (["run"], "selectune run demo.yaml"),
        (["run", "dmo.yaml"], 'did you mean "demo.yaml"?'),
        (["run", "."], "name the file: demo.yaml"),
        (["run", "tune.epochs=4"], "the recipe comes first"),
        (["run", "demo.yaml", "tune.epoch=4"], 'did you mean "epochs"?'),
        (["run", "tabs.yaml"], "spaces only"),
        (["run", "demo.yaml", "--epochs", "4"], "No such option: --epochs"),
        (["run", "demo.yaml", "--allow", "tune.epoch"], 'did you mean "tune.epochs"?'),
        (["compare", "demo.yaml"], "add matrix.methods"),
        (["verify"], "selectune verify runs/NAME"),
        (["verify", "nowhere"], 'there is no run "nowhere"'),
        (["methods", "gits"], 'did you mean "gist"?'),
    ],
)
def test_wrong_usage_is_explained_and_exits_2(
    argv: list[str], message: str, recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("tabs.yaml").write_text("model:\n\tbase: x\n")
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert steps.calls == []


def test_our_errors_are_printed_without_traceback(
    recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(progress: object) -> None:
        raise StorageError("the disk is full", where="runs/demo", do="free 2 GB")

    steps.act = fail
    assert main(["run", recipe]) == 1
    assert capfd.readouterr().err == (
        "StorageError: the disk is full\n  where: runs/demo\n  do:    free 2 GB\n"
    )
    assert main(["run", recipe, "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_an_unforeseen_exception_is_three_lines_and_exit_1(child: Child) -> None:
    code, out, err = child.run(["run", "demo.yaml"], "raise ValueError('odd\\nthing')")
    assert (code, out) == (1, "")
    assert re.match(r"ValueError: odd thing\n  where: \S+/cli/steps\.py:\d+\n  do: ", err)
    assert "--debug" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_of_an_unforeseen_exception(child: Child) -> None:
    code, _, err = child.run(["run", "demo.yaml", "--debug"], "raise ValueError('odd')")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_is_told_and_exits_130(child: Child, name: str) -> None:
    body = "print('begun', file=sys.stderr, flush=True); time.sleep(50)"
    process = child.start(["run", "demo.yaml"], body)
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted; the same command goes on where this one stopped\n"
    assert out == ""


def test_stdout_holds_one_json_object_whatever_else_is_printed(child: Child) -> None:
    body = "print('noise'); os.system('echo noise of a child'); os.write(1, b'raw noise\\n')"
    code, out, err = child.run(["run", "demo.yaml", "--json"], body)
    assert code == 0
    assert out == '{"step": "all"}\n'
    assert err.count("noise") == 3


def test_a_reader_that_leaves_early_is_no_failure(child: Child) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = child.start(["run", "demo.yaml"], stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_nothing_is_said_on_stderr_off_a_terminal(child: Child) -> None:
    body = (
        "p = self.progress; p.note('a note'); c = p.phase('score', 3, 'examples'); "
        "a = c.__enter__(); a(3); c.__exit__(None, None, None)"
    )
    assert child.run(["run", "demo.yaml"], body) == (0, "done\n", "")


def test_telemetry_is_off_unless_the_user_set_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    main(["--version"])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["WANDB_MODE"] == "online"


def test_numbers_that_json_lacks_become_null(
    recipe: str, steps: FakeSteps, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"step": "all", "out": "runs/demo", "loss": None}


def test_what_bitsandbytes_says_when_peft_imports_it_reaches_nobody() -> None:
    pytest.importorskip("bitsandbytes")
    code = "from selectune.cli import main; main(['--version']); import peft, bitsandbytes"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SELECTUNE_TESTS_SHOW_BITSANDBYTES": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
