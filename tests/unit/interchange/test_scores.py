"""Scores go out and come back by id; whatever else a file holds, the words name the place."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectune.errors import ConfigError, DataError, SelectionError, SelectuneError
from selectune.methods.evidence import Evidence
from selectune.registry import get
from selectune.selection import Scores

ROWS = [{"id": "a-0", "score": 1}, {"id": "b-0", "score": 2.5}, {"id": "b-1", "score": -3}]


def scores() -> Scores:
    return Scores(
        "gist",
        ("b-0", "a-0", "c-0"),
        np.asarray([0.5, -0.25, 0.5]),
        {"energy": np.asarray([0.1, 0.2, np.nan]), "to:t": np.asarray([1.0, 2.0, 3.0])},
        ("t", "u", "t"),
        {"rank": 3},
    )


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl"])
def test_what_is_saved_is_read_back(name: str, tmp_path: Path) -> None:
    scores().save(tmp_path / name)
    again = Scores.load(tmp_path / name)
    assert (again.ids, again.best_target) == (scores().ids, scores().best_target)
    np.testing.assert_array_equal(again.score, scores().score)
    assert list(again.columns) == ["energy", "to:t"]
    for key, column in scores().columns.items():
        np.testing.assert_array_equal(again.columns[key], column)
    told = ("gist", {"rank": 3}) if name.endswith("parquet") else ("file", {})
    assert (again.method, again.about) == told


def test_any_tool_reads_what_is_saved(tmp_path: Path) -> None:
    scores().save(tmp_path / "s.jsonl")
    first = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert first == {"id": "b-0", "score": 0.5, "energy": 0.1, "to:t": 1.0, "best_target": "t"}
    scores().save(tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet").to_pylist()[0] == first


def test_another_column_may_rank_and_the_lowest_may_come_first(tmp_path: Path) -> None:
    rows = [{"id": "a", "loss": 1.5, "score": 0}, {"id": "b", "loss": 0.5, "score": 1}]
    read = Scores.load(jsonl(tmp_path / "s.jsonl", *rows), column="loss", higher_is_better=False)
    assert read.ranking() == ["b", "a"]
    assert read["b"] == -0.5
    assert read.columns["file_score"].tolist() == [0.0, 1.0]
    again = Scores.from_table(read.to_table(), read.method, read.about)
    assert again.ranking() == ["b", "a"]
    with pytest.raises(SelectionError, match='column of scores is called "score"'):
        Scores("m", ("a",), np.ones(1), {"score": np.ones(1)})


def test_a_dictionary_of_pandas_is_read(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array(["a", "b"]).dictionary_encode(), "score": [1, 2]})
    pq.write_table(table, tmp_path / "s.parquet")
    assert Scores.load(tmp_path / "s.parquet").ranking() == ["b", "a"]


def test_columns_of_text_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "s.jsonl", {"id": "a", "score": 1, "prompt": "?", "n": 3})
    with caplog.at_level(logging.WARNING):
        read = Scores.load(path)
    assert list(read.columns) == ["n"]
    assert "left out: prompt" in caplog.text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "a", "score": 1}, {"id": "a", "score": 1}], ['"a" stands twice', "s.jsonl:2"]),
        ([{"id": "a", "score": 1}, {"score": 1}], ["has no id", "s.jsonl:2"]),
        ([{"id": 7, "score": 1}], ["has no id: found 7", "s.jsonl:1"]),
        ([{"id": "a", "score": None}], ['score of "a" is None', "s.jsonl:1"]),
        ([{"id": "a", "score": float("nan")}], ['score of "a" is nan', "s.jsonl:1"]),
        ([{"id": "a", "score": float("inf")}], ["is inf"]),
        ([{"id": "a", "score": 10**400}], ["ranks nothing"]),
        ([{"id": "a", "score": "high"}], ["is 'high'"]),
        ([{"id": "a", "score": 1, "n": 1}, {"id": "b", "score": 1, "n": "x"}], ["\"n\" is 'x'"]),
        ([["a", 1]], ["must be an object", "s.jsonl:1"]),
        ([{"id": "a", "scor": 1}], ['no column "score"', 'did you mean "scor"']),
        ([], ["holds no scores"]),
    ],
)
def test_bad_rows_are_refused_by_line(rows: list[Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SelectuneError) as found:
        Scores.load(jsonl(tmp_path / "s.jsonl", *rows))
    assert all(word in str(found.value) for word in words)


def test_json_that_is_none_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"id": "a", "score": 1}\n{"id": "b", "score"\n')
    with pytest.raises(DataError, match=r"malformed JSON[\s\S]*s\.jsonl:2"):
        Scores.load(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    scores().save(tmp_path / "s.parquet")
    whole = (tmp_path / "s.parquet").read_bytes()
    for n in (0, 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:n])
        with pytest.raises(DataError, match=r"cut\.parquet"):
            Scores.load(tmp_path / "cut.parquet")


@pytest.mark.parametrize("name", ["s.pkl", "s.pt", "s.csv", "s"])
def test_other_kinds_of_file_are_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pickles are never read"):
        Scores.load(tmp_path / name)
    with pytest.raises(ConfigError, match=r"\.parquet"):
        scores().save(tmp_path / name)


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl"])
def test_a_pickle_under_our_name_is_refused_unrun(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(DataError):
        Scores.load(tmp_path / name)
    assert not canary.exists()


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    jsonl(tmp_path / "scores.jsonl", *ROWS)
    with pytest.raises(DataError, match=r'did you mean "scores\.jsonl"'):
        Scores.load(tmp_path / "score.jsonl")


def test_infinity_needs_parquet(tmp_path: Path) -> None:
    endless = Scores("gist", ("a",), np.asarray([-np.inf]))
    with pytest.raises(DataError, match=r"write a \.parquet file"):
        endless.save(tmp_path / "s.jsonl")
    assert not os.listdir(tmp_path)


# --- the scorer of a recipe


def score(path: Path, ids: tuple[str, ...], **options: str) -> Scores:
    entry = get("data_scorer", "file")
    evidence = Evidence(ids, np.ones(len(ids), np.int64))
    return entry.function(evidence, entry.parse({"path": str(path), **options}))


def test_scores_of_a_file_are_joined_by_id_in_the_order_of_the_pool(tmp_path: Path) -> None:
    scores().save(tmp_path / "s.parquet")
    joined = score(tmp_path / "s.parquet", ("a-0", "b-0", "c-0"))
    assert joined.ids == ("a-0", "b-0", "c-0")
    assert joined.score.tolist() == [-0.25, 0.5, 0.5]
    assert joined.columns["to:t"].tolist() == [2.0, 1.0, 3.0]
    assert joined.best_target == ("u", "t", "t")
    assert (joined.method, joined.about["scored_by"]) == ("file", "gist")


def test_every_candidate_needs_a_score_and_no_other_id_has_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", *ROWS)
    with pytest.raises(SelectionError, match=r"no score for 1 of 4 examples[\s\S]*x-0"):
        score(path, ("a-0", "b-0", "b-1", "x-0"))
    with pytest.raises(SelectionError, match=r"2 ids that are no candidates[\s\S]*b-1"):
        score(path, ("a-0",))
    assert score(path, ("a-0",), extra="ignore").about["n_left_out"] == 2


def test_equal_rows_that_were_dropped_are_no_strangers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", *ROWS)
    assert score(path, ("a-0", "b-0")).ids == ("a-0", "b-0")


def test_the_path_is_needed_and_asked_for_by_name() -> None:
    entry = get("data_scorer", "file")
    with pytest.raises(ConfigError, match='file needs the option "path"'):
        entry.parse({"column": "loss"})
    with pytest.raises(ConfigError, match='option "column" of file cannot be 3'):
        entry.parse({"column": 3})
