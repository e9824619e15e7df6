import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from selectune.data import content_key, plain_text, read_examples

Rows = list[dict[str, Any]]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS, "source": WORDS}),
    min_size=1,
    max_size=6,
)


def as_jsonl(rows: Rows, folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_json(rows: Rows, folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def as_parquet(rows: Rows, folder: Path) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_csv(rows: Rows, folder: Path) -> Path:
    path = folder / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_folder(rows: Rows, folder: Path) -> Path:
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


FORMATS = [as_jsonl, as_json, as_parquet, as_csv, as_folder]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.mark.parametrize("write", FORMATS[:4], ids=lambda f: f.__name__)
def test_ids_do_not_depend_on_the_file_format(
    write: Callable[[Rows, Path], Path], folder: Path
) -> None:
    @given(ROWS)
    def check(rows: Rows) -> None:
        found = read_examples(write(rows, folder))
        expected = read_examples(rows)
        assert [e.id for e in found] == [e.id for e in expected]
        assert [(e.content, e.source) for e in found] == [(e.content, e.source) for e in expected]

    check()


def test_ids_are_the_same_from_a_saved_folder_and_a_dataset(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": f"p{k}", "completion": "c"} for k in range(3)]
    expected = [e.id for e in read_examples(rows)]
    assert [e.id for e in read_examples(as_folder(rows, tmp_path))] == expected
    assert [e.id for e in read_examples(Dataset.from_list(rows))] == expected


@given(ROWS, st.randoms(use_true_random=False))
def test_ids_do_not_depend_on_row_or_column_order(rows: Rows, rng: random.Random) -> None:
    rows += rows[:2]  # equal rows too
    shuffled = [dict(rng.sample(list(row.items()), len(row))) for row in rows]
    rng.shuffle(shuffled)
    one, other = read_examples(rows), read_examples(shuffled)
    assert {e.id: e.content for e in one} == {e.id: e.content for e in other}
    assert one.fingerprint == other.fingerprint


@given(ROWS)
def test_equal_rows_get_different_ids_that_share_their_key(rows: Rows) -> None:
    examples = read_examples(rows + rows)
    assert len({e.id for e in examples}) == 2 * len(rows)
    contents = [json.dumps(e.content, sort_keys=True) for e in examples]
    assert examples.n_duplicates == len(contents) - len(set(contents))
    for a, text_a in zip(examples, contents, strict=True):
        for b, text_b in zip(examples, contents, strict=True):
            assert (content_key(a.id) == content_key(b.id)) == (text_a == text_b)


def test_the_fingerprint_changes_with_any_row() -> None:
    rows: Rows = [{"text": "a"}, {"text": "b"}]
    base = read_examples(rows).fingerprint
    assert base != read_examples([*rows, {"text": "b"}]).fingerprint
    assert base != read_examples([{"text": "a"}, {"text": "c"}]).fingerprint


def test_an_id_never_changes_between_releases() -> None:
    [example] = read_examples([{"prompt": "Größe?", "completion": " 1"}])
    assert example.id == "8cb2e42e99896492-0"


def test_a_slice_keeps_the_ids_of_the_whole() -> None:
    examples = read_examples([{"text": "a"}, {"text": "a"}, {"text": "b"}])
    assert [e.id for e in examples[1:]] == [e.id for e in examples][1:]
    assert examples[1:].form == "text"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a"}, "a"),
        ({"prompt": "a", "completion": " b"}, "a b"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "assistant: hi"),
    ],
)
def test_plain_text_has_all_words_of_every_form(row: dict[str, Any], text: str) -> None:
    assert plain_text(read_examples([row])[0].content) == text
