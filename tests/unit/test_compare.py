"""A grid on a tiny model: the table, what is shared, what a second call recomputes."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from selectune.cli import main
from selectune.digests import digest
from selectune.errors import ConfigError, SelectionError, TrainingError
from selectune.grid.cells import SELECTED, selected_file
from selectune.grid.compare import ComparisonTable, compare, plan_grid
from selectune.grid.together import share_grid
from selectune.models import load_base
from selectune.pipeline import arms, ground, prices
from selectune.pipeline.arms import SELECTED as SELECTED_ARM
from selectune.pipeline.processes import Part
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import ModelSection, Recipe, load_recipe
from selectune.selection import Scores
from small_run import small_recipe

MATRIX = """
matrix:
  methods: [gist, {name: short, method: length, options: {order: short}}, full]
  targets: [colours, other]
  seeds: [0, 1]
  tune: {learning_rate: [1e-2, 1e-5], epochs: [1]}
"""
WORDS = ("One and one are two, and nothing else.", "Two, three.")


def grid(folder: Path) -> ComparisonTable:
    recipe = load_recipe(folder / "recipe.yaml")
    return compare(recipe, out=Path(recipe.output), progress=Silent())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    small_recipe(folder, MATRIX)
    for name, source in (("other_target", "sums"), ("other_heldout", "words")):
        rows = (folder / "pool.jsonl").read_text().splitlines(keepends=True)
        some = [row for row in rows if f'"{source}"' in row][:8]
        (folder / f"{name}.jsonl").write_text("".join(some).replace("Question", "Ask"))
    text = (folder / "recipe.yaml").read_text()
    for name in ("target", "heldout"):
        text = text.replace(
            f"{folder}/{name}.jsonl}}",
            f"{folder}/{name}.jsonl, other: {folder}/other_{name}.jsonl}}",
        )
    (folder / "recipe.yaml").write_text(text)
    grid(folder)
    return folder


def table(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "run/table.json").read_text())["rows"]


def test_base_and_random_stand_beside_every_method(folder: Path) -> None:
    rows = table(folder)
    for task in ("colours", "other", "mean"):
        names = [r["method"] for r in rows if r["task"] == task]
        assert names == ["base", "random", "gist", "short", "full"]
    assert all(r["loss_vs_random"] is None for r in rows if r["method"] in ("base", "random"))


def test_one_setting_is_chosen_for_each_method_and_task(folder: Path) -> None:
    rows = [r for r in table(folder) if r["task"] != "mean" and r["method"] != "base"]
    assert all(r["learning_rate"] in (1e-2, 1e-5) for r in rows)
    # Random weights learn nothing at 1e-5: a grid that can choose takes the other.
    assert {r["learning_rate"] for r in rows if r["method"] == "full"} == {1e-2}


def test_precision_is_the_share_of_the_targets_own_source(folder: Path) -> None:
    full = [r for r in table(folder) if r["method"] == "full"]
    found = [round(float(str(r["precision"])), 2) for r in full if r["task"] != "mean"]
    assert found == [0.32, 0.34]  # 19 and 20 of 59: one row about colours stands twice


def test_one_warmup_and_one_store_serve_a_seed(folder: Path) -> None:
    shared = folder / "run/shared"
    assert len(list(shared.glob("store/*/pool"))) == 2
    assert len(list(shared.glob("warmup/*/adapter"))) == 2
    # Methods that do not look at the target are trained once for both tasks.
    adapters = len(list(shared.glob("tune/*/adapter")))
    most = 2 * 2 * 2 + 3 * 2 * 2  # gist by task; three others; two settings; two seeds
    assert adapters <= most


def test_a_second_call_trains_asks_and_equips_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "equip", pytest.fail)
    loads = Counter[str]()

    def counted(section: ModelSection, **options: object) -> object:
        loads[section.base] += 1
        return load_base(section, **options)

    monkeypatch.setattr(ground, "load_base", counted)
    before = {p: p.stat().st_mtime_ns for p in (folder / "run/shared").rglob("*.safetensors")}
    text = (folder / "run/table.md").read_text()
    assert main(["compare", str(folder / "recipe.yaml"), "--json"]) == 0
    told = capfd.readouterr()
    assert json.loads(told.out)["rows"] == table(folder)
    assert "grid        16 cells of 4 methods and 2 seeds" in told.err  # off a terminal too
    after = {p: p.stat().st_mtime_ns for p in (folder / "run/shared").rglob("*.safetensors")}
    assert before == after
    assert (folder / "run/table.md").read_text() == text
    assert loads.total() == 4  # for each seed: the base by itself, and below its warm-up


def test_heldout_examples_are_not_read_to_choose_settings(folder: Path, tmp_path: Path) -> None:
    """Other held-out answers change the evaluation, and no choice before it."""
    chosen = [(r["task"], r["method"], r["learning_rate"]) for r in table(folder)]
    heldout = folder / "heldout.jsonl"
    kept = heldout.read_text()
    heldout.write_text(kept.replace("Question: colour of", "Question: say colour of"))
    recipe = load_recipe(folder / "recipe.yaml", [f"output={tmp_path / 'other'}"])
    compare(recipe, out=tmp_path / "other", progress=Silent())
    heldout.write_text(kept)
    rows = json.loads((tmp_path / "other/table.json").read_text())["rows"]
    assert [(r["task"], r["method"], r["learning_rate"]) for r in rows] == chosen


TRAINED = """
matrix:
  methods:
    - {name: picked, method: random, tune: {method: gast, options: {keep: 0.5, pick: random}}}
    - {name: aimed, method: random, tune: {method: gast, options: {target: target}}}
    - {name: best, method: length}
  targets: [colours, other]
  seeds: [0, 1]
  tune: {learning_rate: [1e-2, 1e-5], epochs: [1], choose: all}
