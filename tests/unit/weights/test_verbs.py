"""merge, export and what verify says of a delta: results, files, messages."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from selectune.cli import weights
from selectune.errors import SelectuneError
from selectune.weights.delta import SparseDelta
from selectune.weights.merging import merge, unmerge
from unit.weights.deltas import assert_same_bits, bits, tiny_delta
from workspace import save_model

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

Say = Callable[..., str]


@pytest.fixture(autouse=True)
def _quiet_libraries() -> None:
    logging.disable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two deltas of it."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained("base", dtype="auto")
    tiny_delta(model, 1, names="proj").save("one")
    tiny_delta(model, 2, names="proj").save("two", indices="gaps")
    tiny_delta(model, 3, names="embed").save("words")
    return tmp_path


@pytest.fixture
def say(folder: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    """Return a function that runs a verb and gives what it prints."""

    def run(*words: str) -> str:
        app = typer.Typer()
        weights.add_to(app)
        with pytest.raises(SystemExit) as end:
            typer.main.get_command(app)(args=list(words), prog_name="selectune")
        assert end.value.code == 0
        return capfd.readouterr().out

    return run


def test_merge_writes_a_model_that_loads_as_any(say: Say) -> None:
    out = say("merge", "base", "one", "two", "--out", "merged")
    assert "merged: base with one + two" in out
    assert 'selectune.unmerge("merged")' in out
    expected = merge("base", ["one", "two"])
    found = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert_same_bits(found, bits(expected))
    assert AutoTokenizer.from_pretrained("merged").pad_token == "<pad>"
    base = AutoModelForCausalLM.from_pretrained("base", dtype="auto")
    assert_same_bits(unmerge("merged"), bits(base))


def test_merge_tells_a_program_the_same(say: Say) -> None:
    told = json.loads(say("merge", "base", "one", "--scale", "0.5", "--out", "merged", "--json"))
    delta = SparseDelta.load("one")
    assert told.pop("n_moved") <= delta.n_entries
    assert told == {
        "folder": "merged",
        "deltas": ["one"],
        "scale": 0.5,
        "n_touched": delta.n_entries,
        "has_tokenizer": True,
    }
    found = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert_same_bits(found, bits(merge("base", "one", scale=0.5)))


def test_a_base_without_tokenizer_is_said(say: Say, folder: Path) -> None:
    for file in (folder / "base").glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer was found in base" in say("merge", "base", "one", "--out", "merged")


def test_export_to_a_model_is_a_merge(say: Say) -> None:
    say("export", "one", "--base", "base", "--to", "model", "--out", "merged")
    found = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert_same_bits(found, bits(merge("base", "one")))


def test_export_to_shira_says_what_it_costs(say: Say) -> None:
    told = json.loads(
        say("export", "one", "--base", "base", "--to", "shira", "--out", "shira", "--json")
    )
    assert told["n_stored"] >= told["n_entries"]
    assert told["growth"] == told["n_stored"] / told["n_entries"]
    out = say("export", "one", "--base", "base", "--to", "shira", "--out", "shira")
    assert f"a SHiRA adapter of rank {told['rank']}" in out
    assert Path("shira/adapter_config.json").exists()


def test_verify_checks_a_delta_and_its_base(folder: Path) -> None:
    assert weights.is_artefact(folder / "one")
    assert not weights.is_artefact(folder / "base")
    alone = weights.verify_delta(folder / "one")
    assert alone.to_json() == {"ok": True, "folder": str(folder / "one"), "problems": []}
    both = weights.verify_delta(folder / "two", "base")
    assert both.to_json()["ok"]
    assert SparseDelta.load("two").base in both.lines()[-1]


def test_a_delta_of_another_base_is_merged_when_asked_for(folder: Path, say: Say) -> None:
    save_model(folder / "other", seed=1)
    say("merge", "other", "one", "--other-base", "--out", "merged")
    other = AutoModelForCausalLM.from_pretrained("other", dtype="auto")
    found = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert_same_bits(found, bits(merge(other, "one", other_base=True)))
    assert_same_bits(unmerge("merged"), bits(unmerge(other)))


@pytest.mark.parametrize("name", ["sparse.json", "sparse.safetensors", "manifest.json"])
def test_verify_names_what_is_damaged(folder: Path, name: str) -> None:
    file = folder / "one" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(bytes(raw))
    found = weights.verify_delta(folder / "one")
    assert not found.to_json()["ok"]
    assert name in " ".join(found.lines())


def test_verify_names_another_base(folder: Path) -> None:
    save_model(folder / "other", seed=1)
    found = weights.verify_delta(folder / "one", "other")
    assert "made on another base model" in found.to_json()["problems"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "base", "one", "one", "--out", "x"], "merged already"),
        (["merge", "base", "base", "--out", "x"], "no sparse delta"),
        (["merge", "nowhere", "one", "--out", "x"], "cannot be loaded"),
        (["merge", "other", "one", "--out", "x"], "another base model"),
        (["merge", "base", "one", "--scale", "nan", "--out", "x"], "not be a finite number"),
        (["merge", "base", "one", "--out", "two"], "something else"),
        (["merge", "base", "one", "--out", "base"], "something else"),
        (["export", "words", "--base", "base", "--to", "shira", "--out", "x"], "nn.Linear only"),
        (["export", "one", "--base", "other", "--to", "shira", "--out", "x"], "another base model"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    folder: Path, words: list[str], message: str
) -> None:
    save_model(folder / "other", seed=1)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    app = typer.Typer()
    weights.add_to(app)
    with pytest.raises(SelectuneError, match=message) as error:
        typer.main.get_command(app)(args=words, prog_name="selectune")
    assert error.value.do or error.value.why
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "words", [["merge", "base", "one"], ["export", "one", "--base", "base", "--out", "x"]]
)
def test_a_word_that_is_missing_is_wrong_usage(folder: Path, words: list[str]) -> None:
    app = typer.Typer()
    weights.add_to(app)
    with pytest.raises(SystemExit) as end:
        typer.main.get_command(app)(args=words, prog_name="selectune")
    assert end.value.code == 2
