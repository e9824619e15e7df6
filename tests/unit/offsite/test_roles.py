"""Owner and data owner by recipes: emulate, tune without the original, plug, and nothing more."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite_case import owner_recipe, tuner_recipe
from selectune.errors import ConfigError, DataError, SelectionError
from selectune.files import open_dir
from selectune.models import fingerprint
from selectune.offsite.loading import load_emulator
from selectune.offsite.plugin import plug_files
from selectune.pipeline.emulation import Emulation
from selectune.pipeline.plan import make_plan
from selectune.pipeline.run import Run
from selectune.pipeline.verification import verify
from selectune.progress import Silent
from selectune.recipe import load_owner_recipe, load_recipe
from selectune.recipe.package import fitted

PLAIN = ("score.method=random", "tune.controls=[]", "tune.epochs=1", "tune.save_every=null")
LORA = "adapter={kind: lora, rank: 2, modules: [q_proj, v_proj]}"
TRAINED = ("model.layers.0.", "model.layers.3.")


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package; the original lies elsewhere while it is tuned."""
    folder = tmp_path_factory.mktemp("houses")
    Emulation(load_owner_recipe(owner_recipe(folder)), Silent()).emulate()
    (folder / "model").rename(folder / "hidden")
    tuner_recipe(folder)
    return folder


def tuned(houses: Path, out: Path, *overrides: str) -> Path:
    """Tune on the package, and return the plugin."""
    words = [*PLAIN, f"output={out}", *overrides]
    recipe = load_recipe(houses / "tuner.yaml", words)
    told = Run(recipe, out=out).tune()
    assert told.facts["plugin"] == str(out / "plugin")
    return out / "plugin"


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.filterwarnings("ignore:.*moved by more than their own norm")
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (LORA,),
        ("tune.weights={method: gallop, density: 0.1}",),
        ("tune.method=gast",),
        ("tune.method=ist", LORA),
        ("score.method=gist",),
    ],
    ids=["default", "lora", "gallop", "gast", "ist", "gist"],
)
def test_what_was_tuned_comes_back_into_the_model_and_nothing_else(
    overrides: tuple[str, ...], houses: Path, tmp_path: Path
) -> None:
    plugin = tuned(houses, tmp_path / "run", *overrides)
    assert sorted(p.name for p in plugin.iterdir()) == ["adapter.safetensors", "manifest.json"]
    plug_files(houses / "hidden", plugin, houses / "made/owner", tmp_path / "tuned")
    before, after = bits(houses / "hidden"), bits(tmp_path / "tuned")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith(TRAINED) for name in moved)
    assert verify(tmp_path / "run").ok


def test_training_leaves_the_emulator_itself_alone(houses: Path, tmp_path: Path) -> None:
    tuned(houses, tmp_path / "run")
    emulator = load_emulator(houses / "made/package").state_dict()
    opened = open_dir(tmp_path / "run/tune/selected/adapter", kind="adapter")
    after = opened.read_torch("model.safetensors")
    assert after.keys() == emulator.keys() - {"lm_head.weight"}
    for name, tensor in after.items():
        if not name.startswith(TRAINED):
            assert torch.equal(tensor, emulator[name]), name


def test_a_plugin_says_nothing_of_the_data(houses: Path, tmp_path: Path) -> None:
    plugin = tuned(houses, tmp_path / "run")
    rows = [json.loads(line) for line in (houses / "pool.jsonl").read_text().splitlines()]
    told = [str(row["prompt"]).encode() for row in rows]
    told += [e.id.encode() for e in Run(
        load_recipe(houses / "tuner.yaml", PLAIN), out=tmp_path / "none"
    ).ground.prepared.candidates]  # fmt: skip
    for file in plugin.iterdir():
        content = file.read_bytes()
        assert not any(word in content for word in told)
        assert b"loss" not in content


def test_the_same_command_again_writes_no_plugin(houses: Path, tmp_path: Path) -> None:
    plugin = tuned(houses, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in plugin.iterdir()}
    tuned(houses, tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in plugin.iterdir()} == before
    shutil.rmtree(plugin)
    tuned(houses, tmp_path / "run")
    assert plugin.is_dir()


