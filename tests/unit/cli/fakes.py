"""A stand-in for the steps of a run: the verbs are tested without a model."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    allowed: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


@dataclass
class Child:
    """Runs the program in a process of its own, with a stand-in for `Run.all`."""

    folder: Path

    def start(
        self, argv: list[str], body: str = "", stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        code = (
            "import sys, types, os, time, signal\n"
            "run = types.ModuleType('selectune.pipeline.run'); sys.modules[run.__name__] = run\n"
            "class Result:\n"
            "    def to_json(self): return {'step': 'all'}\n"
            "    def lines(self): return ['done']\n"
            "class Run:\n"
            "    def __init__(self, recipe, out, allow, progress): self.progress = progress\n"
            "    def all(self):\n"
            f"        {body or 'pass'}\n"
            "        return Result()\n"
            "run.Run = Run\n"
            "from selectune.cli import main\n"
            f"sys.exit(main({argv!r}))\n"
        )
        path = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
            stdout=stdout,
        )

    def run(self, argv: list[str], body: str = "") -> tuple[int, str, str]:
        process = self.start(argv, body)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err