"""


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a grid whose rows train the same examples in other ways."""
    home = tmp_path_factory.mktemp("trained")
    text = (folder / "recipe.yaml").read_text().replace(MATRIX, TRAINED)
    (home / "recipe.yaml").write_text(text.replace(f"{folder}/run", f"{home}/run"))
    grid(home)
    return home


def test_rows_may_train_the_same_examples_in_other_ways(trained: Path) -> None:
    rows = table(trained)
    for task in ("colours", "other", "mean"):
        mine = [r for r in rows if r["task"] == task]
        assert [r["method"] for r in mine] == ["base", "random", "picked", "aimed", "best"]
        losses = [r["answer_loss"] for r in mine]
        assert len(set(losses)) == len(losses)
        assert mine[0]["time_ratio"] is None
        assert mine[1]["time_ratio"] == 1.0
        assert all(float(str(r["seconds_per_step"])) > 0 for r in mine[1:])
        assert all(r["peak_ratio"] is None for r in mine)  # of the whole process, on a CPU
    chosen = {r["method"]: (r["learning_rate"], r["n_examples"]) for r in rows}
    assert chosen["picked"] == chosen["random"] == (1e-2, 9)
    mean = next(r for r in rows if r["task"] == "mean" and r["method"] == "picked")
    assert mean["loss_vs_random"] is not None
    assert mean["learning_rate"] == 1e-2


def test_one_setting_and_one_training_for_all_tasks(trained: Path) -> None:
    tried = json.loads((trained / "run/table.json").read_text())["tried"]
    assert {tuple(t["tasks"]) for t in tried} == {("colours", "other")}
    assert len(tried) == 4 * 2
    # Two settings on the first seed, the better one on the other.
    assert len(list((trained / "run/shared").glob("tune/*/adapter"))) == 4 * 3
    records = list((trained / "run/shared").glob("tune/*/adapter/records.json"))
    assert len(records) == 2 * 3


def test_csv_and_markdown_hold_the_same_rows(folder: Path) -> None:
    n = len(table(folder))
    assert len((folder / "run/table.csv").read_text().splitlines()) == n + 1
    lines = (folder / "run/table.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == n + 2
    assert lines[-1].startswith("peak / random is of a GPU alone")
    body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:-2])]
    printed = [dict(zip(body[0], cells, strict=True)) for cells in body[1:]]
    with (folder / "run/table.csv").open() as file:
        told = list(csv.DictReader(file))
    for row, shown, kept in zip(table(folder), printed, told, strict=True):
        assert shown["method"] == kept["method"] == row["method"]
        assert shown["won : lost"] == wins(row)
        assert kept["won"] == ("" if row["won"] is None else str(row["won"]))
        assert shown["s / model"] == ("-" if row["seconds"] is None else f"{row['seconds']:.1f}")


