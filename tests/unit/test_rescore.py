"""Scores from a finished gradient pass alone equal those of a run that makes it."""

import json
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

import selectune
from selectune.errors import ConfigError
from selectune.methods.data.gist import Aggregate
from selectune.pipeline.run import Run
from selectune.pipeline.scoring import score_pool
from selectune.recipe import load_recipe
from small_run import small_recipe
from workspace import question, write_jsonl


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


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for two tasks, the targets of one of them in three subtasks; and one for that alone."""
    folder = tmp_path_factory.mktemp("mixed")
    path, rng = small_recipe(folder), random.Random(5)
    kinds = ("sums", "colours", "words")
    rows = [{**question(kinds[k % 3], rng), "group": kinds[k % 3]} for k in range(12)]
    write_jsonl(folder / "mixed.jsonl", rows)
    text, alone = path.read_text(), f"{{colours: {folder}/target.jsonl}}"
    for name, targets, more in (
        ("both", f"{{colours: {folder}/target.jsonl, mixed: {folder}/mixed.jsonl}}", []),
        ("alone", f"{{mixed: {folder}/mixed.jsonl}}", ["score.shard_examples=100"]),
    ):
        known = text.replace(alone, targets, 1).replace("heldout: {colours", "heldout: {mixed")
        path.write_text(known)
        Run(load_recipe(path, more), out=folder / name).score()
    return folder


@pytest.mark.parametrize("aggregate", get_args(Aggregate))
def test_rescoring_equals_scoring_anew_for_every_rank_and_aggregate(
    mixed: Path, aggregate: Aggregate
) -> None:
    recipe = load_recipe(mixed / "recipe.yaml", ["score.shard_examples=100"])  # of "alone"
    ground = Run(recipe, out=mixed / "alone").ground
    seen: set[tuple[int, bytes]] = set()
    for rank in (2, 5, "energy:0.8", "energy:0.95", "full", "loo", "gap", "split:0.9"):
        for energy in ("report", "multiply"):
            options = {"rank": rank, "aggregate": aggregate, "energy": energy}
            anew = score_pool(ground, "gist", options)
            found = selectune.rescore("gist", mixed / "both", task="mixed", **options)
            assert found.ids == anew.ids
            assert found.about["rank"] == anew.about["tasks"]["mixed"]["rank"]
            assert found.columns.keys() == anew.columns.keys()
            np.testing.assert_allclose(found.score, anew.score, rtol=1e-4, atol=1e-5)
            for name, column in anew.columns.items():
                np.testing.assert_allclose(found.columns[name], column, rtol=1e-4, atol=1e-5)
            seen.add((found.about["rank"], found.score.tobytes()))
    assert len(seen) >= 8  # the options decide


@pytest.mark.parametrize("method", ["gist", "grad_cosine"])
def test_some_of_the_targets_equal_a_run_that_has_no_others(mixed: Path, method: str) -> None:
    rows = (mixed / "mixed.jsonl").read_text().splitlines(keepends=True)
    (mixed / "some.jsonl").write_text("".join(rows[1:12:2]))
    changes = [f"data.target={{mixed: {mixed}/some.jsonl}}", f"score.method={method}"]
    run = Run(load_recipe(mixed / "recipe.yaml", changes), out=mixed / f"some-{method}")
    expected = score_pool(run.ground, method, {})
    some = [name.removeprefix("to:") for name in expected.columns if name.startswith("to:")]
    found = selectune.rescore(method, mixed / "both", task="mixed", targets=some[::-1])
    assert len(some) == 6
    assert set(found.columns) == set(expected.columns)
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-4, atol=1e-5)


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
        ({"targets": ["nobody"]}, '"nobody" is no target of this pass'),
        ({"targets": []}, "no target is left to score by"),
    ],
)
def test_what_a_store_cannot_answer_is_refused(
    folder: Path, changes: dict[str, object], says: str
) -> None:
    asked = {"method": "gist", "run": "run", **changes}
    method, run = str(asked.pop("method")), folder / str(asked.pop("run"))
    with pytest.raises(ConfigError, match=says):
        selectune.rescore(method, run, **asked)
