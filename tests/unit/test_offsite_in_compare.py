"""Rows of a grid that are tuned on an emulator, and answer with what came back into the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from offsite_case import OWNER, owner_recipe, tuner_recipe
from selectune.errors import ConfigError, SelectionError
from selectune.evaluation import Evaluation
from selectune.grid import grid as grids
from selectune.grid import offsite
from selectune.grid.compare import ComparisonTable, compare, plan_grid
from selectune.offsite.plugin import plug_files, read_owner
from selectune.pipeline.answered import (
    Questions,
    Respondent,
    rank_options,
    read_text,
    write_answers,
)
from selectune.pipeline.arms import BASE, SELECTED
from selectune.pipeline.emulation import Emulation
from selectune.pipeline.ground import Ground
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import MatrixMethod, Recipe, TuneSection, load_owner_recipe, load_recipe
from selectune.recipe.package import fitted
from small_run import RECIPE

pytestmark = pytest.mark.filterwarnings("ignore:.*moved by more than their own norm")

SECTION = yaml.safe_load(OWNER.format(folder="FOLDER"))["emulate"]
TUNE = ("tune.adapter={kind: full}", "tune.epochs=1", "tune.save_every=null")
FULL = {"kind": "full", "layers": [0, -1]}
LORA = {"kind": "lora", "rank": 2, "modules": ["q_proj"], "layers": [-1]}
ROWS: list[dict[str, Any]] = [
    {"name": "openly", "method": "gist", "tune": {"adapter": FULL}},
    {"name": "GradOT", "method": "gist", "emulate": SECTION},
    {
        "name": "dropped",
        "method": "random",
        "emulate": {**SECTION, "method": "layer_drop"},
        "tune": {"adapter": LORA},
    },
]


def grid_recipe(folder: Path, *overrides: str, rows: list[dict[str, Any]] | None = None) -> Recipe:
    """Write a grid over the owner's model, and load it."""
    matrix = {"methods": ROWS if rows is None else rows, "seeds": [0, 1]}
    text = json.dumps(matrix).replace("FOLDER", str(folder))
    path = folder / "grid.yaml"
    path.write_text(RECIPE.format(folder=folder) + f"matrix: {text}\n")
    return load_recipe(path, [*TUNE, *overrides])


def wishes(folder: Path) -> tuple[str, str]:
    return "evaluate.generate=true", f"evaluate.text={folder / 'text.jsonl'}"


def grid(folder: Path) -> ComparisonTable:
    recipe = grid_recipe(folder, *wishes(folder))
    return compare(recipe, out=Path(recipe.output), progress=Silent())


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offsite")
    owner_recipe(folder)
    before = files(folder / "model")
    grid(folder)
    assert files(folder / "model") == before
    return folder


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/table.json").read_text())


def by_hand(folder: Path, seed: int) -> dict[str, Any]:
    """Do what the row does with the files of two houses."""
    Emulation(load_owner_recipe(folder / "owner.yaml"), Silent()).emulate()
    out = folder / "hand"
    words = ["adapter={rank: 2, alpha: 4.0, modules: [q_proj, v_proj]}", "tune.controls=[]"]
    recipe = load_recipe(tuner_recipe(folder), [*TUNE, *words, f"output={out}", f"seed={seed}"])
    found = Run(recipe, out=out).answers()
    plug_files(folder / "model", out / "plugin", folder / "made/owner", folder / "plugged")
    changed = load_recipe(
        tuner_recipe(folder),
        [*TUNE, *words, *wishes(folder), f"model.base={folder / 'plugged'}", f"seed={seed}"],
    )
    ground = Ground(changed, folder / "pi", shared=None, tasks=None, progress=Silent())
    plugged, heldout = Respondent.arm(ground, BASE, None), ground.prepared.heldout
    return {
        "emulator": found[BASE]["colours"].answer_loss,
        "tuned": found[SELECTED]["colours"].answer_loss,
        "plugged": rank_options(ground, plugged, heldout)["colours"].answer_loss,
        "written": write_answers(ground, plugged, heldout)["colours"].to_json(),
        "text": read_text(ground, plugged).nats_per_token,
    }


