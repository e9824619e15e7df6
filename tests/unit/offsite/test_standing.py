"""What offsite tuning won, by the models that are at hand."""

import json
from pathlib import Path

import pytest

from offsite_case import owner_recipe, tuner_recipe
from selectune.errors import ConfigError, DataError
from selectune.evaluation import compare_paired, together
from selectune.offsite.plugin import plug_files
from selectune.offsite.standing import standing
from selectune.pipeline.emulation import Emulation
from selectune.pipeline.plugged import STANDING, evaluate_plugged
from selectune.pipeline.run import Run
from selectune.pipeline.verification import verify
from selectune.progress import Silent
from selectune.recipe import Recipe, load_owner_recipe, load_recipe
from unit.offsite.test_table import answers

pytestmark = pytest.mark.filterwarnings("ignore:.*moved by more than their own norm")
PLAIN = ("score.method=random", "tune.controls=[]", "tune.epochs=1", "tune.save_every=null")


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package, a run on it, and a plugged model."""
    folder = tmp_path_factory.mktemp("houses")
    Emulation(load_owner_recipe(owner_recipe(folder)), Silent()).emulate()
    tuner_recipe(folder)
    Run(recipe_of(folder, "run"), out=folder / "run").tune()
    plugin = folder / "run/plugin"
    plug_files(folder / "model", plugin, folder / "made/owner", folder / "plugged")
    openly(folder)
    return folder


def recipe_of(folder: Path, name: str, *more: str) -> Recipe:
    return load_recipe(folder / "tuner.yaml", [*PLAIN, f"output={folder / name}", *more])


def openly(folder: Path, name: str = "open", *more: str) -> Path:
    """Tune the original itself."""
    words = (f"model.base={folder / 'model'}", "tune.adapter={kind: full}", *more)
    Run(recipe_of(folder, name, *words), out=folder / name).all()
    return folder / name


def test_all_models_answer_the_same_questions(houses: Path) -> None:
    recipe, out = recipe_of(houses, "run"), houses / "run"
    found = evaluate_plugged(
        recipe, out, plugged=str(houses / "plugged"), original=str(houses / "model"),
        openly=houses / "open", progress=Silent(),
    )  # fmt: skip
    assert list(found.answers) == ["ft", "emulator", "eft", "zs", "pi"]
    assert {one["colours"].n for one in found.answers.values()} == {
        found.answers["pi"]["colours"].n
    }
    pi, zs, eft = (together(found.answers[who]) for who in ("pi", "zs", "eft"))
    assert pi.answer_loss != zs.answer_loss
    assert found.differences["gain"]["answer_loss"] == compare_paired(pi, zs, n_boot=200)
    assert found.differences["delta"]["answer_loss"].mean_difference == pytest.approx(
        pi.answer_loss - eft.answer_loss
    )
    told = "\n".join(found.lines())
    assert "Δ = PI − EFT" in told
    assert "not at hand" not in told
    assert json.loads((out / STANDING).read_text()) == json.loads(json.dumps(found.to_json()))
    assert verify(out).ok


def test_what_is_at_hand_of_the_owner_trains_nothing(houses: Path) -> None:
    recipe = recipe_of(houses, "owner", f"model.base={houses / 'model'}")
    plugged, out = str(houses / "plugged"), houses / "owner"
    found = evaluate_plugged(recipe, out, plugged=plugged, progress=Silent())
    assert set(found.answers) == {"zs", "pi"}
    assert set(found.differences) == {"gain"}
    assert "not at hand: FT, emulator ZS, EFT" in found.lines()
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "pi",
        STANDING,
        "zs",
    ]


def test_delta_does_not_stand_alone(houses: Path) -> None:
    """A bad emulator buys it: without ZS nobody knows what it is worth."""
    found = evaluate_plugged(
        recipe_of(houses, "run"), houses / "run", plugged=str(houses / "plugged"),
        progress=Silent(),
    )  # fmt: skip
    assert set(found.answers) == {"emulator", "eft", "pi"}
    assert not found.differences


def test_a_model_that_is_worse_is_told() -> None:
    """The sign of a loss difference: above zero is worse."""
    good, bad = answers(0, 3.0), answers(1, 0.0)
    assert standing({"zs": good, "pi": bad}, n_boot=100).is_harmed
    assert "harms the model" in standing({"zs": good, "pi": bad}, n_boot=100).lines()[-1]
    assert not standing({"zs": bad, "pi": good}, n_boot=100).is_harmed


def test_other_questions_are_refused(houses: Path) -> None:
    other = openly(houses, "other", "evaluate.limit=3")
    with pytest.raises(DataError, match="answered by only one"):
        evaluate_plugged(
            recipe_of(houses, "run"), houses / "run", plugged=str(houses / "plugged"),
            original=str(houses / "model"), openly=other, progress=Silent(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "more", "says"),
    [
        ({"original": "model"}, ("model.base={folder}/model",), "the original is named twice"),
        ({"openly": Path("nowhere")}, (), "nowhere holds no evaluated run"),
        ({}, ("data.heldout=null",), "nothing to evaluate on"),
    ],
)
def test_what_cannot_be_is_refused(
    words: dict[str, object], more: tuple[str, ...], says: str, houses: Path
) -> None:
    recipe = recipe_of(houses, "run", *(word.format(folder=houses) for word in more))
    with pytest.raises(ConfigError, match=says):
        evaluate_plugged(
            recipe, houses / "run", plugged=str(houses / "plugged"), progress=Silent(), **words
        )
