"""A grid by transfer on a tiny model: trained on one task's own examples, tested on all."""

import json
from pathlib import Path

import pytest
from torch import nn

from selectune.errors import ConfigError, DataError
from selectune.grid.compare import ComparisonTable, compare
from selectune.models import Base
from selectune.pipeline import answered
from selectune.progress import Silent
from selectune.recipe import load_recipe
from small_run import small_recipe

MATRIX = """
matrix:
  methods:
    - random
    - {name: gallop, method: random, tune: {weights: {method: gallop, density: 0.1}}}
  seeds: [0, 1]
  transfer: true
"""


def two_tasks(folder: Path, matrix: str = MATRIX) -> Path:
    path = small_recipe(folder, matrix)
    rows = (folder / "pool.jsonl").read_text().splitlines(keepends=True)
    sums = [row for row in rows if '"sums"' in row][:8]
    for name in ("target", "heldout"):
        text = "".join(sums).replace("Question", f"Ask {name}")
        (folder / f"sums_{name}.jsonl").write_text(text)
    text = path.read_text()
    for name in ("target", "heldout"):
        mine = f"{folder}/{name}.jsonl}}"
        text = text.replace(mine, f"{mine[:-1]}, sums: {folder}/sums_{name}.jsonl}}")
    path.write_text(text)
    return path


def grid(path: Path, *overrides: str) -> ComparisonTable:
    recipe = load_recipe(path, ["score.method=random", "tune.epochs=1", *overrides])
    return compare(recipe, out=Path(recipe.output), progress=Silent())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    texts = ["The sky is blue. " * 3, "One and one are two.", "Nobody knows."]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(rows)
    grid(two_tasks(folder), *everything(folder))
    return folder


def everything(folder: Path) -> tuple[str, ...]:
    return ("evaluate.generate=true", f"evaluate.text={folder}/text.jsonl")


def transfer(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "run/table.json").read_text())["transfer"]


def test_every_method_has_a_row_per_scoring(folder: Path) -> None:
    rows = [(row["scoring"], row["method"]) for row in transfer(folder)]
    assert rows == [
        ("likelihood", "random"),
        ("likelihood", "gallop"),
        ("generated", "random"),
        ("generated", "gallop"),
    ]
    assert all(
        row["tasks"] == ["colours", "sums"] and row["n_seeds"] == 2 for row in transfer(folder)
    )


def test_what_a_task_gives_itself_stands_in_both_tables(folder: Path) -> None:
    table = json.loads((folder / "run/table.json").read_text())["rows"]
    own = {
        method: sum(r["accuracy"] for r in table if r["method"] == method and r["task"] != "mean")
        / 2
        for method in ("random", "gallop")
    }
    for row in transfer(folder)[:2]:
        assert row["estimates"]["id_accuracy"]["value"] == pytest.approx(own[row["method"]])  # type: ignore[index]


def test_plain_text_is_read_by_base_and_every_model(folder: Path) -> None:
    base, random, gallop = json.loads((folder / "run/table.json").read_text())["text"]
    assert (base["method"], random["method"], gallop["method"]) == ("base", "random", "gallop")
    for row in (random, gallop):
        away = row["nats_per_token"] - base["nats_per_token"]
        assert row["vs_base"]["value"] == pytest.approx(away)
        assert row["vs_base"]["low"] <= away <= row["vs_base"]["high"]
        assert away != 0
    assert random["vs_random"] is None
    between = gallop["nats_per_token"] - random["nats_per_token"]
    assert gallop["vs_random"]["value"] == pytest.approx(between)
    # Four models of each method: two tasks, two seeds.
    losses = list((folder / "run/shared/reading").glob("*/loss.json"))
    assert len(losses) == 1 + 2 * 4
    assert "perplexity" in (folder / "run/table.md").read_text()


def test_a_model_that_is_asked_everything_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = answered.load_tuned

    def counted(base: Base, path: Path) -> nn.Module:
        loaded.append(path)
        return load(base, path)

    monkeypatch.setattr(answered, "load_tuned", counted)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Nobody knows."}) + "\n")
    grid(two_tasks(tmp_path), *everything(tmp_path), "matrix.seeds=[0]")
    assert len(loaded) == len(set(loaded)) == 4  # two methods, two tasks