def test_a_resolved_recipe_says_what_trains_and_fits_again(houses: Path) -> None:
    recipe = fitted(load_recipe(houses / "tuner.yaml"))
    assert (recipe.adapter.kind, recipe.adapter.layers) == ("lora", [0, 3])
    assert recipe.tune.adapter is not None
    assert (recipe.tune.adapter.kind, recipe.tune.adapter.layers) == ("full", [0, 3])
    assert fitted(recipe.changed({})) == recipe
    lora = fitted(load_recipe(houses / "tuner.yaml", [LORA]))
    assert lora.tune.adapter is None
    own = load_recipe(houses / "tuner.yaml", [f"model.base={houses / 'hidden'}"])
    assert fitted(own) is own


def test_a_plan_counts_what_the_package_lets_train(houses: Path) -> None:
    recipe = load_recipe(houses / "tuner.yaml", PLAIN)
    facts = make_plan(Run(recipe, out=houses / "none").ground).facts
    layer = sum(p.numel() for n, p in bits(houses / "hidden").items() if n.startswith(TRAINED[:1]))
    assert facts["trainable"]["parameters"] == 2 * layer
    emulator = load_emulator(houses / "made/package")
    assert facts["trainable"]["of"] == sum(p.numel() for p in emulator.parameters())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapter={kind: full, layers: [1]}", "layer 1 does not train"),
        ("tune.adapter={kind: lora, layers: [0, -1]}", "layer -1 does not train"),
        ("adapter={kind: series}", "series cannot be plugged"),
        ("adapter={kind: dora}", "dora cannot be plugged"),
        (
            "tune.weights={method: gallop, options: {eligible: [model.layers.1.*]}}",
            "model.layers.1.* does not train",
        ),
        (
            "tune={weights: {method: gallop}, adapter: {kind: lora}}",
            "single weights and an adapter together cannot be plugged",
        ),
    ],
    ids=["full", "lora", "series", "dora", "weights", "both"],
)
def test_other_layers_and_forms_are_refused(override: str, says: str, houses: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        fitted(load_recipe(houses / "tuner.yaml", [override]))


def test_the_owners_terms_are_kept(tmp_path: Path) -> None:
    terms = "emulate.terms={forms: [lora], max_rank: 2, modules: [q_proj]}"
    recipe = load_owner_recipe(owner_recipe(tmp_path), [terms])
    Emulation(recipe, Silent()).emulate()
    path = tuner_recipe(tmp_path)
    allowed = fitted(load_recipe(path, ["adapter={rank: 2, modules: [q_proj]}"]))
    assert allowed.tune.adapter is None
    for override, says in (
        ("adapter={rank: 2, modules: [q_proj, v_proj]}", "LoRA in q_proj, v_proj"),
        ("adapter={rank: 2, modules: all-linear}", "LoRA in all-linear"),
        ("adapter={rank: 3, modules: [q_proj]}", "rank 3 cannot be plugged"),
        ("adapter={kind: full}", "full cannot be plugged"),
    ):
        with pytest.raises(ConfigError, match=says):
            fitted(load_recipe(path, [override]))


def test_a_plan_of_an_owner_says_what_the_emulator_will_be(tmp_path: Path) -> None:
    recipe = load_owner_recipe(owner_recipe(tmp_path), [f"emulate.probe={tmp_path}/heldout.jsonl"])
    plan = Emulation(recipe, Silent()).plan()
    made = Emulation(recipe, Silent()).emulate()
    ratios = made.about["quality"]["ratios"]
    n = plan.facts["parameters"]
    assert ratios["middle"] == n["emulated"] / n["middle"]
    assert plan.facts["questions"] == {"target": 12}
    assert any("go out whole" in line for line in plan.lines())
    assert fingerprint(bits(tmp_path / "model")) == made.about["base"]


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("emulate.adapters=[0, 4]", SelectionError, "there is no layer 4"),
        ("emulate.adapters=[0, 1, 2, 3]", SelectionError, "all 4 layers"),
        ("emulate={calibration: x, keep_mlp: 1.0, keep_attention: 1.0, adapters: [0]}",
         SelectionError, "would be the model itself"),
        ("emulate.block_tokens=4000", DataError, "too few for 2 blocks"),
    ],
)  # fmt: skip
def test_a_plan_refuses_what_cannot_work(
    override: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    recipe = load_owner_recipe(owner_recipe(tmp_path), [override])
    with pytest.raises(error, match=says):
        Emulation(recipe, Silent()).plan()
