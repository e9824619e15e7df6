"""A training that ends when the space of the target gradients rests."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from loops import loop_gradients
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from slow_gist import slow_overlap

from selectune.errors import ConfigError
from selectune.pipeline.run import Run
from selectune.recipe import load_recipe
from selectune.training import TuneResult
from selectune.training.overlap import UntilOverlap
from small_run import small_recipe

Tune = Callable[..., TuneResult]
TASKS = ("a", "b", "a", "b", "a", "a", "b", "a", "b")


class Killed(BaseException):
    """Stands for a process that is gone."""


def until(folder: Path, above: float) -> UntilOverlap:
    return UntilOverlap(every=2, times=2, above=above, tasks=TASKS, folder=folder)


def slow_overlaps(checkpoints: Path, tiny: ModuleType) -> list[float]:
    """Return the overlap of every other checkpoint with the one two steps before, least task."""
    targets = tiny.tiny_items(20)[11:]
    gradients: list[np.ndarray] = []
    for step in (2, 4, 6, 8, 10, 12):
        model = tiny.tiny_lora().eval()
        saved = load_file(checkpoints / f"checkpoint-{step}" / "adapter_model.safetensors")
        set_peft_model_state_dict(model, saved)
        columns = loop_gradients(model.double(), targets).values()
        gradients.append(np.concatenate([c.flatten(1).numpy() for c in columns], 1))
    own = [[j for j, name in enumerate(TASKS) if name == task] for task in ("a", "b")]
    return [
        min(slow_overlap(before[rows], now[rows], 0.95) for rows in own)
        for before, now in itertools.pairwise(gradients)
    ]


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_it_ends_where_the_twin_says_and_changes_nothing_before(
    run: Tune, tiny: ModuleType, tmp_path: Path, trainer: str
) -> None:
    options = tiny.section(epochs=4, save_every=1, keep_checkpoints=99, trainer=trainer)
    plain = run("plain", options=options)
    expected = slow_overlaps(tmp_path / "plain", tiny)
    above = min(expected[1:3]) - 0.01
    in_a_row = [value > above for value in expected]
    last = next(k for k in range(1, 5) if in_a_row[k - 1] and in_a_row[k])
    targets = tiny.tiny_items(20)[11:]
    method = until(tmp_path / "spaces", above)
    ended = run("ended", options=options, method=method, target=targets)
    assert ended.n_steps == 2 * last + 4 < plain.n_steps
    found = [facts["overlap"] for _, facts in ended.records if "overlap" in facts]
    assert found[0] is None
    np.testing.assert_allclose(found[1:], expected[: last + 1], rtol=1e-4)
    assert ended.losses == plain.losses[: ended.n_steps]
    before = tmp_path / "plain" / f"checkpoint-{ended.n_steps}" / "adapter_model.safetensors"
    assert (ended.path / "adapter_model.safetensors").read_bytes() == before.read_bytes()


def test_a_kill_at_any_step_changes_nothing(run: Tune, tiny: ModuleType, tmp_path: Path) -> None:
    targets = tiny.tiny_items(20)[11:]

    def train(name: str, log: Callable[[dict[str, Any]], None]) -> TuneResult:
        # A checkpoint stands at the last step too: who resumes there must not train on.
        options = tiny.section(epochs=4, save_every=3)
        method = until(tmp_path / name / "spaces", 0.01)
        return run(name, options=options, method=method, target=targets, log=log)

    unbroken = train("unbroken", lambda row: None)
    assert unbroken.n_steps == 6
    for step in (3, 4, 5, 6):

        def die(row: dict[str, Any], step: int = step) -> None:
            if row.get("step") == step:
                raise Killed

        with pytest.raises(Killed):
            train(f"killed-{step}", die)
        resumed = train(f"killed-{step}", lambda row: None)
        assert (resumed.losses, resumed.records) == (unbroken.losses, unbroken.records)
        files = [r.path / "adapter_model.safetensors" for r in (resumed, unbroken)]
        assert files[0].read_bytes() == files[1].read_bytes()
    # Killed when the last checkpoint stood and the adapter did not.
    (tmp_path / "unbroken" / "adapter").rename(tmp_path / "aside")
    again = train("unbroken", lambda row: None)
    assert (again.losses, again.records) == (unbroken.losses, unbroken.records)


def test_a_recipe_ends_its_warm_up_and_says_when(tmp_path: Path) -> None:
    changes = ["until=overlap", "epochs=4", "overlap_every=1", "overlap=0.01", "overlap_times=3"]
    recipe = load_recipe(small_recipe(tmp_path), [f"warmup.{change}" for change in changes])
    Run(recipe, out=Path(recipe.output)).score()
    facts = json.loads((tmp_path / "run/run.json").read_text())["steps"]["score"]["facts"]
    assert facts["costs"]["warmup"]["n_steps"] == 4  # of 12, the first check has none before it
    assert len(facts["costs"]["warmup"]["overlaps"]) == 3
    assert not (tmp_path / "run/warmup/directions").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["warmup.overlap=0.8"], "warmup.overlap would not be used"),
        (["warmup.until=overlap", "warmup.epochs=0"], "no warm-up to end early"),
        (["warmup.until=overlap", "score.method=less"], "less needs a warm-up of a fixed length"),
        (["warmup.until=overlap", "tune.controls=[tracin]"], "tracin needs a warm-up"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe(small_recipe(tmp_path), changes)
