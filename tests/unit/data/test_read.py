import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from selectune.data import read_examples
from selectune.errors import ConfigError, DataError, SelectuneError

ROW: dict[str, Any] = {"prompt": "Q:", "completion": " A"}
TURNS = [("system", "s"), ("user", "u"), ("assistant", "a")]


def write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("row", "form", "content"),
    [
        ({"text": "a"}, "text", {"text": "a"}),
        ({**ROW, "extra": 3}, "prompt-completion", ROW),
        (
            {"messages": [{"role": r, "content": t} for r, t in TURNS]},
            "messages",
            {"messages": [{"role": r, "content": t} for r, t in TURNS]},
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
        ),
    ],
)
def test_every_form_is_found_and_made_canonical(
    row: dict[str, Any], form: str, content: dict[str, Any]
) -> None:
    for asked in ("auto", form):
        examples = read_examples([row], form=asked)
        assert examples.form == form
        assert examples[0].content == content
        assert examples[0].extra == row


def test_alpaca_is_found_beside_a_ready_made_text_and_input_is_used_only_when_there() -> None:
    bare, full = read_examples(
        [
            {"instruction": "Add {x}", "input": "", "output": "3", "text": "ready-made"},
            {"instruction": "Add", "input": "1 2", "output": "3", "text": "ready-made"},
        ]
    )
    assert bare.content["completion"] == full.content["completion"] == "3"
    assert "### Input" not in bare.content["prompt"]
    assert "### Instruction:\nAdd {x}\n" in bare.content["prompt"]
    assert "### Input:\n1 2\n" in full.content["prompt"]
    assert full.content["prompt"].endswith("### Response:\n")


def test_an_explicit_form_goes_before_the_one_that_would_be_found() -> None:
    row = {"text": "t", **ROW}
    assert read_examples([row]).form == "prompt-completion"
    assert read_examples([row], form="text")[0].content == {"text": "t"}


def test_source_and_group_come_from_the_name_the_row_or_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", ROW, {**ROW, "source": "web", "subtask": "hard"})
    plain = read_examples(path)
    assert [(e.source, e.group) for e in plain] == [("pool", ""), ("web", "hard")]
    assert [e.source for e in read_examples({"mine": path})] == ["mine", "mine"]
    assert [e.origin for e in plain] == ["pool.jsonl:1", "pool.jsonl:2"]


def test_several_files_make_one_set_with_distinct_ids(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.jsonl", ROW, {**ROW, "prompt": ""})
    examples = read_examples([str(a), b])
    assert len({e.id for e in examples}) == examples.n_rows == 3
    assert [e.source for e in examples] == ["a", "b", "b"]


def test_options_give_the_index_of_the_right_one() -> None:
    row = {"prompt": "Q", "completion": " b", "options": [" a", " b"]}
    [plain] = read_examples([row])
    assert (plain.options, plain.answer) == ((" a", " b"), 1)
    assert read_examples([{**row, "answer": 1}])[0].answer == 1
    assert read_examples([ROW])[0].answer == -1


def test_json_lines_are_read_under_the_name_json_too(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path / "x.json", ROW, "", ROW))) == 2


