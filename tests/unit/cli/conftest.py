"""A stand-in for the steps of a run: the verbs are tested without a model."""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import selectune.cli

SOURCES = Path(selectune.cli.__file__).parents[2]
RECIPE = "model: {base: m}\ndata: {pool: p.jsonl, target: t.jsonl}\n"


@dataclass
class FakeResult:
    name: str
    out: Path
    loss: float = float("nan")

    def to_json(self) -> dict[str, Any]:
        return {"step": self.name, "out": str(self.out), "loss": self.loss}

    def lines(self) -> list[str]:
        return [f"{self.name} is done", f"report: {self.out}/report.html"]


@dataclass
class FakeSteps:
    """What the verbs called, and what the steps shall do."""

    calls: list[tuple[str, Path, Any]] = field(default_factory=list)
    act: Callable[[Any], None] = lambda progress: None
    problems: tuple[str, ...] = ()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    fake = FakeSteps()
    run = types.ModuleType("selectune.run")
    compare = types.ModuleType("selectune.compare")

    class Run:
        def __init__(self, recipe: Any, *, out: Path, shared: Any = None, progress: Any) -> None:
            self.recipe, self.out, self.progress = recipe, out, progress

        def __getattr__(self, name: str) -> Callable[[], FakeResult]:
            def step() -> FakeResult:
                fake.calls.append((name, self.out, self.recipe))
                fake.act(self.progress)
                return FakeResult(name, self.out)

            return step

    def verify(out: Path) -> types.SimpleNamespace:
        fake.calls.append(("verify", out, None))
        return types.SimpleNamespace(ok=not fake.problems, problems=fake.problems)

    def compare_all(recipe: Any, *, out: Path, progress: Any) -> FakeResult:
        fake.calls.append(("compare", out, recipe))
        return FakeResult("compare", out)

    run.Run, run.verify, compare.compare = Run, verify, compare_all
    for name, module in (("run", run), ("compare", compare)):
        monkeypatch.setitem(sys.modules, f"selectune.{name}", module)
        monkeypatch.setattr(f"selectune.{name}", module, raising=False)
    return fake


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(RECIPE)
    return "demo.yaml"


@dataclass
class Child:
    """Runs the program in a process of its own, with a stand-in for `Run.all`."""

    folder: Path

    def start(self, argv: list[str], body: str = "", **options: Any) -> subprocess.Popen[str]:
        code = (
            "import sys, types, os, time, signal\n"
            "run = types.ModuleType('selectune.run'); sys.modules['selectune.run'] = run\n"
            "class Result:\n"
            "    def to_json(self): return {'step': 'all'}\n"
            "    def lines(self): return ['done']\n"
            "class Run:\n"
            "    def __init__(self, recipe, out, progress): self.progress = progress\n"
            "    def all(self):\n"
            f"        {body or 'pass'}\n"
            "        return Result()\n"
            "run.Run = Run\n"
            "from selectune.cli import main\n"
            f"sys.exit(main({argv!r}))\n"
        )
        path = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
        options.setdefault("stdout", subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, argv: list[str], body: str = "") -> tuple[int, str, str]:
        process = self.start(argv, body)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def child(tmp_path: Path) -> Child:
    (tmp_path / "demo.yaml").write_text(RECIPE)
    return Child(tmp_path)
