import os
import shutil
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from selectune.errors import IncompatibleRunError
from selectune.methods.data_layer.gast import GAST
from selectune.methods.layers.ist import IST
from selectune.methods.layers.lisa import LISA
from selectune.training import TuneResult

Run = Callable[..., TuneResult]
MODULE = import_module("selectune.training.tune")


class Killed(BaseException):
    """Stands for a process that is gone: nothing after it runs but what Python must unwind."""


def kill_at(step: int) -> Callable[[dict[str, Any]], None]:
    def log(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            raise Killed

    return log


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file that holds neither a clock reading nor a pickle with its memo."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "rng_state.pth")
    }


@pytest.mark.parametrize(("trainer", "passes"), [("transformers", 1), ("trl", 2)])
def test_a_kill_at_any_step_changes_no_byte(
    run: Run, tiny: ModuleType, trainer: str, passes: int
) -> None:
    options = tiny.section(trainer=trainer, batch_size=4 // passes, accumulation=passes)
    unbroken = run("unbroken", options=options)
    for step in range(1, unbroken.n_steps + 1):
        with pytest.raises(Killed):
            run(f"killed-{step}", options=options, log=kill_at(step))
        rows: list[dict[str, Any]] = []
        resumed = run(f"killed-{step}", options=options, log=rows.append)
        assert resumed.losses == unbroken.losses
        assert tree(resumed.path) == tree(unbroken.path)
        assert rows[0]["start"] == (step - 1) // 2 * 2
        assert [row["step"] for row in rows[1:]] == list(range(rows[0]["start"] + 1, 7))


# Steps 2, 4 and 6 save; the methods renew what they chose at other steps.
@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ("transformers", (3,)),
        ("trl", (4,)),
        pytest.param("transformers", (2, 4, 6), marks=pytest.mark.slow),
        pytest.param("trl", (2, 3, 6), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
@pytest.mark.parametrize("kind", ["gast", "sampler", "both", "ist", "lisa", "gast + ist"])
def test_a_method_goes_on_where_it_stopped(
    run: Run, tiny: ModuleType, trainer: str, steps: tuple[int, ...], kind: str
) -> None:
    methods = {
        "gast": GAST(refresh_every=4, momentum=0.5),
        "sampler": tiny.Flicker(),
        "both": GAST(sampler=tiny.Flicker(), refresh_every=4),
        "ist": IST(layers=1, interval=2),
        "lisa": LISA(layers=1, interval=2, retire="drop"),
        "gast + ist": GAST(sampler=IST(layers=1, interval=3), momentum=0.5),
    }
    given = {
        "options": tiny.section(trainer=trainer, batch_size=2, accumulation=2),
        "method": methods[kind],
    }
    unbroken = run("unbroken", **given)
    for step in steps:
        with pytest.raises(Killed):
            run(f"killed-{step}", log=kill_at(step), **given)
        resumed = run(f"killed-{step}", **given)
        assert resumed.losses == unbroken.losses
        assert resumed.records == unbroken.records
        assert tree(resumed.path) == tree(unbroken.path)


def test_a_method_is_told_after_a_kill_behind_the_last_checkpoint(
    run: Run, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run("unbroken", method=tiny.Flicker())

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "save_weights", die)
        with pytest.raises(Killed):
            run("killed", method=tiny.Flicker())
    resumed = run("killed", method=tiny.Flicker())
    assert resumed.records == unbroken.records
    assert tree(resumed.path) == tree(unbroken.path)


def test_a_damaged_state_of_a_method_falls_back(run: Run, tiny: ModuleType, tmp_path: Path) -> None:
    given = {"method": tiny.Flicker()}
    unbroken = run("unbroken", **given)
    for n, name in enumerate(("selectune_method.json", "selectune_method.safetensors")):
        with pytest.raises(Killed):
            run(f"killed-{n}", log=kill_at(5), **given)
        DAMAGES["flipped"](tmp_path / f"killed-{n}" / "checkpoint-4" / name)
        rows: list[dict[str, Any]] = []
        resumed = run(f"killed-{n}", log=rows.append, **given)
        assert name in rows[0]["warning"]
        assert resumed.records == unbroken.records


def test_a_bare_model_resumes_too(run: Run, tiny: ModuleType) -> None:
    def model() -> nn.Module:
        bare = tiny.tiny_llama()
        for name, p in bare.named_parameters():
            p.requires_grad_("layers.1." in name)
        return bare

    unbroken = run("unbroken", model())
    with pytest.raises(Killed):
        run("killed", model(), log=kill_at(4))
    resumed = run("killed", model())
    assert resumed.losses == unbroken.losses
    assert tree(resumed.path) == tree(unbroken.path)


def test_a_kill_after_the_last_checkpoint_needs_no_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run("unbroken")

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "save_weights", die)  # of the finished adapter only
        with pytest.raises(Killed):
            run("killed")
    rows: list[dict[str, Any]] = []
    resumed = run("killed", log=rows.append)
    assert rows == [{"arm": "gist", "start": 6, "n_steps": 6}]
    assert resumed.losses == unbroken.losses
    assert tree(resumed.path.parent) == tree(unbroken.path.parent)


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_ends_early_resumes_to_the_same_end(
    run: Run, tiny: ModuleType, step: int
) -> None:
    options = tiny.section(save_every=1)
    unbroken = run("unbroken", options=options, stop_after_epochs=1)
    assert unbroken.n_steps == 3
    assert unbroken.losses == run("whole", options=options).losses[:3]
    with pytest.raises(Killed):
        run("killed", options=options, stop_after_epochs=1, log=kill_at(step))
    resumed = run("killed", options=options, stop_after_epochs=1)
    assert resumed.losses == unbroken.losses
    assert tree(resumed.path.parent) == tree(unbroken.path.parent)
    with pytest.raises(IncompatibleRunError, match="stop_after_epochs differ"):
        run("killed", options=options, stop_after_epochs=2)


def test_an_early_end_survives_a_kill_after_its_last_checkpoint(
    run: Run, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny.section(save_every=3)
    unbroken = run("unbroken", options=options, stop_after_epochs=1)

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "save_weights", die)
        with pytest.raises(Killed):
            run("killed", options=options, stop_after_epochs=1)
    resumed = run("killed", options=options, stop_after_epochs=1)
    assert (resumed.n_steps, resumed.losses) == (unbroken.n_steps, unbroken.losses)
    assert tree(resumed.path) == tree(unbroken.path)


@pytest.mark.parametrize(
    ("number", "trainer"), [(signal.SIGINT, "transformers"), (signal.SIGTERM, "trl")]
)
def test_a_signal_ends_the_step_saves_and_stops(
    run: Run, tiny: ModuleType, number: int, trainer: str
) -> None:
    options = tiny.section(trainer=trainer)
    unbroken = run("unbroken", options=options)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", options=options, log=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    rows: list[dict[str, Any]] = []
    resumed = run("stopped", options=options, log=rows.append)
    assert rows[0]["start"] == 3
    assert resumed.losses == unbroken.losses
    assert tree(resumed.path.parent) == tree(unbroken.path.parent)


def test_a_second_signal_does_not_wait(run: Run) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(log=interrupt)


def test_a_large_model_is_not_saved_for_an_interrupt(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_CHEAP_BYTES", 0)

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(log=interrupt)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", "flipped"),
        ("adapter_model.safetensors", "missing"),
        ("optimizer.pt", "cut"),
        ("optimizer.pt", "missing"),
        ("scheduler.pt", "flipped"),
        ("rng_state.pth", "missing"),
        ("trainer_state.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    run: Run, tmp_path: Path, file: str, damage: str
) -> None:
    with pytest.raises(Killed):
        run(log=kill_at(5))
    DAMAGES[damage](tmp_path / "run" / "checkpoint-4" / file)
    rows: list[dict[str, Any]] = []
    resumed = run(log=rows.append)
    assert "checkpoint-4" in rows[0]["warning"]
    assert file in rows[0]["warning"]
    assert rows[1]["start"] == 2
    assert resumed.n_steps == 6


def test_a_save_that_was_cut_off_is_no_checkpoint(
    run: Run, tiny: ModuleType, tmp_path: Path
) -> None:
    unbroken = run("unbroken")
    with pytest.raises(Killed):
        run(log=kill_at(5))
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-9")
    for name in ("manifest.json", "optimizer.pt"):
        (tmp_path / "run" / "checkpoint-9" / name).unlink()
    rows: list[dict[str, Any]] = []
    resumed = run(log=rows.append)
    assert rows[0]["start"] == 4
    assert tree(resumed.path.parent) == tree(unbroken.path.parent)
