"""One run end to end on a tiny model, and what a second look at its folder finds."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectune.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    IncompatibleRunError,
    SelectionError,
)
from selectune.models import Base
from selectune.pipeline import ground
from selectune.pipeline.run import Run
from selectune.pipeline.verification import verify
from selectune.progress import Silent
from selectune.recipe import ModelSection, Recipe, load_recipe
from selectune.selection import Selection
from small_run import small_recipe
from workspace import save_model


def made(folder: Path, *overrides: str, allow: tuple[str, ...] = ()) -> Run:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return Run(recipe, out=Path(recipe.output), allow=allow)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small_recipe(folder)
    made(folder).all()
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    text = (folder / "recipe.yaml").read_text().replace(str(finished), str(folder))
    (folder / "recipe.yaml").write_text(text)
    for config in folder.glob("run/config.yaml"):
        config.write_text(config.read_text().replace(str(finished), str(folder)))
    return folder


def test_a_run_leaves_what_the_documents_promise(finished: Path) -> None:
    names = {p.name for p in (finished / "run").iterdir()}
    expected = {
        "config.yaml", "run.json", "metrics.jsonl", "scores.parquet", "selected.jsonl",
        "selected.parquet", "selection", "store", "warmup", "tune", "evaluation",
        "evaluation.json", "report.html",
    }  # fmt: skip
    assert expected <= names
    assert not [n for n in names if "tmp" in n]


def test_the_selection_carries_ids_ranks_and_reasons(finished: Path) -> None:
    lines = (finished / "run/selected.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    scores = pq.read_table(finished / "run/scores.parquet").to_pylist()
    best = sorted(scores, key=lambda r: (-r["score"], r["id"]))[:9]
    assert [r["selectune"]["id"] for r in rows] == [r["id"] for r in best]
    assert [r["selectune"]["rank"] for r in rows] == list(range(1, 10))
    assert all(r["prompt"] and r["completion"] and r["selectune"]["reason"] for r in rows)
    table = pq.read_table(finished / "run/selected.parquet").to_pylist()
    assert [r["id"] for r in table] == [r["selectune"]["id"] for r in rows]


def test_the_same_command_again_computes_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "run/store").rglob("*")}
    adapter = finished / "run/tune/selected/adapter/adapter_model.safetensors"
    stamp = adapter.stat().st_mtime_ns
    made(finished).all()
    assert {p: p.stat().st_mtime_ns for p in (finished / "run/store").rglob("*")} == before
    assert adapter.stat().st_mtime_ns == stamp


def test_config_yaml_replays_the_run(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(finished / "run/config.yaml", [f"output={tmp_path / 'again'}"])
    Run(recipe, out=tmp_path / "again").all()
    for name in ("scores.parquet", "selected.jsonl", "metrics.jsonl"):
        first, second = (finished / "run" / name), (tmp_path / "again" / name)
        assert first.read_bytes() == second.read_bytes(), name


def test_verify_accepts_a_sound_run_and_names_a_damaged_file(copied: Path) -> None:
    assert verify(copied / "run").ok
    file = copied / "run/selected.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    found = verify(copied / "run")
    assert not found.ok
    assert "selected.jsonl" in found.problems[0]


@pytest.mark.parametrize("field", ["libraries", "hardware", "inputs", "seed", "steps"])
def test_verify_names_a_missing_field(copied: Path, field: str) -> None:
    path = copied / "run/run.json"
    data = json.loads(path.read_text())
    del data[field]
    path.write_text(json.dumps(data))
    assert field in verify(copied / "run").problems[0]


def test_verify_of_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        verify(tmp_path)


def test_a_changed_recipe_is_refused_with_the_difference(copied: Path) -> None:
    with pytest.raises(IncompatibleRunError, match=r"select\.budget: 9 then, 5 now"):
        made(copied, "select.budget=5").select()


def test_an_allowed_change_redoes_what_depends_on_it_and_no_gradient(copied: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (copied / "run/store").rglob("*")}
    allowed = ("select.budget", "score.options")
    run = made(copied, "select.budget=5", "score.options.rank=2", allow=allowed)
    assert run.select().to_json()["n_selected"] == 5
    assert {p: p.stat().st_mtime_ns for p in (copied / "run/store").rglob("*")} == before


def test_a_changed_pool_is_refused_unless_allowed(copied: Path) -> None:
    pool = copied / "pool.jsonl"
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(IncompatibleRunError):
        made(copied).score()
    assert made(copied, allow=("data",)).score().to_json()["n"] == 56  # one row stands twice


def test_a_damaged_shard_is_named(copied: Path) -> None:
    (copied / "run/run.json").unlink()
    shard = next((copied / "run/store").glob("shard-*/dots.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match=r"dots\.safetensors"):
        made(copied).score()


def test_the_base_is_never_changed_and_the_adapter_loads_with_peft(finished: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(finished / "model")
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = PeftModel.from_pretrained(base, str(finished / "run/tune/selected/adapter"))
    moved = [p.abs().sum() for n, p in model.named_parameters() if "lora_B" in n]
    assert all(m > 0 for m in moved)
    fresh = dict(AutoModelForCausalLM.from_pretrained(finished / "model").named_parameters())
    assert all((before[n] == fresh[n]).all() for n in fresh)


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    small_recipe(folder)
    return load_recipe(folder / "recipe.yaml", overrides)


@pytest.mark.parametrize("method", ["random", "length", "perplexity", "grad_cosine"])
def test_every_other_scorer_runs(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, f"score.method={method}")
    facts = Run(recipe, out=tmp_path / "run").select().to_json()
    assert facts["n_selected"] == 9


def test_a_users_adapter_replaces_the_warmup(finished: Path, tmp_path: Path) -> None:
    adapter = finished / "run/tune/random/adapter"
    small_recipe(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text().replace("warmup: {fraction: 0.2}\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"model.adapter={adapter}"])
    Run(recipe, out=tmp_path / "run").score()
    assert not (tmp_path / "run/warmup").exists()


def test_an_adapter_of_another_base_is_refused(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small_recipe(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text().replace("warmup: {fraction: 0.2}\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    config = LlamaConfig.from_pretrained(tmp_path / "model")
    config.num_hidden_layers = 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(finished / "model").save_pretrained(tmp_path / "model")
    adapter = finished / "run/tune/random/adapter"
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"model.adapter={adapter}"])
    with pytest.raises(IncompatibleRunError, match="another base"):
        Run(recipe, out=tmp_path / "run").score()


def test_full_fine_tuning_of_one_layer_leaves_the_rest_alone(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    small_recipe(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text()
    line = next(row for row in text.splitlines() if row.startswith("adapter:"))
    (tmp_path / "recipe.yaml").write_text(text.replace(line, "adapter: {kind: full, layers: [-1]}"))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["tune.learning_rate=1e-3", "tune.controls=[]"])
    Run(recipe, out=tmp_path / "run").tune()
    base = load_file(tmp_path / "model/model.safetensors")
    tuned = load_file(tmp_path / "run/tune/selected/adapter/model.safetensors")
    for name, tensor in base.items():
        if ".layers.1." in name:
            assert not torch.equal(tuned[name], tensor), name
        else:
            assert tuned[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def chosen(run: Path) -> list[str]:
    """Return the ids of a run's selection, best first."""
    return list(Selection.from_pretrained(run / "selection").ids)


