"""LESS, TracIn and hidden states in recipes: what is trained, passed over and shared."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import selectune
from selectune.data import Batch
from selectune.errors import ConfigError
from selectune.gradients import store
from selectune.gradients.engine import Consumer, GradientEngine
from selectune.grid.compare import compare
from selectune.models import trainable_fingerprint
from selectune.pipeline import scoring
from selectune.pipeline.ground import Ground
from selectune.pipeline.run import Run
from selectune.pipeline.warmup import warmed_model
from selectune.progress import Silent
from selectune.recipe import load_recipe
from small_run import small_recipe

TWO = ["warmup.schedule_epochs=2", "score.method=less"]


def scored(folder: Path, *overrides: str, out: str = "run") -> Run:
    run = Run(load_recipe(folder / "recipe.yaml", overrides), out=folder / out)
    run.score()
    return run


def column(folder: Path, name: str = "score", out: str = "run") -> np.ndarray:
    return pq.read_table(folder / out / "scores.parquet")[name].to_numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_recipe(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Return a folder in which LESS has scored, and the run that did."""
    folder = tmp_path_factory.mktemp("less")
    small_recipe(folder)
    return folder, scored(folder, *TWO)


def stores(folder: Path, out: str = "run") -> list[str]:
    return sorted(p.name for p in (folder / out).glob("store*") if p.is_dir())


