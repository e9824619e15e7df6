"""A training that chooses anew on its way."""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from slow_reselection import flat, slow_reselection
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from selectune.adapters import add_adapter
from selectune.errors import ConfigError
from selectune.gradients.engine import GradientEngine
from selectune.grid.compare import compare
from selectune.pipeline import scoring
from selectune.pipeline.reselection import n_rescored, refresh_steps
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import load_recipe
from small_run import small_recipe

ALONE = ["tune.controls=[]"]


def made(path: Path, *changes: str) -> Run:
    recipe = load_recipe(path, [*ALONE, *changes])
    return Run(recipe, out=Path(recipe.output))


@pytest.mark.parametrize(
    ("every", "n_steps", "expected"),
    [
        (0.25, 12, [3, 6, 9]),
        (0.25, 6, [2, 3, 4]),
        (0.5, 3, [2]),
        (0.3, 10, [3, 6, 9]),
        (0.9, 1, []),
        (4, 10, [4, 8]),
        (4, 8, [4]),
        (9, 8, []),
    ],
)
def test_steps_after_which_it_chooses(
    every: int | float, n_steps: int, expected: list[int]
) -> None:
    assert refresh_steps(every, n_steps) == expected


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_it_equals_the_twin(tmp_path: Path, trainer: str) -> None:
    path = small_recipe(tmp_path)
    run = made(path, "tune.reselect_every=0.25", f"tune.trainer={trainer}")
    run.tune()
    table = pq.read_table(tmp_path / "run/scores.parquet")
    scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    recipe, tokens = run.recipe, run.ground.tokens
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model = add_adapter(model, recipe.adapter, seed=recipe.seed)
    losses, chosen = slow_reselection(
        model, list(tokens.pool), list(tokens.targets["colours"]), scores, recipe.tune,
        n=9, after=[2, 3, 4], seed=recipe.seed,
    )  # fmt: skip
    folder = tmp_path / "run/phases/selected"
    found = [json.loads((folder / f"refresh-{k}/chosen.json").read_text()) for k in (1, 2, 3)]
    assert found == chosen[1:]
    facts = json.loads((tmp_path / "run/run.json").read_text())["steps"]["tune"]["facts"]
    told = facts["arms"]["selected"]["reselected"]
    news = [len(set(b) - set(a)) for a, b in itertools.pairwise(chosen)]
    assert sum(news) > 0
    assert told == [
        {"step": step, "n_new": n_new, "n": 9, "n_shortlist": 36}
        for step, n_new in zip((2, 3, 4), news, strict=True)
    ]
    assert facts["costs"]["refresh 1 selected"]["seconds"] > 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["loss"] for line in lines], losses, rtol=1e-4)
    saved = load_file(tmp_path / "run/tune/selected/adapter/adapter_model.safetensors")
    assert_close(saved, get_peft_model_state_dict(model), rtol=1e-3, atol=1e-5)
    assert not list(folder.glob("phase-*"))  # what only served to go on
    run.report()
    assert "after step 2, " in (tmp_path / "run/report.html").read_text()


def test_what_makes_scoring_cheaper_makes_choosing_anew_as_cheap(tmp_path: Path) -> None:
    changes = ["tune.reselect_every=0.5", "score.layers=top:1", "score.max_length=30"]
    run = made(small_recipe(tmp_path), *changes)
    run.tune()
    table = pq.read_table(tmp_path / "run/scores.parquet")
    scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    recipe, tokens = run.recipe, run.ground.tokens

    def twin(look: Callable[..., np.ndarray]) -> tuple[list[float], list[list[str]]]:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        return slow_reselection(
            add_adapter(model, recipe.adapter, seed=recipe.seed), list(tokens.pool),
            list(tokens.targets["colours"]), scores, recipe.tune,
            n=9, after=[3], seed=recipe.seed, look=look,
        )  # fmt: skip

    losses, chosen = twin(partial(flat, within=".layers.1.", max_length=30))
    found = json.loads((tmp_path / "run/phases/selected/refresh-1/chosen.json").read_text())
    assert found == chosen[1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["loss"] for line in lines], losses, rtol=1e-4)
    # Each of the two alone, and none, would choose otherwise.
    for others in ({}, {"within": ".layers.1."}, {"max_length": 30}):
        assert twin(partial(flat, **others))[1][1] != found


def test_choosing_anew_takes_gradients_in_the_precision_of_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Told(GradientEngine):
        def __init__(self, model: nn.Module, *, precision: str) -> None:
            seen.append(precision)
            super().__init__(model, precision=precision)

    monkeypatch.setattr(scoring, "GradientEngine", Told)
    path = small_recipe(tmp_path)
    made(path, "tune.reselect_every=3", "score.precision=bfloat16").tune()
    assert seen == ["bfloat16", "bfloat16"]  # over the pool, and over the shortlist