def in_turn(table: pa.Table, columns: list[str], n: int) -> list[str]:
    """Return what columns take in turn, each the best that is left; ties go by id."""
    taken: list[str] = []
    for k in range(n):
        scores = table[columns[k % len(columns)]].to_pylist()
        left = [(-s, i) for i, s in zip(table["id"].to_pylist(), scores, strict=True)]
        taken.append(min(one for one in left if one[1] not in taken)[1])
    return taken


def test_round_robin_lets_the_subtasks_of_one_task_take_turns(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    path = tmp_path / "target.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    named = [{**row, "group": "yx"[k % 2]} for k, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    changes = ["select.rule=round_robin", "score.options={aggregate: per_subtask}"]
    Run(load_recipe(tmp_path / "recipe.yaml", changes), out=tmp_path / "run").select()
    table = pq.read_table(tmp_path / "run/scores.parquet")
    found = chosen(tmp_path / "run")
    assert found == in_turn(table, ["subtask:x", "subtask:y"], 9)
    assert found != in_turn(table, ["score"], 9)


def test_several_tasks_share_one_pass_and_keep_their_own_scores(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    rows = (tmp_path / "heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[:6]))
    (tmp_path / "heldout.jsonl").write_text("".join(rows[6:]))
    text = (tmp_path / "recipe.yaml").read_text()
    text = text.replace(
        f"target: {{colours: {tmp_path}/target.jsonl}}",
        f"target: {{colours: {tmp_path}/target.jsonl, other: {tmp_path}/other.jsonl}}",
    )
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["select.rule=round_robin"])
    Run(recipe, out=tmp_path / "run").select()
    table = pq.read_table(tmp_path / "run/scores.parquet")
    assert {"task:colours", "task:other"} <= set(table.column_names)
    assert chosen(tmp_path / "run") == in_turn(table, ["task:colours", "task:other"], 9)
    best = [max(pair) for pair in zip(table["task:colours"].to_pylist(),
                                      table["task:other"].to_pylist(), strict=True)]  # fmt: skip
    assert table["score"].to_pylist() == best


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("select.budget=61", SelectionError, "smaller than the budget"),
        ("data.max_length=300", ConfigError, "the model's context is 256"),
        ("data.max_length=8", DataError, "no target token"),
        ("model.base=nowhere/at-all", ConfigError, 'no model "nowhere/at-all"'),
        ("model.device=cuda", ConfigError, "no CUDA device"),
        ("adapter.modules=[q_prj]", SelectionError, 'did you mean "q_proj"'),
        ("data.pool=missing.jsonl", DataError, "missing.jsonl"),
        ("select.quotas={sums: [0.1, 0.2], sms: [0.0, 0.5]}", SelectionError, '"sms"'),
    ],
)
def test_bad_input_is_told_plainly(
    tmp_path: Path, override: str, error: type[Exception], words: str
) -> None:
    recipe = recipe_of(tmp_path, override)
    with pytest.raises(error, match=words.replace("[", r"\[")):
        Run(recipe, out=tmp_path / "run").select()