def test_less_reads_every_epoch_and_scores_again_without_a_pass(
    done: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = done
    assert stores(folder) == ["store-1-release", "store-2-release"]
    ends = sorted(p.name for p in (folder / "run/warmup").glob("checkpoint-*"))
    assert ends == ["checkpoint-3", "checkpoint-6"]
    about = json.loads(pq.read_schema(folder / "run/scores.parquet").metadata[b"selectune"])
    rates = about["about"]["tasks"]["colours"]["learning_rates"]
    assert len(rates) == 2
    assert rates[0] > rates[1] > 0
    assert {"gradients 1-release", "gradients 2-release"} <= run.ground.costs.keys()
    before = column(folder)

    def no_pass(*_: object, **__: object) -> None:
        raise AssertionError("a pass was made again")

    monkeypatch.setattr(scoring, "GradientEngine", no_pass)
    # Another aggregate asks the stores; the first one again gives the same bytes.
    changed = Run(
        load_recipe(folder / "recipe.yaml", [*TWO, "score.options={aggregate: cosine_of_mean}"]),
        out=folder / "run",
        allow=["score.options"],
    )
    changed.score()
    assert column(folder).tolist() != before.tolist()
    Run(
        load_recipe(folder / "recipe.yaml", TWO), out=folder / "run", allow=["score.options"]
    ).score()
    assert column(folder).tobytes() == before.tobytes()


@pytest.mark.parametrize("batch", [4, 16])  # three steps an epoch, and one
def test_scorers_of_later_epochs_leave_the_first_alone(batch: int, folder: Path) -> None:
    more = [f"tune.batch_size={batch}", "tune.warmup_ratio=0.3", "score.method=gist"]
    recipe = load_recipe(folder / "recipe.yaml", more)
    found: list[str] = []
    for n in (0, 4):
        out = folder / f"kept-{n}"
        ground = Ground(
            recipe, out, shared=None, tasks=None, progress=Silent(), checkpoint_epochs=n
        )
        found.append(trainable_fingerprint(warmed_model(ground, ground.base())))
    assert found[0] == found[1]
    fresh = load_recipe(folder / "recipe.yaml", [*more, "warmup.epochs=0"])
    ground = Ground(fresh, folder / "fresh", shared=None, tasks=None, progress=Silent())
    assert trainable_fingerprint(warmed_model(ground, ground.base())) != found[0]


def test_gist_finds_the_pass_that_tracin_made(folder: Path) -> None:
    scored(folder, *TWO[:1], "score.method=tracin")
    assert stores(folder) == ["store", "store-2"]
    made_at = (folder / "run/store/pool/manifest.json").stat().st_mtime_ns
    run = Run(
        load_recipe(folder / "recipe.yaml", TWO[:1]), out=folder / "run", allow=["score.method"]
    )
    scoring.score_pool(run.ground, "tracin", {})
    scoring.score_pool(run.ground, "gist", {})
    assert (folder / "run/store/pool/manifest.json").stat().st_mtime_ns == made_at


def test_tracin_of_one_checkpoint_ranks_by_products_of_one_store(folder: Path) -> None:
    run = scored(folder, "score.method=tracin", "score.options={epochs: 1}")
    stored = scoring.gradient_store(run.ground)
    products = stored.facts.dots.astype(np.float64).mean(1)
    np.testing.assert_allclose(column(folder) / column(folder).max(), products / products.max())


def test_a_comparison_warms_up_once_and_shares_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_stores: list[int] = []
    plain = store._run_batch

    def counted(engine: object, items: object, products: list, *rest: object) -> None:
        n_stores.append(len(products))
        plain(engine, items, products, *rest)

    monkeypatch.setattr(store, "_run_batch", counted)
    path = folder / "recipe.yaml"
    path.write_text(path.read_text() + "matrix: {methods: [grad_cosine, tracin, less, rds]}\n")
    recipe = load_recipe(path, [*TWO[:1], "tune.epochs=1"])
    table = compare(recipe, out=folder / "grid", progress=Silent())
    rows = [row.method for row in table.rows if row.task == "colours"]
    assert rows == ["base", "random", "grad_cosine", "tracin", "less", "rds"]
    shared = folder / "grid/shared"
    assert len([p for p in (shared / "warmup").iterdir() if p.is_dir()]) == 1
    # Plain at both ends, of which one is grad_cosine's, and Adam's at both.
    assert len([p for p in (shared / "store").iterdir() if p.is_dir()]) == 4
    assert set(n_stores) == {2}
    assert len([p for p in (shared / "states").iterdir() if p.is_dir()]) == 1


def test_one_pass_at_a_checkpoint_serves_every_scorer_that_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []  # of candidates and of targets
    plain = GradientEngine.run

    def counted(engine: GradientEngine, batch: Batch, consume: Consumer) -> torch.Tensor:
        batches.append(1)
        return plain(engine, batch, consume)

    monkeypatch.setattr(GradientEngine, "run", counted)
    methods = ("tracin", "less", "gist", "grad_cosine")
    alone = {}
    for method in methods:
        before = len(batches)
        scored(folder, TWO[0], f"score.method={method}", out=method)
        alone[method] = column(folder, out=method)
        if method == "less":
            once = len(batches) - before
            assert once
    batches.clear()
    path = folder / "recipe.yaml"
    for order in (methods, methods[::-1]):
        more = [TWO[0], f"matrix={{methods: [{', '.join(order)}]}}"]
        run = Run(load_recipe(path, more), out=folder / "_".join(order))
        for method in order:
            found = scoring.score_pool(run.ground, method, {}).score
            np.testing.assert_allclose(found, alone[method], rtol=1e-6, atol=1e-9)
        steps = ["gradients", "gradients 1-release", "gradients 2", "gradients 2-release"]
        assert sorted(step for step in run.ground.costs if "grad" in step) == steps
        assert len(batches) == once
        batches.clear()


def test_states_are_kept_for_both_scorers_that_read_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(folder, "score.method=rds")
    first = column(folder)
    monkeypatch.setattr(scoring, "state_similarity", None)
    run = Run(load_recipe(folder / "recipe.yaml", ["score.method=rds"]), out=folder / "run")
    embedded = scoring.score_pool(run.ground, "embedding", {})
    assert embedded.score.tolist() != first.tolist()
    assert scoring.score_pool(run.ground, "rds", {}).score.tobytes() == first.tobytes()
    assert not (folder / "run/warmup").exists()


def test_more_checkpoints_than_epochs_are_refused_before_anything_trains(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", [*TWO, "score.options={epochs: 3}"])
    with pytest.raises(ConfigError, match="3 checkpoints of a warm-up of 2 epochs"):
        Run(recipe, out=folder / "run").score()
    with pytest.raises(ConfigError, match="3 checkpoints of a warm-up of 2 epochs"):
        Run(recipe, out=folder / "run").plan()
    assert not (folder / "run/warmup").exists()


def test_the_checkpoints_of_a_trainer_of_the_users_own_take_the_warm_ups_place(
    done: tuple[Path, Run],
) -> None:
    folder, _ = done
    no_section = "warmup.fraction=0.05"  # as if there were none
    own = [no_section, f"model.adapter={folder}/run/warmup"]
    scored(folder, *own, "score.method=less", out="own")
    assert not (folder / "own/warmup").exists()
    assert column(folder, out="own").tobytes() == column(folder).tobytes()
    one = [no_section, f"model.adapter={folder}/run/warmup/checkpoint-3"]
    scored(folder, *one, "score.method=less", "score.options={adam: none}", out="one")
    scored(folder, *one, "score.method=grad_cosine", "score.options={aggregate: mean}", out="plain")
    np.testing.assert_allclose(column(folder, out="one"), column(folder, out="plain"))
    with pytest.raises(ConfigError, match="no peft adapter"):
        scored(folder, *own, "score.method=gist", out="gist")


def test_the_plan_says_what_checkpoints_cost(folder: Path) -> None:
    plain = Run(load_recipe(folder / "recipe.yaml"), out=folder / "run").plan()
    options = [*TWO, "score.options={projection: 'rademacher:64'}"]
    plan = Run(load_recipe(folder / "recipe.yaml", options), out=folder / "run").plan()
    text = "\n".join(plan.lines())
    assert (
        "pool epochs 3.01: warm-up 0.4, gradients at 2 checkpoints 2, tune selected 0.305, "
        "tune random 0.305; training once on everything is 1"
    ) in text
    facts, before = plan.to_json(), plain.to_json()
    assert facts["disk_bytes"]["store"] == 2 * before["disk_bytes"]["store"]
    assert facts["memory_bytes"]["moments of Adam"] == 8 * facts["trainable"]["parameters"]
    assert facts["disk_bytes"]["checkpoints of the warm-up"] == 2 * 12 * 512
    arms = {"tune selected": pytest.approx(2 * 9 / 59), "tune random": pytest.approx(2 * 9 / 59)}
    assert facts["pool_epochs"] == {"warm-up": 0.4, "gradients at 2 checkpoints": 2.0, **arms}
    assert before["pool_epochs"] == {"warm-up": 0.2, "gradients": 1.0, **arms}
    scored_by = ["score.method=perplexity"]
    forward = Run(load_recipe(folder / "recipe.yaml", scored_by), out=folder / "run").plan()
    assert forward.to_json()["pool_epochs"] == {"base losses": 0.5, **arms}
    assert "projections" in facts["seconds"]


def test_python_and_recipe_agree_on_a_trainers_folder(done: tuple[Path, Run]) -> None:
    folder, _ = done
    scores = selectune.score(
        "less",
        str(folder / "model"),
        str(folder / "pool.jsonl"),
        str(folder / "target.jsonl"),
        checkpoints=folder / "run/warmup",
        max_length=128,
        token_budget=400,
        precision="float32",
    )
    table = pq.read_table(folder / "run/scores.parquet")
    mine = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    assert mine.keys() <= set(scores.ids)  # a recipe drops repeats
    for example_id, value in mine.items():
        assert scores[example_id] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["gist", "less", "tracin", "rds", "perplexity", "length"])
def test_the_steps_that_a_scorer_needs_are_those_that_were_paid_for(
    folder: Path, method: str
) -> None:
    run = scored(folder, "warmup.schedule_epochs=2", f"score.method={method}")
    section = run.recipe.score
    steps = scoring.evidence_steps(run.recipe, section.method, dict(section.options))
    assert sorted(steps) == sorted(run.ground.costs)
