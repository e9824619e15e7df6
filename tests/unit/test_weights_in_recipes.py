"""Recipes that train single weights of the base: masks, deltas, controls, resume, comparison."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from selectune.adapters import load_tuned
from selectune.cli.weights import verify_delta
from selectune.errors import ConfigError, CoverageError, SelectionError
from selectune.files import open_dir
from selectune.grid.compare import compare
from selectune.pipeline.plan import make_plan
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import Recipe, load_recipe
from selectune.training.sparse import SparseModel
from selectune.weights import SparseDelta, WeightMask, merge
from small_run import small_recipe

GALLOP = ("score.method=random", "tune.weights={method: gallop, density: 0.1}")


def recipe(folder: Path, *overrides: str) -> Recipe:
    if not (folder / "recipe.yaml").exists():
        small_recipe(folder)
    return load_recipe(folder / "recipe.yaml", overrides)


def run(folder: Path, *overrides: str) -> Run:
    found = recipe(folder, *overrides)
    made = Run(found, out=Path(found.output))
    made.all()
    return made


def test_a_run_trains_its_mask_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path, *GALLOP)
    out = tmp_path / "run"
    mask = WeightMask.load(out / "mask/selected")
    assert mask.n_chosen == pytest.approx(0.1 * mask.n_eligible, abs=1)
    assert mask.about["method"] == "gallop"
    delta = SparseDelta.load(out / "tune/selected/adapter")
    assert delta.indices.keys() == mask.indices.keys()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: p.clone() for name, p in base.state_dict().items()}
    after = merge(base, delta).state_dict()
    moved = {n: (t != before[n]).flatten().nonzero().flatten() for n, t in after.items()}
    for name, places in moved.items():
        chosen = mask.indices.get(name, torch.zeros(0, dtype=torch.int32))
        assert torch.isin(places, chosen.long()).all()
    told = verify_delta(out / "tune/selected/adapter", str(tmp_path / "model"))
    assert told.to_json()["ok"], told.lines()
    meta = open_dir(out / "tune/selected/adapter", kind="adapter").meta
    assert meta["n_trainable"] == mask.n_chosen
    assert meta["n_moved"] == sum(len(places) for places in moved.values() if len(places)) > 0


def test_a_shuffled_mask_is_the_control_of_its_scores(tmp_path: Path) -> None:
    """It has as many weights in every tensor, and shares the scoring with the mask itself."""
    shared = tmp_path / "shared"
    words = (*GALLOP, "tune.controls=[]", "tune.epochs=1")
    deltas: list[SparseDelta] = []
    for name, more in (("plain", ()), ("shuffled", ("tune.weights.shuffled=true",))):
        found = recipe(tmp_path, *words, *more, f"output={tmp_path / name}")
        made = Run(found, out=tmp_path / name, shared=shared)
        made.all()
        [arm] = made.tune().facts["arms"].values()
        deltas.append(SparseDelta.load(Path(arm["path"])))
    assert len([p for p in (shared / "mask").iterdir() if p.is_dir()]) == 1
    plain, shuffled = deltas
    sizes = [{n: len(i) for n, i in one.indices.items()} for one in deltas]
    assert sizes[0] == sizes[1]
    assert any(not torch.equal(plain.indices[n], shuffled.indices[n]) for n in plain.indices)


def test_the_same_command_again_trains_nothing(tmp_path: Path) -> None:
    run(tmp_path, *GALLOP)
    files = [*(tmp_path / "run/tune").rglob("*.safetensors"), *(tmp_path / "run/mask").rglob("*")]
    before = {p: p.stat().st_mtime_ns for p in files}
    run(tmp_path, *GALLOP)
    assert {p: p.stat().st_mtime_ns for p in files} == before


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_broken_training_ends_in_the_same_bytes(tmp_path: Path, trainer: str) -> None:
    words = (*GALLOP, f"tune.trainer={trainer}", "tune.controls=[]", "tune.save_every=1")
    run(tmp_path, *words, "tune.keep_checkpoints=9")
    arm = tmp_path / "run/tune/selected"
    whole = (arm / "adapter/sparse.safetensors").read_bytes()
    last = sorted(int(p.name.split("-")[1]) for p in arm.glob("checkpoint-*"))
    assert len(last) > 2
    for kept in (last[0], last[-1]):  # in the middle; and between last checkpoint and adapter
        shutil.rmtree(arm / "adapter")
        for step in last:
            if step > kept:
                shutil.rmtree(arm / f"checkpoint-{step}", ignore_errors=True)
        run(tmp_path, *words, "tune.keep_checkpoints=9")
        assert (arm / "adapter/sparse.safetensors").read_bytes() == whole


def test_weights_train_beside_an_adapter(tmp_path: Path) -> None:
    lora = "tune.adapter={rank: 2, modules: [q_proj]}"
    run(tmp_path, *GALLOP, lora, "tune.controls=[]")
    names = open_dir(tmp_path / "run/tune/selected/adapter", kind="adapter").names
    assert {"sparse.json", "sparse.safetensors", "adapter_model.safetensors"} <= set(names)


def test_lota_fine_tunes_before_it_chooses(tmp_path: Path) -> None:
    words = ("score.method=random", "tune.weights={method: lota, density: 0.1}")
    run(tmp_path, *words, "tune.controls=[]")
    out = tmp_path / "run"
    assert WeightMask.load(out / "mask/selected").about["method"] == "lota"
    whole = open_dir(out / "tune/selected before its mask/adapter", kind="adapter").names
    assert "model.safetensors" in whole


def test_gradients_of_an_adapter_choose_examples_for_weights(tmp_path: Path) -> None:
    run(tmp_path, "tune.weights={method: snip, options: {lora_rank: 1}}", "tune.controls=[]")
    assert (tmp_path / "run/store").is_dir()  # gist, by gradients of the section adapter
    assert (tmp_path / "run/tune/selected/adapter/sparse.json").exists()


@pytest.mark.parametrize("method", ["gast", "rst"])
def test_training_methods_act_on_single_weights(tmp_path: Path, method: str) -> None:
    run(tmp_path, *GALLOP, f"tune.method={method}", "tune.controls=[plain]")
    made = [SparseDelta.load(tmp_path / f"run/tune/{arm}/adapter") for arm in ("selected", "plain")]
    one, other = (torch.cat([d.deltas[n] for n in sorted(d.deltas)]) for d in made)
    assert not torch.equal(one, other)


def test_rows_of_a_comparison_train_what_they_like(tmp_path: Path) -> None:
    small_recipe(
        tmp_path,
        """