def test_another_economy_chooses_anew_again_where_the_first_choice_is_the_same(
    tmp_path: Path,
) -> None:
    path = small_recipe(tmp_path)
    everything, anew = "select.budget=1.0", "tune.reselect_every=7"
    made(path, everything, anew).tune()
    refresh = tmp_path / "run/phases/selected/refresh-1"
    before = pq.read_table(refresh / "scores.parquet")["score"].to_pylist()
    recipe = load_recipe(path, [*ALONE, everything, anew, "score.layers=top:1"])
    Run(recipe, out=tmp_path / "run", allow=["score.layers"]).tune()
    after = pq.read_table(refresh / "scores.parquet")["score"].to_pylist()
    assert before != after


def test_layers_in_which_nothing_will_train_are_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    tuned = "tune.adapter={rank: 2, modules: [q_proj], layers: [0]}"
    run = made(small_recipe(tmp_path), "tune.reselect_every=3", "score.layers=top:1", tuned)
    with pytest.raises(ConfigError, match="nothing trains in the last 1 of 2 layers"):
        run.tune()
    assert not (tmp_path / "run/phases").exists()


def test_it_may_choose_anew_before_any_weight_has_moved(tmp_path: Path) -> None:
    # The first step of a schedule with a warm-up has a learning rate of zero.
    changes = ["tune.reselect_every=1", "tune.warmup_ratio=0.3", "tune.epochs=1"]
    made(small_recipe(tmp_path), *changes).tune()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_choosing_the_same_again_changes_no_bit(tmp_path: Path) -> None:
    # All of the pool, so that no choice is left; dropout draws must go on where they stopped.
    whole = ["select.budget=1.0", "adapter.dropout=0.2", "tune.epochs=1", "tune.save_every=3"]
    files: list[bytes] = []
    for name, more in (("kept", []), ("anew", ["tune.reselect_every=5"])):
        (tmp_path / name).mkdir()
        made(small_recipe(tmp_path / name), *whole, *more).tune()
        folder = tmp_path / name / "run"
        files.append((folder / "tune/selected/adapter/adapter_model.safetensors").read_bytes())
        files.append((folder / "metrics.jsonl").read_bytes())
    assert files[:2] == files[2:]
    assert (tmp_path / "anew/run/phases/selected/refresh-2").exists()