def test_a_row_answers_as_emulating_tuning_and_plugging_by_hand(folder: Path) -> None:
    hand = by_hand(folder, seed=1)
    told = table(folder)
    row = next(r for r in told["rows"] if r["method"] == "GradOT")
    assert row["per_seed"][1] == hand["plugged"]
    cell = json.loads((folder / "run/cells/GradOT-colours-seed-1/cell.json").read_text())
    assert cell["likelihood"]["colours"]["answer_loss"] == hand["plugged"]
    assert cell["generated"]["colours"] == hand["written"]
    assert cell["text_nats_per_token"] == hand["text"]
    assert cell["on_emulator"]["colours"]["answer_loss"] == hand["tuned"]
    loss = next(r for r in told["offsite"]["tables"][0]["rows"] if r["method"] == "GradOT")
    assert loss["emulator_zs"] == hand["emulator"]
    assert loss["pi"] == pytest.approx(row["answer_loss"])


def test_the_offsite_table_has_the_rows_in_the_open_beside(folder: Path) -> None:
    told = table(folder)
    by_loss, by_accuracy = told["offsite"]["tables"]
    assert (by_loss["metric"], by_accuracy["metric"]) == ("answer_loss", "correct_norm")
    loss = {r["method"]: r["answer_loss"] for r in told["rows"]}
    emulated, dropped = by_loss["rows"]
    assert (emulated["method"], dropped["method"]) == ("GradOT", "dropped")
    assert emulated["zs"] == loss["base"]
    assert emulated["ft_adapter"] == loss["openly"]
    assert emulated["ft"] is None  # no row chooses by gist and trains all layers
    assert dropped["ft_adapter"] is None
    delta = emulated["pi"] - emulated["eft"]
    assert emulated["delta"]["mean_difference"] == pytest.approx(delta)
    assert "emulator ZS" in (folder / "run/table.md").read_text()
    assert "On emulators" in (folder / "run/report.html").read_text()
    assert "2 emulators of one model" in (folder / "run/emulators/report.html").read_text()


def test_an_emulator_is_made_once_for_all_seeds(folder: Path) -> None:
    packages = sorted((folder / "run/shared/emulator").glob("*/package"))
    assert len(packages) == 2
    told = table(folder)["offsite"]["emulators"]
    assert sorted(Path(one["package"]) for one in told.values()) == packages
    assert told["GradOT"]["quality"]["ratios"]["middle"] < 1
    assert "layers" not in told["GradOT"]


def test_a_second_call_makes_and_asks_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for name in ("plug", "save_plugin"):
        monkeypatch.setattr(offsite, name, refuse)
    monkeypatch.setattr(Emulation, "emulate", refuse)
    before, text = files(folder / "run/shared"), (folder / "run/table.md").read_text()
    grid(folder)
    assert files(folder / "run/shared") == before
    assert (folder / "run/table.md").read_text() == text


def test_layers_of_a_row_are_those_of_the_model(folder: Path) -> None:
    """`layer_drop` leaves three layers of four: the model's last is the emulator's third."""
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert config["matrix"]["methods"][2]["tune"]["adapter"]["layers"] == [3]
    cell = folder / "run/cells/dropped-colours-seed-0/config.yaml"
    assert yaml.safe_load(cell.read_text())["tune"]["adapter"]["layers"] == [2]


def test_single_weights_of_a_row_are_named_as_in_its_emulator(folder: Path) -> None:
    chosen = {"method": "gallop", "options": {"density": 0.1}}
    rows = [{**ROWS[2], "tune": {"weights": chosen}}]
    recipe = offsite.fitted_rows(grid_recipe(folder, rows=rows))
    assert recipe.matrix is not None
    row = recipe.matrix.methods[0]
    assert isinstance(row, MatrixMethod)
    assert row.tune is not None
    ahead = row.tune.over(recipe.tune)
    owner = Path(table(folder)["offsite"]["emulators"]["dropped"]["owner"])
    made = offsite.Made(owner.with_name("package"), owner, read_owner(owner))
    names = [_eligible(tuning) for tuning in (ahead, made.tuning(ahead))]
    assert [_layers(found) for found in names] == [{0, 3}, {0, 2}]
    assert len(names[0]) == len(names[1])
    on_package = made.tuning(ahead)
    alone = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": str(made.package)}),
            "tune": on_package,
            "matrix": None,
        }
    )
    assert fitted(alone).tune == on_package


def _eligible(tuning: TuneSection) -> list[str]:
    assert tuning.weights is not None
    return tuning.weights.options["eligible"]