def test_leaks_and_repeats_are_dropped_with_reasons(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    pool, target = tmp_path / "pool.jsonl", tmp_path / "target.jsonl"
    rows = pool.read_text().splitlines(keepends=True)
    pool.write_text("".join([*rows, rows[0], target.read_text().splitlines(keepends=True)[0]]))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["score.method=random"])
    run = Run(recipe, out=tmp_path / "run")
    run.select()
    reasons = list(run.ground.dropped.values())
    assert sum(r.startswith("equals the earlier row") for r in reasons) == 2  # one was there before
    assert sum(r.startswith("leak") for r in reasons) == 1
    strict = load_recipe(tmp_path / "recipe.yaml", ["data.leakage=error"])
    with pytest.raises(DataError, match="equal a target or held-out row"):
        Run(strict, out=tmp_path / "other").select()


def test_half_a_character_in_a_column_of_the_users_own_hinders_nothing(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    pool = tmp_path / "pool.jsonl"
    rows = [{**json.loads(line), "note": "\ud800"} for line in pool.read_text().splitlines()]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["score.method=random"])
    Run(recipe, out=tmp_path / "run").select()
    chosen = (tmp_path / "run/selected.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["note"] for line in chosen} == {"?"}


def test_answers_are_those_of_one_tokenizer(tmp_path: Path) -> None:
    recipe = load_recipe(small_recipe(tmp_path))
    run = Run(recipe, out=tmp_path / "run")
    before = run.ground.tokenizer_fingerprint
    assert before == Run(recipe, out=tmp_path / "run").ground.tokenizer_fingerprint
    run.ground.tokenizer.chat_template = "{{ messages }}"
    del run.ground.tokenizer_fingerprint
    assert run.ground.tokenizer_fingerprint != before


def test_weights_with_nan_are_named_before_hours_are_lost(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    small_recipe(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["warmup.epochs=0"])
    with pytest.raises(Exception, match=r"not a (finite )?number"):
        Run(recipe, out=tmp_path / "run").score()


def test_plan_says_what_the_training_method_will_do(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    plain = Run(load_recipe(path), out=tmp_path / "run").plan()
    recipe = load_recipe(path, ["tune.method=gast", "tune.options={keep: 0.5, target: target}"])
    plan = Run(recipe, out=tmp_path / "run").plan()
    text = "\n".join(plan.lines())
    assert "method      gast: " in text
    assert "keep 0.5, target target; 2 layers train" in text
    assert "each layer learns from 2 of the 4 examples of a forward pass" in text
    told = {"name": "gast", "options": {"keep": 0.5, "target": "target"}}
    assert plan.to_json()["method"] == told
    recipe = load_recipe(path, ["tune.method=lisa", "tune.options.layers=1"])
    text = "\n".join(Run(recipe, out=tmp_path / "run").plan().lines())
    assert "layers 1; 2 layers train, 1 at a time" in text
    assert plain.to_json()["method"] is None
    assert "method      " not in "\n".join(plain.lines())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tune.options.keep=0.1"], "keep 0.1 of 4 examples rounds to none"),
        (["tune.options.keep=5"], "keep 5 is more than the 4 examples"),
        (["tune.batch_size=1"], "nothing to choose from in a batch of one"),
        (["tune.options.form=concat"], "form=concat cannot be used in a recipe"),
        (["tune.options.pick=greedy"], "pick=greedy needs form=two_pass"),
        (["tune.options.sampler=gast"], "gast chooses examples, not layers"),
        (["tune.method=lisa", "tune.options.layers=3"], "3 layers cannot be drawn of 2"),
        (
            ["tune.options={sampler: rst, sampler_options: {layers: 3}}"],
            "3 layers cannot be drawn of 2",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "all", "tune"])
def test_a_method_that_cannot_work_is_refused_before_anything_is_computed(
    tmp_path: Path, verb: str, overrides: list[str], words: str
) -> None:
    recipe = load_recipe(small_recipe(tmp_path), ["tune.method=gast", *overrides])
    run = Run(recipe, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        {"plan": run.plan, "all": run.all, "tune": run.tune}[verb]()
    assert not (tmp_path / "run/store").exists()
    assert not (tmp_path / "run/warmup").exists()


def test_the_plain_control_is_the_selection_without_the_method(tmp_path: Path) -> None:
    more = ["tune.method=gast", "tune.options={keep: 0.5}", "tune.controls=[random, plain]"]
    run = Run(load_recipe(small_recipe(tmp_path), more), out=tmp_path / "run")
    run.all()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    by_arm = {
        arm: [line for line in lines if line["arm"] == arm]
        for arm in ("selected", "random", "plain")
    }
    for line in [*by_arm["selected"], *by_arm["random"]]:
        assert set(line["picks"]) == {"0", "1"}
        assert len(line["picks"]["0"]) == len(line["examples"])
    assert all(line.keys() == {"arm", "step", "loss"} for line in by_arm["plain"])
    # A warm-up trains plainly whatever the method, so the scores are those of a plain run.
    assert not (tmp_path / "run/warmup/adapter/records.json").exists()
    scores = (tmp_path / "run/scores.parquet").read_bytes()
    plain = Run(load_recipe(tmp_path / "recipe.yaml"), out=tmp_path / "plain")
    plain.tune()
    assert (tmp_path / "plain/scores.parquet").read_bytes() == scores
    weights = "tune/{}/adapter/adapter_model.safetensors"
    assert (tmp_path / "plain" / weights.format("selected")).read_bytes() == (
        tmp_path / "run" / weights.format("plain")
    ).read_bytes()


def test_plan_writes_nothing_and_shows_the_mask(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    plan = Run(recipe, out=tmp_path / "run").plan()
    assert not (tmp_path / "run").exists()
    text = "\n".join(plan.lines())
    assert "[ " in text
    assert text.count("Question:") == 3
    assert plan.to_json()["trainable"]["parameters"] == 2 * 2 * 2 * (32 + 32)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    from selectune.errors import StorageError
    from selectune.files import lock

    recipe = recipe_of(tmp_path)
    with lock(tmp_path / "run"), pytest.raises(StorageError, match="another process"):
        Run(recipe, out=tmp_path / "run").score()


def test_another_grouping_of_the_targets_changes_scores_without_another_pass(
    tmp_path: Path,
) -> None:
    def grouped(labels: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / "target.jsonl").read_text().splitlines()]
        lines = [json.dumps({**r, "group": g}) + "\n" for r, g in zip(rows, labels, strict=True)]
        (tmp_path / "target.jsonl").write_text("".join(lines))
        Run(recipe, out=tmp_path / "run").score()
        return pq.read_table(tmp_path / "run/scores.parquet")["score"].to_pylist()

    recipe = recipe_of(tmp_path, "score.options={aggregate: max_subtask_mean}", "warmup.epochs=0")
    first = grouped("aaabbb")
    made_at = (tmp_path / "run/store/pool/manifest.json").stat().st_mtime_ns
    assert grouped("ababab") != first
    assert grouped("aaabbb") == first
    assert (tmp_path / "run/store/pool/manifest.json").stat().st_mtime_ns == made_at


def test_a_task_may_be_renamed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "warmup.epochs=0")
    Run(recipe, out=tmp_path / "run").score()
    data = {"data.target": {"paint": str(tmp_path / "target.jsonl")}, "data.heldout": None}
    run = Run(recipe.changed(data), out=tmp_path / "run", allow=["data"])
    assert "(paint)" in run.score().text[0]


def test_another_base_under_the_same_path_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "warmup.epochs=0")
    Run(recipe, out=tmp_path / "run").score()
    save_model(tmp_path / "model", seed=1)
    with pytest.raises(IncompatibleRunError, match="base model has changed"):
        Run(recipe, out=tmp_path / "run").tune()


def test_the_scale_of_an_adapter_without_warm_up_is_not_forgotten(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "warmup.epochs=0")
    Run(recipe, out=tmp_path / "run").score()
    norms = pq.read_table(tmp_path / "run/scores.parquet")["norm"].to_numpy()
    twice = recipe.changed({"adapter.alpha": 2 * recipe.adapter.alpha})
    Run(twice, out=tmp_path / "run", allow=["adapter"]).score()
    scaled = pq.read_table(tmp_path / "run/scores.parquet")["norm"].to_numpy()
    assert scaled / norms == pytest.approx(2.0, rel=1e-4)


def test_a_dora_run_reads_back_what_it_tuned(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "adapter.kind=dora", "score.method=length", "tune.epochs=1")
    assert "verdict" in Run(recipe, out=tmp_path / "run").evaluate().facts


def test_a_control_without_scores_per_target_goes_by_its_own_order(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "select.rule=round_robin", "warmup.epochs=0", "tune.epochs=1")
    assert Run(recipe, out=tmp_path / "run").tune().facts["arms"].keys() == {"selected", "random"}
    blind = recipe.changed({"score.method": "length"})
    with pytest.raises(SelectionError, match="cannot be taken in turn"):
        Run(blind, out=tmp_path / "other").select()


def test_a_target_that_is_held_out_too_is_dropped_or_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    first = (tmp_path / "heldout.jsonl").read_text().splitlines(keepends=True)[0]
    with (tmp_path / "target.jsonl").open("a") as file:
        file.write(first)
    prepared = Run(recipe, out=tmp_path / "run").ground.prepared
    assert len(prepared.targets["colours"]) == 6
    assert any("1 target rows equal a held-out row: dropped" in note for note in prepared.notes)
    with pytest.raises(DataError, match="1 target rows equal a held-out row"):
        _ = Run(recipe.changed({"data.leakage": "error"}), out=tmp_path / "run").ground.prepared
    (tmp_path / "target.jsonl").write_text(first)
    with pytest.raises(DataError, match="no target row of task colours is left"):
        _ = Run(recipe, out=tmp_path / "run").ground.prepared


def test_targets_lost_to_the_cut_are_told(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "data.max_empty=0.2")
    with (tmp_path / "target.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "completion": " y"}) + "\n")
    heard: list[str] = []

    class Told(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    _ = Run(recipe, out=tmp_path / "run", progress=Told()).ground.tokens
    assert "1 targets of colours kept no target token: left out" in heard


def test_what_a_run_needs_twice_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[ModelSection] = []
    load = ground.load_base

    def counted(section: ModelSection, **how: object) -> Base:
        loads.append(section)
        return load(section, **how)

    monkeypatch.setattr(ground, "load_base", counted)
    recipe = recipe_of(tmp_path, "tune.epochs=1")
    Run(recipe, out=tmp_path / "run").all()
    # The gradient pass, two arms to tune, and the base with both arms to evaluate.
    assert len(loads) == 6


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "1"},
        {"steps": []},
        {"steps": {"score": 1}},
        {"steps": {"score": {"fingerprint": "x"}}},
        {"steps": {"x": {"fingerprint": "", "files": {"../a": ""}, "cost": {}, "facts": {}}}},
    ],
)
def test_a_run_json_of_another_shape_is_told(copied: Path, damage: dict[str, object]) -> None:
    path = copied / "run/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(CorruptFileError, match="not as selectune writes it"):
        made(copied).select()
    assert not verify(copied / "run").ok