matrix:
  methods:
    - random
    - {name: gallop, method: random, tune: {weights: {method: gallop, density: 0.1}}}
    - {name: full, method: random, tune: {adapter: {kind: full}}}
  tune: {learning_rate: [1e-2], choose: all}
""",
    )
    found = load_recipe(tmp_path / "recipe.yaml", ["score.method=random"])
    table = compare(found, out=Path(found.output), progress=Silent())
    assert {row.method for row in table.rows} == {"base", "random", "gallop", "full"}
    folders = (tmp_path / "run/shared/tune").iterdir()
    kinds = {frozenset(p.name for p in folder.glob("adapter/*.safetensors")) for folder in folders}
    assert kinds == {
        frozenset({"adapter_model.safetensors"}),
        frozenset({"sparse.safetensors"}),
        frozenset({"model.safetensors"}),
    }


def test_a_plan_counts_single_weights(tmp_path: Path) -> None:
    found = recipe(tmp_path, *GALLOP)
    plan = make_plan(Run(found, out=Path(found.output)).ground)
    mask_size = plan.facts["trainable"]["parameters"]
    memory = plan.facts["memory_bytes"]
    assert memory["trainable weights, gradients, AdamW"] == 16 * mask_size
    assert memory["places and base values of single weights"] == 8 * mask_size
    assert any("single weights, of" in line for line in plan.lines())


@pytest.mark.parametrize(
    ("override", "where", "says"),
    [
        ("tune.weights={method: galop}", "tune.weights", 'did you mean "gallop"'),
        ("tune.weights={density: 2.0}", "tune.weights.density", ""),
        ("tune.weights={options: {epz: 1}}", "tune.weights", 'did you mean "eps"'),
        (
            "tune.weights={density: 0.1, options: {lora_rank: 8}}",
            "",
            "budgets were given",
        ),
        (
            "tune.weights={density: 0.1, options: {density: 0.2}}",
            "tune.weights",
            "stands twice",
        ),
    ],
)
def test_wrong_weights_are_refused_with_the_recipe(
    tmp_path: Path, override: str, where: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, override)
    assert where in str(caught.value)
    assert says in str(caught.value)


def test_all_weights_and_single_ones_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all weights would train"):
        recipe(tmp_path, *GALLOP, "tune.adapter={kind: full}")


def test_weights_that_no_model_has_are_refused_by_the_plan(tmp_path: Path) -> None:
    found = recipe(tmp_path, "tune.weights={options: {eligible: [q_prj]}}")
    with pytest.raises(SelectionError, match="q_proj"):
        make_plan(Run(found, out=Path(found.output)).ground)


def test_weights_train_beside_their_matrices(tmp_path: Path) -> None:
    words = (*GALLOP, "tune.weights.form=compose", "tune.weight_decay=0.1")
    made = run(tmp_path, *words)
    path = tmp_path / "run/tune/selected/adapter"
    composed = SparseDelta.load(path)
    assert composed.about["form"] == "compose"
    assert composed.about["decay_to"] == "base"
    loaded = load_tuned(made.ground.base(), path)  # as evaluation has it: not merged, so exact
    assert isinstance(loaded, SparseModel)
    assert loaded.sparse.delta() == composed
    run(
        tmp_path,
        *GALLOP,
        "tune.weights.decay_to=base",
        "tune.weight_decay=0.1",
        f"output={tmp_path / 'again'}",
    )
    in_place = SparseDelta.load(tmp_path / "again/tune/selected/adapter")
    assert composed.mask() == in_place.mask()
    for name, delta in composed.deltas.items():
        torch.testing.assert_close(delta, in_place.deltas[name], rtol=0.05, atol=1e-5)


def test_what_does_not_go_beside_a_matrix_is_refused_with_the_recipe(tmp_path: Path) -> None:
    words = (*GALLOP, "tune.weights.form=compose")
    with pytest.raises(ConfigError, match=r"weights\.decay_to zero does not go with"):
        recipe(tmp_path, *words, "tune.weights.decay_to=zero")
    with pytest.raises(ConfigError, match=r"weights\.route columns does not go with"):
        recipe(tmp_path, *words, "tune.weights.route=columns")
    found = recipe(tmp_path, *words, "tune.weights.options={eligible: all}")
    with pytest.raises(CoverageError, match="no entry can be trained beside model"):
        make_plan(Run(found, out=Path(found.output)).ground)