def test_the_same_command_again_trains_nothing(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    made(path, "tune.reselect_every=3", "tune.controls=[random, grad_cosine]").tune()
    arms = json.loads((tmp_path / "run/run.json").read_text())["steps"]["tune"]["facts"]["arms"]
    # A control that looks at gradients chooses anew as well, another one cannot.
    assert "reselected" in arms["grad_cosine"]
    assert "reselected" not in arms["random"]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/tune").rglob("adapter/*")}
    made(path, "tune.reselect_every=3", "tune.controls=[random, grad_cosine]").tune()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run/tune").rglob("adapter/*")} == stamps


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["tune.reselect_every=1.0"], "reselect_every"),
        (["tune.reselect_every=0.5", "score.method=random"], "random would choose the same"),
        (["tune.reselect_every=0.5", "select.budget=300 tokens"], "another number of examples"),
        (["tune.reselect_every=0.5", "tune.weights={method: gallop}"], "single weights cannot"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe(small_recipe(tmp_path), changes)


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ("[gist, rds]", "rds"),
        ("[{name: mine, method: less}, gist]", "mine"),
        ("[{name: mine, method: tracin, tune: {method: gast}}]", "mine"),
        ("[{name: mine, method: rds, tune: {reselect_every: null}}]", "mine"),
    ],
)
def test_a_row_that_cannot_do_what_all_rows_are_told_is_refused(
    tmp_path: Path, rows: str, name: str
) -> None:
    changes = ["tune.reselect_every=0.5", f"matrix.methods={rows}"]
    with pytest.raises(ConfigError, match=f'row "{name}"') as caught:
        load_recipe(small_recipe(tmp_path), changes)
    assert "would choose the same" in caught.value.what
    assert "tune: {reselect_every: 0.5}" in caught.value.do


@pytest.mark.parametrize(
    ("everywhere", "own", "method", "is_refused"),
    [
        ("tune.reselect_every=3", "weights: {method: gallop}", "gist", True),
        ("tune.weights={method: gallop}", "reselect_every: 3", "gist", True),
        ("tune.weights={method: gallop}", "adapter: {}, reselect_every: 3", "gist", False),
        ("tune.reselect_every=3", "weights: {method: gallop}", "random", False),
    ],
)
def test_a_row_is_checked_with_what_it_takes_from_all_rows(
    tmp_path: Path, everywhere: str, own: str, method: str, is_refused: bool
) -> None:
    row = f"{{name: mine, method: {method}, tune: {{{own}}}}}"
    changes = [everywhere, f"matrix.methods=[random, {row}]"]
    path = small_recipe(tmp_path)
    if not is_refused:
        load_recipe(path, changes)
        return
    with pytest.raises(ConfigError, match="single weights cannot") as caught:
        load_recipe(path, changes)
    assert "matrix.methods" in caught.value.where


def test_what_stands_beside_in_a_grid_stays_as_it_is(tmp_path: Path) -> None:
    path, everywhere = small_recipe(tmp_path), "tune.reselect_every=3"
    # As among the controls of one run.
    recipe = load_recipe(path, [everywhere, "matrix.methods=[random, full, gist]"])
    table = compare(recipe, out=tmp_path / "grid", progress=Silent())
    assert {row.method for row in table.rows} >= {"random", "full", "gist"}
    for name, n_refreshes in (("random", 0), ("full", 0), ("gist", 1)):
        cell = tmp_path / f"grid/cells/{name}-colours-seed-0"
        assert len(json.loads((cell / "cell.json").read_text())["reselected"]) == n_refreshes
        assert load_recipe(cell / "config.yaml").tune.reselect_every == 3  # a cell replays
    # A row that is told by itself to choose anew has to be able to.
    for method in ("random", "full"):
        row = f"{{name: mine, method: {method}, tune: {{reselect_every: 3}}}}"
        with pytest.raises(ConfigError, match=f"{method} would choose the same"):
            load_recipe(path, [f"matrix.methods=[gist, {row}]"])


def test_rows_of_a_grid_warm_up_and_choose_anew_on_their_own(tmp_path: Path) -> None:
    rows = (
        "[gist, {name: rests, method: gist, warmup: {until: overlap, epochs: 4, overlap: 0.01, "
        "overlap_every: 1, overlap_times: 1}}, "
        "{name: anew, method: gist, tune: {reselect_every: 3}}]"
    )
    changes = [f"matrix.methods={rows}", "score.fast=true"]
    recipe = load_recipe(small_recipe(tmp_path), changes)
    out = tmp_path / "grid"
    table = compare(recipe, out=out, progress=Silent())
    _says_how_alike_fast_scores_are(out, tmp_path / "recipe.yaml")
    assert {row.method for row in table.rows} >= {"gist", "rests", "anew"}
    assert table.costs["0 rests"]["warmup"]["n_steps"] == 2
    assert "n_steps" not in table.costs["0"]["warmup"]
    cells = {
        name: json.loads((out / f"cells/{name}-colours-seed-0/cell.json").read_text())
        for name in ("gist", "anew")
    }
    assert cells["gist"]["reselected"] == []
    (refresh,) = cells["anew"]["reselected"]
    assert (refresh["step"], refresh["n"], refresh["n_shortlist"]) == (3, 9, 36)
    assert not list(out.glob("shared/phases/*/phase-*"))


def _says_how_alike_fast_scores_are(out: Path, path: Path) -> None:
    fast = json.loads((out / "table.json").read_text())["fast"]
    assert [(one["method"], one["tasks"], one["seed"]) for one in fast] == [
        (method, ["colours"], 0) for method in ("gist", "rests", "anew")
    ]
    rests = "warmup={until: overlap, epochs: 4, overlap: 0.01, overlap_every: 1, overlap_times: 1}"
    alike: list[float] = []
    for name, changes in (("gist", []), ("rests", [rests])):
        run = Run(load_recipe(path, ["score.fast=true", *changes]), out=out.parent / name)
        run.score()
        facts = json.loads((out.parent / name / "run.json").read_text())["steps"]["score"]["facts"]
        alike.append(facts["about"]["fast"]["spearman"])
    # As a run of each row's own says; another checkpoint, another likeness.
    assert [one["spearman"] for one in fast] == [alike[0], alike[1], alike[0]]
    assert alike[0] != alike[1]
    told = (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    for one in fast:
        line = (
            f"Spearman {one['spearman']:.3f} with full scores on {one['n_probe']} random examples"
        )
        assert line in told
        assert line in page
    # A cell without gradient passes comes out anew without what makes them cheaper.
    fast = {
        name: load_recipe(out / f"cells/{name}-colours-seed-0/config.yaml").score.fast
        for name in ("random", "gist")
    }
    assert fast == {"random": False, "gist": True}


def test_what_will_be_scored_again_is_counted(tmp_path: Path) -> None:
    recipe = load_recipe(small_recipe(tmp_path), ["tune.reselect_every=0.25"])
    # Six steps, after three of which it looks at four times nine examples, or at the whole pool.
    assert n_rescored(recipe.tune, "gist", 9, 56) == 3 * 36
    assert n_rescored(recipe.tune, "gist", 9, 20) == 3 * 20
    assert n_rescored(recipe.tune, "random", 9, 56) == 0
    assert n_rescored(recipe.tune.plainly(), "gist", 9, 56) == 0