def _layers(names: list[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in names}


def test_the_recipe_of_a_cell_makes_the_data_owners_half(folder: Path, tmp_path: Path) -> None:
    home = folder / "run/cells/GradOT-colours-seed-0"
    recipe = load_recipe(home / "config.yaml", [f"output={tmp_path}"])
    assert fitted(recipe) == recipe
    compare(recipe, out=tmp_path, progress=Silent())
    again = json.loads((tmp_path / "cells/GradOT-colours-seed-0/cell.json").read_text())
    first = json.loads((home / "cell.json").read_text())
    assert again["likelihood"] == first["on_emulator"]
    assert again["selection"] == first["selection"]


def test_a_plan_makes_no_emulator(folder: Path, tmp_path: Path) -> None:
    recipe = grid_recipe(folder, f"output={tmp_path / 'none'}")
    facts = plan_grid(recipe, out=tmp_path / "none", progress=Silent()).facts
    assert facts["cells"] == facts["trainings"] == 8
    assert not (tmp_path / "none").exists()


def row(**changes: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    return [{**ROWS[1], **changes}]


@pytest.mark.parametrize(
    ("rows", "override", "error", "says"),
    [
        (row(), "model.adapter=x", ConfigError, "beside model.adapter"),
        (row(emulate={**SECTION, "method": "gradient"}), "seed=0", ConfigError, "no compressor"),
        (row(emulate={**SECTION, "options": {"x": 1}}), "seed=0", ConfigError, "x"),
        (row(tune={"adapter": {"kind": "full", "layers": [1]}}), "seed=0", ConfigError,
         "layer 1 does not train"),
        (row(), "tune.adapter={kind: series}", ConfigError, "series cannot be plugged"),
        (row(emulate={**SECTION, "adapters": [0, 4]}), "seed=0", SelectionError, "no layer 4"),
        (row(emulate={**SECTION, "method": "layer_drop", "budget": "global"}), "seed=0",
         ConfigError, "budget global would not be used"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_refused_before_anything_is_made(
    rows: list[dict[str, Any]],
    override: str,
    error: type[Exception],
    says: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        compare(grid_recipe(folder, override, rows=rows), out=tmp_path, progress=Silent())
    assert not (tmp_path / "shared").exists()


def test_no_emulator_is_made_of_an_emulator(folder: Path, tmp_path: Path) -> None:
    package = next((folder / "run/shared/emulator").glob("*/package"))
    recipe = grid_recipe(folder, f"model.base={package}", rows=row(tune=None))
    with pytest.raises(ConfigError, match="not made of an emulator"):
        compare(recipe, out=tmp_path, progress=Silent())


def test_settings_are_chosen_by_the_emulators_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def ask(ground: Ground, model: Respondent, questions: Questions) -> dict[str, Evaluation]:
        asked[model.name] = ground.recipe.model.base
        return rank_options(ground, model, questions)

    monkeypatch.setattr(grids, "rank_options", ask)
    recipe = grid_recipe(
        folder, f"output={tmp_path}", "matrix.seeds=[0]",
        "matrix.tune={learning_rate: [1e-2, 1e-6]}", rows=[ROWS[2]],
    )  # fmt: skip
    told = compare(recipe, out=tmp_path, progress=Silent())
    package = told.emulators["dropped"]["package"]
    trials = {name: base for name, base in asked.items() if " lr " in name}
    assert len(trials) == 4
    assert all((base == package) == name.startswith("dropped") for name, base in trials.items())
    assert next(r for r in told.rows if r.method == "dropped").learning_rate == 1e-2


def test_keys_said_once_serve_every_row_with_an_emulator(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "mine", "method": "gist", "emulate": {"method": "layer_drop", "keep_mlp": 0.5}},
        {"name": "open", "method": "gist"},
    ]
    said = json.dumps({**SECTION, "keep_mlp": 0.4})
    recipe = grid_recipe(tmp_path, f"matrix.emulate={said}", rows=rows)
    assert recipe.matrix is not None
    mine, openly = (row for row in recipe.matrix.methods if isinstance(row, MatrixMethod))
    assert openly.emulate is None
    assert mine.emulate is not None
    assert (mine.emulate.method, mine.emulate.keep_mlp) == ("layer_drop", 0.5)
    assert mine.emulate.calibration_blocks == SECTION["calibration_blocks"]
    again = tmp_path / "again.yaml"
    again.write_text(recipe.resolved_yaml())
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("said", "what"),
    [("{keep_mlps: 0.4}", "is no key"), ("{keep_mlp: 4}", "cannot be 4"), ("3", "a mapping")],
)
def test_a_mistake_said_once_is_told_where_it_is(said: str, what: str, tmp_path: Path) -> None:
    own = {"calibration": "text.jsonl"}
    rows: list[dict[str, Any]] = [{"name": "mine", "method": "gist", "emulate": own}]
    with pytest.raises(ConfigError, match=what) as caught:
        grid_recipe(tmp_path, f"matrix.emulate={said}", rows=rows)
    assert "command line, matrix.emulate" in str(caught.value)