def wins(row: dict[str, object]) -> str:
    return "-" if row["won"] is None else f"{row['won']} : {row['lost']}"


def test_a_task_is_won_where_the_interval_leaves_no_doubt(folder: Path) -> None:
    rows = table(folder)
    for row in rows:
        if row["method"] in ("base", "random"):
            assert row["won"] is row["lost"] is None
            continue
        mine = [r for r in rows if r["method"] == row["method"] and r["task"] != "mean"]
        mine = mine if row["task"] == "mean" else [row]
        ends = [r["loss_vs_random"] for r in mine]
        assert row["won"] == sum(e["high"] < 0 for e in ends)  # type: ignore[index]
        assert row["lost"] == sum(e["low"] > 0 for e in ends)  # type: ignore[index]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("matrix.methods=[gist, gist]", 'two methods of the matrix are called "gist"'),
        ("matrix.methods=[{name: random, method: gist}]", "what every row is compared with"),
        (
            "matrix.methods=[{name: random, method: random, epochs: 1}]",
            "what every row is compared",
        ),
        ("matrix.methods=[{name: base, method: gist}]", "the untouched model"),
        ("matrix.methods=[{name: a b, method: gist}, {name: a/b, method: gist}]", "share a folder"),
        ("data.heldout=null", "has no held-out examples"),
    ],
)
def test_impossible_grids_are_refused(
    folder: Path, tmp_path: Path, override: str, words: str
) -> None:
    recipe = load_recipe(folder / "recipe.yaml", [override, f"output={tmp_path / 'x'}"])
    with pytest.raises(ConfigError, match=words):
        compare(recipe, out=tmp_path / "x", progress=Silent())


def test_a_task_is_not_called_like_the_row_of_all(folder: Path, tmp_path: Path) -> None:
    overrides = [f"data.{what}={{mean: {folder}/{what}.jsonl}}" for what in ("target", "heldout")]
    recipe = load_recipe(folder / "recipe.yaml", [*overrides, "matrix.targets=[]"])
    with pytest.raises(ConfigError, match="the row of all tasks together"):
        compare(recipe, out=tmp_path / "x", progress=Silent())


def test_a_seed_counts_once(folder: Path) -> None:
    with pytest.raises(ConfigError, match="stands twice"):
        load_recipe(folder / "recipe.yaml", ["matrix.seeds=[0, 1, 0]"])


def test_evaluating_two_tasks_costs_both(folder: Path) -> None:
    costs = json.loads((folder / "run/table.json").read_text())["costs"]["0"]
    parts = [json.loads(p.read_text())["seconds"] for p in bases(folder)]
    assert len(parts) == 2
    assert costs["evaluate base"]["seconds"] == pytest.approx(sum(parts), abs=2e-3)


def bases(folder: Path) -> list[Path]:
    """The prices of asking the base: the evaluations that were made before any training."""
    every = (folder / "run/shared/evaluation").glob("*.cost.json")
    return sorted(every, key=lambda path: path.stat().st_mtime_ns)[:2]


def test_the_page_shows_every_method_and_what_a_model_cost(folder: Path) -> None:
    page = (folder / "run/report.html").read_text()
    for words in ("Against random", "gist", "short", "What each reached", "Quality and price"):
        assert words in page
    rows = {r["method"]: r for r in table(folder) if r["task"] == "mean"}
    seconds = {name: float(str(row["seconds"])) for name, row in rows.items() if name != "base"}
    # Only gist needs a warm-up and a gradient pass, and both trainings are as long.
    assert seconds["gist"] > seconds["random"] > 0
    assert rows["base"]["seconds"] is None


