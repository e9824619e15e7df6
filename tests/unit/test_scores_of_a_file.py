"""A recipe that selects by scores of a file, and the verb that hands scores on."""

import json
from pathlib import Path
from typing import Any

import pytest

from selectune.cli import main
from selectune.data import read_examples
from selectune.errors import ConfigError, DataError, IncompatibleRunError
from selectune.pipeline.run import Run
from selectune.recipe import load_recipe
from small_run import small_recipe
from workspace import write_jsonl

OUTSIDE = ("score.method=file", "score.options.path=outside.jsonl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_recipe(tmp_path)
    pool = read_examples("pool.jsonl")
    rows = [{"id": e.id, "score": k, "length": 2 * k} for k, e in enumerate(pool)]
    write_jsonl(Path("outside.jsonl"), rows)
    return tmp_path


def made(*overrides: str, allow: tuple[str, ...] = ()) -> Run:
    recipe = load_recipe(Path("recipe.yaml"), [*OUTSIDE, *overrides])
    return Run(recipe, out=Path("run"), allow=allow)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def chosen() -> list[str]:
    return [row["prompt"] for row in rows_of("run/selected.jsonl")]


def test_a_recipe_selects_by_scores_of_a_file_without_a_model(folder: Path) -> None:
    made().select()
    prompts = [row["prompt"] for row in rows_of("pool.jsonl")]
    assert chosen() == prompts[: -1 - 9 : -1]  # the last nine, best first
    assert not Path("run/store").exists()
    assert not Path("run/losses").exists()


def test_changed_scores_are_refused_until_they_are_allowed(folder: Path) -> None:
    made().select()
    before = chosen()
    lines = Path("outside.jsonl").read_text().splitlines()
    Path("outside.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(IncompatibleRunError, match="score_file"):
        made().select()
    made(allow=("score_file",)).select()
    assert chosen() == before  # the same numbers in another order
    made("score.options.higher_is_better=false", allow=("score.options",)).select()
    assert chosen() != before


def test_a_missing_file_is_told_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(DataError, match=r"scores \"none\.jsonl\" do not exist"):
        made("score.options.path=none.jsonl").select()
    assert not Path("run/run.json").exists()


def test_a_recipe_without_the_path_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match='file needs the option "path"'):
        load_recipe(Path("recipe.yaml"), ["score.method=file"])
    with pytest.raises(ConfigError, match='"pth" is no option of file'):
        load_recipe(Path("recipe.yaml"), [*OUTSIDE, "score.options.pth=x"])


def test_scores_of_a_run_are_handed_on_by_id(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made().score()
    assert main(["scores", "run", "--to", "again.jsonl"]) == 0
    out = capfd.readouterr().out
    assert "59 examples scored by file" in out  # one row of the pool stands twice
    assert "columns beside the score: length" in out
    given = {row["id"]: row["score"] for row in rows_of("outside.jsonl")}
    handed = {row["id"]: row["score"] for row in rows_of("again.jsonl")}
    assert handed == {i: given[i] for i in handed}
    assert main(["scores", "again.jsonl", "--column", "length", "--lower-is-better", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["n"] == 59
    assert list(told["best"].values()) == [0.0, -2.0, -4.0, -6.0, -8.0]


def test_a_folder_without_scores_says_what_makes_them(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["scores", "model"]) == 2
    assert "selectune score recipe.yaml" in capfd.readouterr().err