BAD_FILES: list[tuple[str, str, str, list[str]]] = [
    ("a.jsonl", json.dumps(ROW) + "\n{broken\n", "malformed JSON", ["a.jsonl:2"]),
    ("a.jsonl", "", "no rows", ["a.jsonl"]),
    ("a.jsonl", "\n\n", "no rows", ["a.jsonl"]),
    ("a.jsonl", "[1, 2]\n", "an object", ["a.jsonl:1"]),
    ("a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}', "twice", ["prompt", ":1"]),
    ("a.jsonl", "[" * 200_000, "malformed JSON", ["a.jsonl:1"]),
    ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "malformed JSON", ["a.jsonl:1"]),
    ("a.jsonl", '{"text": "\\ud800"}', "half a character", ["a.jsonl:1"]),
    ("a.jsonl", '{"text": 5}', "must be text", ["int", "a.jsonl:1"]),
    ("a.jsonl", '{"promt": "a", "completoin": "b"}', "no known form", ['"prompt"', '"completion"']),
    ("a.jsonl", '{"prompt": "a"}', "no known form", ['add "completion"']),
    ("a.jsonl", '{"question": "a", "zzz": 1}', "no known form", ["alpaca: instruction + output"]),
    ("a.jsonl", '{"prompt": "a", "completion": "  "}', '"completion" is empty', ["a.jsonl:1"]),
    ("a.jsonl", json.dumps(ROW) + '\n{"text": "b"}', "lacks", ["form text", "a.jsonl:2"]),
    ("a.jsonl", '{"prompt": ["a"], "completion": ["b"]}', "must be text", ["messages"]),
    ("a.jsonl", '{"messages": []}', "list of turns", ["a.jsonl:1"]),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "assistant turn", [":1"]),
    ("a.jsonl", '{"messages": [{"role": "usr", "content": "a"}]}', "unknown role", ["user"]),
    ("a.jsonl", '{"messages": [{"role": ["x"], "content": "a"}]}', "unknown role", ["turn 0"]),
    ("a.jsonl", '{"messages": [{"role": "user"}]}', "a turn needs", ["content", "turn 0"]),
    (
        "a.jsonl",
        '{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}',
        "calls tools",
        ["turn 0"],
    ),
    ("a.jsonl", json.dumps({**ROW, "options": [" B"]}), "none of", ["' A'"]),
    ("a.jsonl", json.dumps({**ROW, "options": [" A", " A"]}), "same", ["a.jsonl:1"]),
    ("a.jsonl", json.dumps({**ROW, "options": [" A", 4]}), "must be text", ["a.jsonl:1"]),
    ("a.jsonl", json.dumps({**ROW, "options": [" A", " B"], "answer": 1}), "is 1", ["option 0"]),
    ("a.json", '[{"text": "a"},\n {"text" "b"}]', "malformed JSON", ["a.json:2"]),
    ("a.json", '[{"text": "a"}, 7]', "an object", ["a.json[1]"]),
    ("a.csv", "prompt,completion\na,b,c\n", "more cells", ["a.csv:2"]),
    ("a.csv", 'prompt,completion\na,"b\n', "cannot read", ["a.csv"]),
    ("a.csv", "prompt,completion\na,\n", "lacks", ["'completion'", "a.csv:2"]),
    ("a.csv", "prompt,completion,options\na,b,[oops\n", "malformed JSON", ["a.csv:2"]),
    ("a.parquet", "not parquet", "cannot read", ["a.parquet"]),
    ("a.txt", "text", "cannot tell the format", [".jsonl"]),
]


@pytest.mark.parametrize(("name", "content", "what", "told"), BAD_FILES)
def test_a_bad_file_is_named_with_line_and_reason(
    name: str, content: str, what: str, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / name)
    assert what in caught.value.what
    assert [t for t in told if t not in str(caught.value)] == []
    assert caught.value.where


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="0xff") as caught:
        read_examples(tmp_path / "a.jsonl")
    assert caught.value.where == "a.jsonl:2"


def test_a_missing_file_offers_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "pool.jsonl", ROW)
    with pytest.raises(DataError, match=r'did you mean "pool.jsonl"'):
        read_examples(tmp_path / "pol.jsonl")


def test_an_unknown_form_offers_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match='did you mean "alpaca"'):
        read_examples([ROW], form="alpacca")


def test_a_hub_name_that_cannot_be_reached_says_so() -> None:
    with pytest.raises(DataError, match="the Hub does not give it"):
        read_examples("hub:nobody/nothing@config:test")
    with pytest.raises(DataError, match="neither a file or folder here nor a name"):
        read_examples("what is this?")


def test_several_splits_ask_for_one(tmp_path: Path) -> None:
    splits = DatasetDict({"train": Dataset.from_list([ROW]), "test": Dataset.from_list([ROW])})
    with pytest.raises(ConfigError, match=r'dataset\["train"\]'):
        read_examples(splits)
    splits.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="train, test"):
        read_examples(tmp_path / "both")
    assert len(read_examples(tmp_path / "both" / "test")) == 1


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        read_examples(tmp_path)


def test_a_parquet_file_that_inflates_a_thousandfold_is_refused(tmp_path: Path) -> None:
    column = pa.array(["x" * 2**20] * 100).dictionary_encode()
    pq.write_table(pa.table({"text": column.cast(pa.string())}), tmp_path / "bomb.parquet")
    with pytest.raises(DataError, match="unpacks to more than"):
        read_examples(tmp_path / "bomb.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_damaged_bytes_give_rows_or_one_of_our_errors(name: str, tmp_path: Path) -> None:
    rows = [{**ROW, "options": [" A", " B"], "n": k} for k in range(20)]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "a.csv":
        write(path, "prompt,completion", *["Q, A"] * 20)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        write(path, *rows)
    whole = path.read_bytes()
    rng = random.Random(0)
    n_refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(4):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_examples(path)
        except SelectuneError:
            n_refused += 1
    assert n_refused > 0
