"""The doctor finds what is wrong with a machine, and stays silent about what is right."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from selectune import doctor as subject
from selectune.data.collate import Batch
from selectune.doctor import Doctor, Fact, doctor, gradient_noise
from selectune.gradients import engine
from selectune.gradients.kernels import DenseRows, Rows


def facts(found: Doctor) -> dict[str, Fact]:
    return {fact.name: fact for fact in found.facts}


def test_gradients_of_a_batch_equal_those_of_one_to_rounding() -> None:
    assert 0 < gradient_noise() < 1e-5


def test_gradient_noise_sees_mixed_up_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine.GradientEngine.run

    def reversed_run(
        self: engine.GradientEngine, batch: Batch, consume: Callable[[str, Rows], None]
    ) -> torch.Tensor:
        def consume_reversed(name: str, rows: Rows) -> None:
            consume(name, DenseRows(rows.dense().flip(0)))

        return run(self, batch, consume_reversed)

    monkeypatch.setattr(engine.GradientEngine, "run", reversed_run)
    assert gradient_noise() > subject.NOISE_LIMIT


def test_a_doctor_tells_everything_it_looked_at(tmp_path: Path) -> None:
    found = doctor(tmp_path)
    told = facts(found)
    assert {"python", "torch", "device", "model.dtype auto", "threads", "memory", "disk", "hub",
            "telemetry", "chromium", "gradient noise"} <= set(told)  # fmt: skip
    assert told["hub"].value.startswith("offline")
    assert told["torch"].value.startswith(metadata.version("torch"))
    assert str(tmp_path) in told["disk"].value
    assert found.to_json()["ok"] is found.ok
    lines = "\n".join(found.lines())
    assert all(fact.value in lines for fact in found.facts)


def test_a_version_outside_the_tested_range_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "torch<2",
        "numpy<99,>=1",
        "no-such-part>=1",
        "no-such-extra; extra == 'trl'",
        "no-such-tool; extra == 'dev'",
    ]
    monkeypatch.setattr(subject.metadata, "requires", lambda name: needs)
    version = metadata.version
    monkeypatch.setattr(
        subject.metadata, "version", lambda n: "0.1.0" if n == "selectune" else version(n)
    )
    told = {fact.name: fact for fact in subject._versions()}
    assert (told["torch"].state, told["torch"].advice) == ("note", "pip install 'torch<2'")
    assert told["numpy"].value.endswith("(tested >=1,<99)")
    assert told["no-such-part"].state == "problem"
    assert told["no-such-extra"].state == "ok"
    assert "no-such-tool" not in told


def test_a_noisy_machine_is_a_problem() -> None:
    assert subject._noise(1e-7).state == "ok"
    assert not Doctor((subject._noise(1e-2),), 1e-2).ok


def test_more_threads_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    [fact] = subject._threads()
    assert fact.state == "note"
    assert "OMP_NUM_THREADS" in fact.advice


def test_a_folder_without_the_right_to_write_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject.os, "access", lambda path, mode: False)
    assert [fact.state for fact in subject._room(tmp_path) if fact.name == "folder"] == ["problem"]
