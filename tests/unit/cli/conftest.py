"""The stand-ins as fixtures."""

import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from selectune.progress import Progress
from selectune.recipe import Recipe
from unit.cli.fakes import RECIPE, Child, FakeResult, FakeSteps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    fake = FakeSteps()
    run = types.ModuleType("selectune.pipeline.run")
    compare = types.ModuleType("selectune.grid.compare")
    verification = types.ModuleType("selectune.pipeline.verification")

    class Run:
        def __init__(
            self, recipe: Recipe, *, out: Path, allow: tuple[str, ...], progress: Progress
        ) -> None:
            self.recipe, self.out, self.progress = recipe, out, progress
            fake.allowed = allow

        def __getattr__(self, name: str) -> Callable[..., FakeResult]:
            def step(**options: object) -> FakeResult:
                fake.options = options
                fake.calls.append((name, self.out, self.recipe))
                fake.act(self.progress)
                return FakeResult(name, self.out)

            return step

    def verify(out: Path) -> types.SimpleNamespace:
        fake.calls.append(("verify", out, None))
        return types.SimpleNamespace(ok=not fake.problems, problems=fake.problems)

    def compare_all(
        recipe: Recipe,
        *,
        out: Path,
        progress: Progress,
        allow: tuple[str, ...],
        tell: Callable[[str], None] | None,
        launch: str,
    ) -> FakeResult:
        fake.allowed = allow
        if tell is not None:
            tell("grid        as foreseen")
        fake.calls.append(("compare", out, recipe))
        return FakeResult("compare", out)

    run.Run, verification.verify, compare.compare = Run, verify, compare_all
    for name, module in (
        ("pipeline.run", run),
        ("pipeline.verification", verification),
        ("grid.compare", compare),
    ):
        monkeypatch.setitem(sys.modules, f"selectune.{name}", module)
        package, _, leaf = name.rpartition(".")
        monkeypatch.setattr(import_module(f"selectune.{package}"), leaf, module, raising=False)
    return fake


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(RECIPE)
    return "demo.yaml"


@pytest.fixture
def child(tmp_path: Path) -> Child:
    (tmp_path / "demo.yaml").write_text(RECIPE)
    return Child(tmp_path)