def test_every_cell_leaves_its_numbers_and_the_recipe_that_makes_it_anew(folder: Path) -> None:
    cells = sorted(path.name for path in (folder / "run/cells").iterdir())
    methods, tasks = ("random", "gist", "short", "full"), ("colours", "other")
    assert cells == sorted(f"{m}-{t}-seed-{s}" for m in methods for t in tasks for s in (0, 1))
    rows = {(r["task"], r["method"]): r for r in table(folder)}
    found = json.loads((folder / "run/cells/gist-other-seed-1/cell.json").read_text())
    row = rows["other", "gist"]
    assert found["likelihood"]["other"]["answer_loss"] == row["per_seed"][1]  # type: ignore[index]
    assert found["learning_rate"] == row["learning_rate"]


def test_every_cell_keeps_what_it_chose(folder: Path) -> None:
    for home in (folder / "run/cells").iterdir():
        facts = json.loads((home / "cell.json").read_text())
        if facts["method"] == "full":
            assert not (home / SELECTED).exists()  # it takes everything
            continue
        chosen = Scores.load(home / SELECTED)
        assert digest({"ids": chosen.ids}) == facts["selection"]
        assert list(chosen.ids) == chosen.ranking()
        assert len(chosen) == facts["n_examples"] == 9
        assert chosen.method == {"short": "length"}.get(facts["method"], facts["method"])
        assert chosen.about["chosen_of"] > 9
        assert bool(chosen.best_target) == (facts["method"] == "gist")


