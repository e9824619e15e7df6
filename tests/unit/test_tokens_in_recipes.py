"""Token scores of a run: what they add up to, resume, the verb, and training on some tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from slow_tokens import slow_kept

from selectune.errors import ConfigError, CorruptFileError
from selectune.gradients.subspace import rank_of, spectrum
from selectune.gradients.token_scores import mean_weights
from selectune.grid.compare import compare
from selectune.pipeline import token_scoring
from selectune.pipeline.plan import make_plan
from selectune.pipeline.run import Run
from selectune.pipeline.scoring import gradient_store
from selectune.pipeline.token_scoring import keep_tokens, kept_of, token_scores
from selectune.pipeline.verification import verify
from selectune.progress import Silent
from selectune.recipe import Recipe, TokensSection, TuneSection, load_recipe
from small_run import small_recipe


def made(folder: Path, *overrides: str) -> Run:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return Run(recipe, out=Path(recipe.output))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokens have been scored."""
    folder = tmp_path_factory.mktemp("scored")
    small_recipe(folder)
    made(folder).tokens()
    return folder


@pytest.fixture
def copied(scored: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(scored, folder)
    for path in (folder / "recipe.yaml", folder / "run/config.yaml"):
        path.write_text(path.read_text().replace(str(scored), str(folder)))
    return folder


@pytest.mark.parametrize("form", ["loss", "position"])
def test_tokens_add_up_to_the_products_in_the_store(copied: Path, form: str) -> None:
    run = made(copied)
    run.tokens(form=form)
    table = pq.read_table(copied / "run/tokens.parquet").to_pylist()
    assert [row["id"] for row in table] == list(run._ensure_selection().ids)
    stored = gradient_store(run.ground)
    facts = stored.of_task("colours")
    directions = spectrum(facts.gram)
    w = mean_weights(directions, rank_of("energy:0.95", directions, facts.gram, facts.target_ids))
    by_id = dict(zip(stored.ids, facts.dots @ w, strict=True))
    scale = max(abs(by_id[row["id"]]) for row in table)
    for row in table:
        assert row["score"] == pytest.approx(by_id[row["id"]], abs=1e-4 * scale)
        own = [s for s in row["scores"] if s is not None]
        assert sum(own) == pytest.approx(row["score"])
        has_score = [s is not None for s in row["scores"]]
        assert has_score == (row["is_target"] if form == "loss" else [True] * len(has_score))
        text = "".join(row["tokens"])
        assert text.startswith("Question:")
        assert text.endswith("<eos>")
    lines = (copied / "run/tokens.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == table
    assert verify(copied / "run").ok


def test_what_makes_scoring_cheaper_leaves_token_scores_whole(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    found: list[list[np.ndarray]] = []
    for name, cheaper in (
        ("full", []),
        ("cheap", ["score.layers=top:1", "score.max_length=30", "score.precision=bfloat16"]),
        ("fast", ["score.fast=true"]),
    ):
        ground = made(tmp_path, f"output={tmp_path}/{name}", *cheaper).ground
        items = list(ground.tokens.pool)[:6]
        assert any(len(t.input_ids) > 30 for t in items)
        [own] = token_scores(ground, items, rule="energy:0.95", label="a few")
        found.append(list(own.scores))
    for others in found[1:]:
        for mine, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_what_is_scored_is_read_and_only_a_lost_shard_is_computed(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, shards = copied / "run", "score.shard_examples=4"
    recipe = load_recipe(copied / "recipe.yaml", [shards])
    run = Run(recipe, out=out, allow=("score.shard_examples",))
    run.tokens()
    before = (out / "tokens.parquet").read_bytes()
    folders = [p for p in (out / "tokens").iterdir() if p.is_dir()]
    [folder] = [p for p in folders if len(list(p.glob("shard-*"))) == 3]
    shutil.rmtree(folder / "shard-00001")
    (out / "tokens.parquet").unlink()
    entry = json.loads((out / "run.json").read_text())
    del entry["steps"]["tokens"]
    (out / "run.json").write_text(json.dumps(entry))
    seen: list[int] = []
    honest = token_scoring.loss_scores

    def counted(model, batch, direction, precision):  # noqa: ANN001, ANN202
        seen.append(len(batch.ids))
        return honest(model, batch, direction, precision)

    monkeypatch.setattr(token_scoring, "loss_scores", counted)
    made(copied, shards).tokens()
    assert sum(seen) == 4
    assert (out / "tokens.parquet").read_bytes() == before
    made(copied, shards).tokens()
    assert sum(seen) == 4

    shard = folder / "shard-00000/scores.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    again = made(copied, shards)
    items = [t for t in again.ground.tokens.pool if t.id in again._ensure_selection().ids]
    with pytest.raises(CorruptFileError):
        token_scores(again.ground, items, rule="energy:0.95", label="selected")
    (out / "tokens.parquet").write_bytes(b"other")
    with pytest.raises(CorruptFileError):
        made(copied, shards).tokens()


def test_the_report_draws_tokens_of_this_selection_only(copied: Path) -> None:
    run = made(copied)
    run.tokens()  # the copy's model lies elsewhere, which makes it another run
    page = run.report().facts["report"]
    text = Path(page).read_text()
    assert 'id="tokens"' in text
    assert text.count('class="heat"') == 6
    assert "3 of 9" in text
    assert "7 of 9" in text
    assert verify(copied / "run").ok
    recipe = load_recipe(copied / "recipe.yaml", ["select.budget=8"])
    Run(recipe, out=copied / "run", allow=("select",)).report()
    assert 'id="tokens"' not in Path(page).read_text()


def test_named_candidates_need_no_scores_of_the_pool(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    run = made(tmp_path, "warmup.epochs=0")
    ids = [t.id for t in run.ground.tokens.pool[3:5]]
    run.tokens(ids=[ids[1], ids[0], ids[1]])
    rows = pq.read_table(tmp_path / "run/tokens.parquet").to_pylist()
    assert [row["id"] for row in rows] == [ids[1], ids[0]]
    assert not (tmp_path / "run/scores.parquet").exists()
    with pytest.raises(ConfigError) as caught:
        run.tokens(ids=[ids[0], ids[1][:-1] + "7"])
    assert ids[1] in str(caught.value.do)


@pytest.mark.parametrize("keep", ["positive", 0.5, 0.1, 1.0])
def test_kept_tokens_are_those_of_the_twin(keep: str | float) -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7):
        for scores in (rng.normal(size=n), -np.ones(n), np.zeros(n)):
            assert kept_of(scores, keep).tolist() == slow_kept(scores.tolist(), keep)


def test_training_on_some_tokens(copied: Path) -> None:
    run = made(copied)
    chosen = set(run._ensure_selection().ids)
    items = [t for t in run.ground.tokens.pool if t.id in chosen]
    [found] = token_scores(run.ground, items, rule="energy:0.95", label="selected")
    kept = keep_tokens(run.ground, items, TokensSection(keep="positive"), name="selected")
    mixed = TokensSection(keep="positive", shuffled=True)
    shuffled = keep_tokens(run.ground, items, mixed, name="selected")
    for before, after, other, scores in zip(items, kept, shuffled, found.scores, strict=True):
        own = slow_kept(scores[before.is_target].tolist(), "positive")
        assert after.is_target[before.is_target].tolist() == own
        assert not after.is_target[~before.is_target].any()
        assert other.is_target.sum() == after.is_target.sum()
        assert not (other.is_target & ~before.is_target).any()
    assert any((a.is_target != b.is_target).any() for a, b in zip(kept, shuffled, strict=True))


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_run_trains_on_its_tokens_and_the_plain_control_on_all(
    copied: Path, trainer: str
) -> None:
    words = (f"tune.trainer={trainer}", "tune.epochs=1", "tune.controls=[plain]")
    words += (f"output={copied}/{trainer}", "tune.batch_size=16")
    recipe = load_recipe(copied / "recipe.yaml", [*words, "tune.tokens={keep: 0.5}"])
    shutil.copytree(copied / "run", copied / trainer)
    allow = ("tune.trainer", "tune.epochs", "tune.controls", "tune.batch_size", "tune.tokens")
    run = Run(recipe, out=copied / trainer, allow=allow)
    arms = {arm.name: arm for arm in run._ensure_arms()}
    ids = set(run._ensure_selection().ids)
    items = [t for t in run.ground.tokens.pool if t.id in ids]
    kept = keep_tokens(run.ground, items, TokensSection(keep=0.5), name="")
    # All in one step: its loss is the untouched model's mean over the tokens that train.
    for name, some in (("selected", kept), ("plain", items)):
        expected = _mean_nats(run, some)
        assert arms[name].result.losses[0][1] == pytest.approx(expected, rel=1e-5)
    assert (copied / trainer / "tokens.parquet").exists()


def _mean_nats(run: Run, items: list) -> float:
    import torch

    model = run.ground.base().model
    nats: list[float] = []
    for item in items:
        ids = torch.as_tensor(item.input_ids)[None]
        sure = model(input_ids=ids).logits[0].log_softmax(-1).detach()
        nats += [-float(sure[t - 1, int(ids[0, t])]) for t in item.is_target.nonzero()[0]]
    return float(np.mean(nats))


def test_a_grid_has_rows_with_tokens_of_their_own(tmp_path: Path) -> None:
    half = "{name: half, method: gist, tune: {tokens: {keep: 0.5}}}"
    small_recipe(tmp_path, f"matrix: {{methods: [gist, {half}], seeds: [0]}}\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["tune.epochs=1", "warmup.fraction=0.1"])
    compare(recipe, out=tmp_path / "grid", progress=Silent())
    cells = {
        name: json.loads((tmp_path / f"grid/cells/{name}-colours-seed-0/cell.json").read_text())
        for name in ("gist", "half")
    }
    assert cells["gist"] != cells["half"]


def test_folders_from_before_there_were_tokens_stay_good(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    assert "tokens" not in TuneSection().model_dump()
    recipe: Recipe = load_recipe(tmp_path / "recipe.yaml")
    assert "\n  tokens:" not in recipe.resolved_yaml()
    with_tokens = load_recipe(tmp_path / "recipe.yaml", ["tune.tokens.keep=positive"])
    assert "keep: positive" in with_tokens.resolved_yaml()


def test_a_plan_counts_the_scoring(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    run = made(tmp_path, "tune.tokens={keep: 0.3, rank: 2}")
    assert any("token scores" in line for line in make_plan(run.ground).lines())


@pytest.mark.parametrize(
    "words",
    ["tune.tokens={keep: 0.0}", "tune.tokens={keep: negative}", "tune.tokens={rank: energy}"],
)
def test_wrong_tokens_are_refused(tmp_path: Path, words: str) -> None:
    small_recipe(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "recipe.yaml", [words])
    assert "tune.tokens" in str(caught.value)
