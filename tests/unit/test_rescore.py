"""Scores from a finished gradient pass alone equal those of a run that makes it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import selectune
from selectune.errors import ConfigError
from selectune.pipeline.run import Run
from selectune.recipe import load_recipe
from small_run import small_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rescore")
    small_recipe(folder)
    scored(folder)
    return folder


def scored(folder: Path, *overrides: str) -> np.ndarray:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    Run(recipe, out=folder / "run", allow=["score.options", "score.method", "data"]).score()
    return pq.read_table(folder / "run/scores.parquet")["score"].to_numpy()


@pytest.mark.parametrize("method", ["gist", "grad_cosine"])
def test_rescoring_equals_the_run(folder: Path, method: str) -> None:
    expected = scored(folder, f"score.method={method}")
    for place in ("run", "run/store"):
        found = selectune.rescore(method, folder / place, task="colours")
        assert found.score.tobytes() == expected.tobytes()
        assert found.method == method


def test_new_groups_equal_a_run_whose_targets_have_them(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "target.jsonl").read_text().splitlines()]
    before = selectune.rescore("gist", folder / "run", aggregate="max_subtask_mean")
    targets = [name.removeprefix("to:") for name in before.columns if name.startswith("to:")]
    groups = {i: f"group {k % 2}" for k, i in enumerate(targets)}
    found = selectune.rescore("gist", folder / "run", groups=groups, aggregate="max_subtask_mean")
    assert found.score.tolist() != before.score.tolist()
    named = [{**row, "group": f"group {k % 2}"} for k, row in enumerate(rows)]
    (folder / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    expected = scored(folder, "score.options={aggregate: max_subtask_mean}")
    assert found.score.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "less"}, "less cannot be scored from a store"),
        ({"method": "perplexity"}, "use gist or grad_cosine, or `score`"),
        ({"run": "model"}, "no finished gradient pass"),
        ({"groups": {"nobody": "a"}}, '"nobody" is no target of this pass'),
        ({"task": "colour"}, 'did you mean "colours"'),
    ],
)
def test_what_a_store_cannot_answer_is_refused(
    folder: Path, changes: dict[str, object], says: str
) -> None:
    asked = {"method": "gist", "run": "run", **changes}
    method, run = str(asked.pop("method")), folder / str(asked.pop("run"))
    with pytest.raises(ConfigError, match=says):
        selectune.rescore(method, run, **asked)