def test_scores_shows_a_cell_and_names_one_of_a_grid(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = folder / "run/cells/gist-other-seed-1"
    assert main(["scores", str(cell)]) == 0
    told = capfd.readouterr().out
    assert "9 examples chosen of" in told
    assert "scored by gist" in told
    with pytest.raises(ConfigError, match=rf"such as selectune scores {folder}/run/cells/\w+-"):
        selected_file(folder / "run")
    assert selected_file(tmp_path) is None
    # As older versions left it, and as `full` does.
    (tmp_path / "cell.json").write_bytes((cell / "cell.json").read_bytes())
    with pytest.raises(ConfigError, match="only a digest"):
        selected_file(tmp_path)


@pytest.mark.parametrize("name", ["gist-other-seed-1", "full-colours-seed-0"])
def test_a_cell_is_replayed_alone(folder: Path, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(
        folder / f"run/cells/{name}/config.yaml", [f"output={tmp_path / 'replay'}"]
    )
    compare(recipe, out=tmp_path / "replay", progress=Silent())
    first = json.loads((folder / f"run/cells/{name}/cell.json").read_text())
    again = json.loads((tmp_path / f"replay/cells/{name}/cell.json").read_text())
    for one in (first, again):
        del one["seconds_per_step"]
    assert again == first


def test_a_replay_goes_beside_its_cell_unless_told_otherwise(folder: Path) -> None:
    home = folder / "run/cells/gist-other-seed-1"
    assert load_recipe(home / "config.yaml").output == str(home / "replay")


def test_finished_trainings_leave_no_checkpoints(folder: Path) -> None:
    assert not list((folder / "run/shared/tune").glob("*/checkpoint-*"))


def test_the_forecast_counts_every_training_once(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    facts = plan_grid(recipe, out=folder / "none", progress=Silent()).facts
    assert not (folder / "none").exists()
    assert facts["cells"] == 4 * 2 * 2
    done = len(list((folder / "run/shared").glob("tune/*/adapter")))
    # gist by task, three others for both tasks; two settings on the first seed, one on the other.
    assert facts["trainings"] == (2 + 3) * (2 + 1)
    assert done == facts["trainings"]
    assert set(facts["seconds"]) == {"warmup", "gradients", "trainings", "evaluation"}
    assert all(value >= 0 for value in facts["seconds"].values())
    alone = Run(recipe.changed({"matrix": None}), out=folder / "none").plan()
    assert facts["memory_bytes"] == alone.facts["memory_bytes"]


def test_a_forecast_counts_what_a_run_counts_of_every_scorer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = {"float32": 1e6, "bfloat16": 4e6}
    monkeypatch.setattr(prices, "_products_per_second", lambda _, precision, __: rate[precision])
    scorers = ["gist", "less", "rds"]
    cheap = ["score.max_length=50%", "score.precision=bfloat16", "score.layers=top:1"]
    whole, short = (
        plan_grid(
            load_recipe(
                folder / "recipe.yaml",
                [f"matrix.methods=[{', '.join(scorers)}]", "matrix.tune=null", *economy],
            ),
            out=folder / "none",
            progress=Silent(),
        ).facts
        for economy in ([], cheap)
    )
    alone = {
        (scorer, is_cheap): Run(
            load_recipe(
                folder / "recipe.yaml",
                [f"score.method={scorer}", "matrix=null", *(cheap if is_cheap else [])],
            ),
            out=folder / "none",
        )
        .plan()
        .facts
        for scorer, is_cheap in (("gist", False), ("gist", True), ("less", False), ("rds", False))
    }
    disk = {scorer: alone[scorer, False]["disk_bytes"] for scorer in scorers}
    kept = "checkpoints of the warm-up"
    assert whole["disk_bytes"][kept] == 2 * disk["less"][kept] > 0  # two seeds
    same = "cosines of hidden states"
    assert whole["disk_bytes"][same] == disk["rds"][same] > 0
    brief = "target gradients, until a pass is done"
    assert whole["disk_bytes"][brief] == disk["gist"][brief] > 0
    # gist reads plain gradients of the first epoch, less those of Adam after every one.
    assert whole["disk_bytes"]["store"] == 2 * (disk["gist"]["store"] + disk["less"]["store"])
    assert whole["memory_bytes"] == alone["less", False]["memory_bytes"]
    for facts, is_cheap in ((whole, False), (short, True)):
        one = alone["gist", is_cheap]["seconds"]["gradients"]
        assert facts["seconds"]["gradients"] == pytest.approx(2 * one, abs=0.2)
    assert short["seconds"]["gradients"] < whole["seconds"]["gradients"] / 4
    assert short["seconds"]["warmup"] == whole["seconds"]["warmup"]


def test_a_row_takes_gradients_of_an_adapter_of_its_own_and_trains_as_the_others(
    folder: Path, tmp_path: Path
) -> None:
    own = "{kind: lora, rank: 1, alpha: 2.0, modules: [k_proj]}"
    rows = f"[gist, {{name: own, method: gist, adapter: {own}}}]"
    words = [f"output={tmp_path / 'run'}", "matrix.seeds=[1]", "matrix.targets=[colours]"]
    recipe = load_recipe(
        folder / "recipe.yaml", [f"matrix.methods={rows}", "matrix.tune=null", *words]
    )
    compare(recipe, out=tmp_path / "run", progress=Silent())
    section = recipe.adapter.model_dump_json()
    alone = load_recipe(
        folder / "recipe.yaml",
        ["matrix=null", f"adapter={own}", f"tune.adapter={section}", "seed=1", "tune.controls=[]"],
    )
    hand = Run(alone, out=tmp_path / "alone", tasks=["colours"]).answers()[SELECTED_ARM]
    cells = {
        name: json.loads((tmp_path / f"run/cells/{name}-colours-seed-1/cell.json").read_text())
        for name in ("gist", "own")
    }
    loss = cells["own"]["likelihood"]["colours"]["answer_loss"]
    assert loss == hand["colours"].answer_loss
    assert cells["own"]["selection"] != cells["gist"]["selection"]
    assert len(list((tmp_path / "run/shared/warmup").glob("*/adapter"))) == 2
    trained = {
        (path / "adapter/adapter_config.json").read_text()
        for path in (tmp_path / "run/shared/tune").iterdir()
        if path.is_dir()
    }
    assert len(trained) == 1
    again = load_recipe(tmp_path / "run/cells/own-colours-seed-1/config.yaml")
    assert again.matrix is not None
    assert again.matrix.methods[0].adapter.rank == 1


def test_a_learning_rate_that_diverges_is_out_of_the_race(folder: Path, tmp_path: Path) -> None:
    words = ["matrix.methods=[random]", "matrix.targets=[colours]", "matrix.seeds=[0]"]

    def race(rates: str) -> ComparisonTable:
        given = [*words, f"matrix.tune.learning_rate={rates}", f"output={tmp_path}"]
        recipe = load_recipe(folder / "recipe.yaml", given)
        return compare(recipe, out=tmp_path, progress=Silent())

    table = race("[1e37, 1e-2]")
    tried = json.loads((tmp_path / "table.json").read_text())["tried"]
    losses = {one["learning_rate"]: one["answer_loss"] for one in tried}
    assert losses[1e37] is None
    assert losses[1e-2] > 0
    assert {row.learning_rate for row in table.rows if row.method == "random"} == {1e-2}
    assert "training failed" in (tmp_path / "report.html").read_text()
    with pytest.raises(TrainingError, match="random trains with no learning rate that was tried"):
        race("[1e37, 9e36]")


@pytest.mark.parametrize("is_shared", [False, True])
def test_cells_that_cannot_be_made_leave_all_others(
    folder: Path, tmp_path: Path, *, is_shared: bool
) -> None:
    one = "{name: one, method: gist, options: {rank: 1}}"
    words = ["matrix.targets=[colours]", "matrix.tune=null", f"output={tmp_path}"]

    def recipe(methods: str) -> Recipe:
        return load_recipe(folder / "recipe.yaml", [*words, f"matrix.methods={methods}"])

    broken, whole = recipe(f"[{one}, length]"), recipe("[length]")
    if is_shared:
        share_grid(broken, out=tmp_path, part=Part(0, 1, "launch"), progress=Silent())
    before = {path.name for path in tmp_path.glob("cells/*")}
    names = {f"{name}-colours-seed-{seed}" for name in ("random", "length") for seed in (0, 1)}
    assert before == (names if is_shared else set())
    says = "2 of 6 cells cannot be made, so there is no table: GIST has rank 1"
    with pytest.raises(SelectionError, match=says) as raised:
        compare(broken, out=tmp_path, progress=Silent())
    assert "one on colours, seed 0: target task colours" in raised.value.where
    assert 'so with 1 others: "one on colours, seed 1"' in raised.value.where
    assert {path.name for path in tmp_path.glob("cells/*")} == names
    assert not (tmp_path / "table.json").exists()
    trained = {path.name for path in tmp_path.glob("shared/tune/*")}
    table = compare(whole, out=tmp_path, progress=Silent())
    assert {row.method for row in table.rows} == {"base", "random", "length"}
    assert {path.name for path in tmp_path.glob("shared/tune/*")} == trained


def test_a_target_without_a_name_makes_cells_that_can_be_replayed(
    folder: Path, tmp_path: Path
) -> None:
    words = [f"data.{name}={folder}/{name}.jsonl" for name in ("target", "heldout")]
    words += ["matrix.methods=[random]", "matrix.targets=[]", "matrix.seeds=[0]"]
    recipe = load_recipe(folder / "recipe.yaml", [*words, f"output={tmp_path}"])
    table = compare(recipe, out=tmp_path, progress=Silent())
    assert {row.task for row in table.rows} == {"target"}
    again = load_recipe(tmp_path / "cells/random-target-seed-0/config.yaml")
    assert again.matrix is not None
    assert again.matrix.targets == ["target"]


def test_rows_of_another_budget_stand_beside_random_of_that_budget(
    folder: Path, tmp_path: Path
) -> None:
    words = [f"output={tmp_path}", "matrix.seeds=[0, 1]", "matrix.tune=null"]
    recipe = load_recipe(
        folder / "recipe.yaml",
        [*words, "matrix.methods=[gist, full]", "matrix.budgets=[0.1, 6]"],
    )
    told = compare(recipe, out=tmp_path, progress=Silent())
    rows = {row.method: row for row in told.rows if row.task == "colours"}
    names = ["base", "random", "random, 0.1", "random, 6", "gist, 0.1", "gist, 6", "full"]
    assert list(rows) == names
    assert rows["random, 0.1"].n_examples == rows["gist, 0.1"].n_examples
    assert rows["random, 6"].n_examples == rows["gist, 6"].n_examples == 6
    for method, random in (("gist, 6", "random, 6"), ("gist, 0.1", "random, 0.1")):
        interval = rows[method].loss_vs_random
        assert interval is not None
        losses = [np.mean(rows[name].per_seed) for name in (method, random)]
        assert interval.mean_difference == pytest.approx(losses[0] - losses[1])
        assert rows[random].loss_vs_random is None
    # One warm-up and one pass for each seed, whatever the budgets.
    assert len(list((tmp_path / "shared").glob("warmup/*/adapter"))) == 2
    assert len(list((tmp_path / "shared/store").glob("*/pool"))) == 2
    again = load_recipe(tmp_path / "cells/gist_6-colours-seed-1/config.yaml")
    replayed = compare(again, out=tmp_path / "again", progress=Silent())
    assert [row.method for row in replayed.rows] == ["base", "random", "random, 6", "gist, 6"]
    alone = next(row for row in replayed.rows if row.method == "gist, 6")
    assert alone.answer_loss == rows["gist, 6"].per_seed[1]


def test_a_row_may_select_by_a_rule_and_quotas_of_its_own(folder: Path, tmp_path: Path) -> None:
    quota = "{quotas: {sums: [0.5, 0.5]}}"
    rows = "[gist, {name: turns, method: gist, select: {rule: round_robin}}, "
    rows += f"{{name: sums, method: gist, select: {quota}}}]"
    words = ["matrix.seeds=[0]", "matrix.tune=null", "select.budget=8", f"output={tmp_path}"]
    recipe = load_recipe(folder / "recipe.yaml", [f"matrix.methods={rows}", *words])
    told = compare(recipe, out=tmp_path, progress=Silent())
    assert {row.method for row in told.rows} == {"base", "random", "gist", "turns", "sums"}
    out = tmp_path / "alone"
    for name, own in (("turns", "select.rule=round_robin"), ("sums", f"select={quota}")):
        words = ["matrix=null", own, "select.budget=8", "tune.controls=[]"]
        run = Run(load_recipe(folder / "recipe.yaml", words), out=out / name, tasks=["other"])
        loss = run.answers()[SELECTED_ARM]["other"].answer_loss
        assert (
            next(row for row in told.rows if (row.method, row.task) == (name, "other")).answer_loss
            == loss
        )


def test_a_forecast_prices_answers_written_and_text_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prices, "_products_per_second", lambda *_: 1e4)  # so that tenths tell
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": words}) + "\n" for words in WORDS))
    rows = ["matrix.methods=[random]", "matrix.seeds=[0]", "matrix.tune=null"]
    evaluate = ["evaluate.generate=true", f"evaluate.text={text}", "evaluate.limit=3"]
    recipe = load_recipe(folder / "recipe.yaml", [*rows, *evaluate])
    facts = plan_grid(recipe, out=tmp_path / "none", progress=Silent()).facts
    run = Run(recipe.changed({"matrix": None, "evaluate.text": None}), out=tmp_path / "none")
    pool, heldout = run.ground.tokens.pool, run.ground.prepared.heldout
    mean, asked = float(pool.lengths.mean()), [e for task in heldout.values() for e in task[:3]]
    n_ranked = 2 * sum(len(e.options) for e in asked)  # base, and one model for both tasks
    assert facts["trainings"] == 1
    seconds = facts["seconds"]
    per_token = seconds["evaluation"] / (n_ranked * mean)
    assert seconds["answers written"] == pytest.approx(len(asked) * (mean + 16) * per_token, 0.01)
    n_tokens = sum(len(run.ground.tokenizer(words)["input_ids"]) for words in WORDS)
    assert seconds["text read"] == pytest.approx(2 * n_tokens * per_token, 0.01)


def test_a_forecast_of_a_transfer_counts_each_task_by_itself(tmp_path: Path) -> None:
    from unit.test_transfer_in_compare import two_tasks

    recipe = load_recipe(two_tasks(tmp_path), ["score.method=random", "tune.epochs=1"])
    facts = plan_grid(recipe, out=tmp_path / "none", progress=Silent()).facts
    assert facts["trainings"] == facts["cells"] == 2 * 2 * 2
    assert facts["to_choose_settings"] == 0
    assert "weights" in facts["seconds"]
    assert "places and base values of single weights" in facts["memory_bytes"]