def test_models_are_trained_on_their_tasks_own_examples(folder: Path) -> None:
    table = json.loads((folder / "run/table.json").read_text())["rows"]
    assert {row["precision"] for row in table if row["precision"] is not None} == {1.0}


def test_the_text_shows_what_was_forgotten(folder: Path) -> None:
    text = (folder / "run/table.md").read_text()
    assert "forget ratio" in text
    assert "collapse %" in text


def test_the_same_command_again_computes_nothing(folder: Path) -> None:
    files = list((folder / "run/shared").rglob("*.parquet"))
    before = {p: p.stat().st_mtime_ns for p in files}
    table = (folder / "run/table.json").read_bytes()
    grid(folder / "recipe.yaml", *everything(folder))
    assert {p: p.stat().st_mtime_ns for p in files} == before
    again = json.loads((folder / "run/table.json").read_bytes())
    assert again["transfer"] == json.loads(table)["transfer"]
    assert again["text"] == json.loads(table)["text"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("matrix.tune={learning_rate: [1e-2], choose: all}", "tells nothing about transfer"),
        ("select.quotas={sums: [0.0, 0.5]}", "quotas would not be used"),
    ],
)
def test_what_contradicts_transfer_is_refused(tmp_path: Path, override: str, says: str) -> None:
    path = two_tasks(tmp_path)
    with pytest.raises(ConfigError, match=says):
        load_recipe(path, [override])


def test_one_task_is_refused(tmp_path: Path) -> None:
    path = small_recipe(tmp_path, MATRIX)
    with pytest.raises(ConfigError, match="one target task"):
        load_recipe(path)


def test_a_pool_without_the_tasks_examples_is_refused(tmp_path: Path) -> None:
    path = two_tasks(tmp_path)
    target = tmp_path / "sums_target.jsonl"
    target.write_text(target.read_text().replace('"sums"', '"elsewhere"'))
    with pytest.raises(DataError, match="no examples of sums"):
        grid(path)


def test_a_cell_of_transfer_is_replayed_alone(folder: Path, tmp_path: Path) -> None:
    home = folder / "run/cells/gallop-sums-seed-1"
    recipe = load_recipe(home / "config.yaml", [f"output={tmp_path / 'replay'}"])
    compare(recipe, out=tmp_path / "replay", progress=Silent())
    first = json.loads((home / "cell.json").read_text())
    again = json.loads((tmp_path / f"replay/cells/{home.name}/cell.json").read_text())
    assert list(first["generated"]) == ["colours", "sums"]
    assert first["text_nats_per_token"] > 0
    for one in (first, again):
        del one["seconds_per_step"]
    assert again == first


def test_the_whole_pool_is_that_of_the_task_where_tasks_train_by_themselves(
    tmp_path: Path,
) -> None:
    path = two_tasks(tmp_path)
    methods = ["matrix.methods=[full]", "matrix.seeds=[0]", "matrix.targets=[sums]"]
    grid(path, *methods, "matrix.transfer=[colours]")
    cell = json.loads((tmp_path / "run/cells/full-sums-seed-0/cell.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    assert 0 < cell["n_examples"] <= sum(row["source"] == "sums" for row in rows) < len(rows)


def test_without_options_there_is_no_table_of_transfer(tmp_path: Path) -> None:
    path = two_tasks(tmp_path)
    for name in ("sums_heldout", "heldout"):
        file = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        bare = [{k: v for k, v in row.items() if k != "options"} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in bare))
    found = grid(path, "matrix.methods=[random]", "matrix.seeds=[0]")
    assert not found.transfers
    assert {row.task for row in found.rows} >= {"colours", "sums"}


def test_models_may_be_tested_on_named_tasks_alone(tmp_path: Path) -> None:
    path = two_tasks(tmp_path)
    found = grid(path, "matrix.targets=[sums]", "matrix.transfer=[colours]", "matrix.seeds=[0]")
    assert {row.task for row in found.rows} == {"sums"}
    assert not found.transfers  # a round-robin trains on every task that it tests on
    cell = json.loads((tmp_path / "run/cells/gallop-sums-seed-0/cell.json").read_text())
    assert list(cell["likelihood"]) == ["colours", "sums"]
    alone = grid(path, "matrix.targets=[sums]", "matrix.transfer=[sums]", "matrix.seeds=[0]")
    assert not alone.transfers
    with pytest.raises(ConfigError, match='"tea" is no target'):
        load_recipe(path, ["matrix.transfer=[colours, tea]"])
