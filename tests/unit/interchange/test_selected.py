"""A run's selection in the forms that LLaMA-Factory and axolotl document."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from selectune.cli import main
from selectune.data import read_examples
from selectune.errors import DataError
from selectune.interchange.selected import read_chosen
from workspace import byte_tokenizer, write_jsonl

PROMPT = {"prompt": "1 + 1?", "completion": " 2", "options": [" 2", " 3"], "source": "sums"}
ALPACA = {"instruction": "Add.", "input": "1, 1", "output": "2"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
TEXT = {"text": "Once."}

Export = Callable[..., dict[str, Any]]


@pytest.fixture
def export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Export:
    """Return a function that exports rows, as a run leaves them, and gives what is printed."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("model")
    (tmp_path / "run").mkdir()
    config = "model: {base: model}\ndata: {pool: pool.jsonl, target: pool.jsonl}\n"
    Path("run/config.yaml").write_text(config)

    def run(tool: str, *rows: dict[str, Any], code: int = 0) -> dict[str, Any]:
        # One data set for each row: forms may differ between files.
        chosen = [example for row in rows for example in read_examples([row])]
        ids = [f"{example.id}{k}" for k, example in enumerate(chosen)]
        lines = [{**e.extra, "selectune": {"id": i}} for i, e in zip(ids, chosen, strict=True)]
        write_jsonl(Path("run/selected.jsonl"), lines)
        contents = [json.dumps(dict(example.content)) for example in chosen]
        pq.write_table(pa.table({"id": ids, "content": contents}), "run/selected.parquet")
        assert main(["export", "run", "--to", tool, "--out", "out", "--json"]) == code
        return json.loads(capfd.readouterr().out)

    return run


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_prompts_become_alpaca_for_llama_factory(export: Export) -> None:
    told = export("llama-factory", PROMPT, ALPACA)
    assert (told["n"], told["files"]) == (2, ["prompts.jsonl", "dataset_info.json"])
    assert rows_of("out/prompts.jsonl") == [
        {"instruction": "1 + 1?", "input": "", "output": " 2"},
        ALPACA,
    ]
    # hiyouga/LLaMA-Factory, data/README.md: "Alpaca Format", supervised fine-tuning.
    assert json.loads(Path("out/dataset_info.json").read_text()) == {
        "selected_prompts": {
            "file_name": "prompts.jsonl",
            "columns": {"prompt": "instruction", "query": "input", "response": "output"},
        }
    }


def test_conversations_become_openai_rows_for_llama_factory(export: Export) -> None:
    export("llama-factory", CHAT, SHAREGPT, TEXT)
    assert rows_of("out/conversations.jsonl")[0] == CHAT
    turns = rows_of("out/conversations.jsonl")[1]["messages"]
    assert [(t["role"], t["content"]) for t in turns] == [("user", "Hi"), ("assistant", "Yo")]
    info = json.loads(Path("out/dataset_info.json").read_text())
    # The same page: "OpenAI Format", and "Pre-training Dataset".
    assert info["selected_conversations"] == {
        "file_name": "conversations.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    assert info["selected_texts"] == {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}
    assert rows_of("out/texts.jsonl") == [TEXT]


def test_prompts_keep_every_character_and_their_mask_for_axolotl(export: Export) -> None:
    export("axolotl", PROMPT, ALPACA)
    first, second = rows_of("out/prompts.jsonl")
    # axolotl, docs/dataset-formats/template_free.qmd: it adds neither begin nor end by itself.
    assert first == {
        "segments": [{"label": False, "text": "1 + 1?"}, {"label": True, "text": " 2<eos>"}]
    }
    assert second["segments"][0]["text"].endswith("### Input:\n1, 1\n\n### Response:\n")
    assert yaml.safe_load(Path("out/axolotl.yaml").read_text()) == {
        "base_model": "model",
        "datasets": [{"path": "out/prompts.jsonl", "ds_type": "json", "type": "input_output"}],
        "train_on_inputs": False,
    }


def test_conversations_take_the_chat_template_of_axolotl(export: Export) -> None:
    export("axolotl", CHAT, TEXT)
    chat, text = yaml.safe_load(Path("out/axolotl.yaml").read_text())["datasets"]
    assert chat == {
        "path": "out/conversations.jsonl",
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": ["assistant"],
    }
    assert (text["type"], text["field"]) == ("completion", "text")


def test_what_cannot_be_exported_is_said(export: Export, capfd: pytest.CaptureFixture[str]) -> None:
    def words(*more: str) -> str:
        assert main(["export", *more]) in (1, 2)
        return capfd.readouterr().err

    assert "holds no selection" in words("run", "--to", "axolotl", "--out", "out")
    assert "model is no run" in words("model", "--to", "axolotl", "--out", "out")
    asked = ("--base", "model", "--out", "out")
    assert "takes no base" in words("run", "--to", "llama-factory", *asked)
    assert "needs the base" in words("run", "--to", "shira", "--out", "out")
    export("axolotl", PROMPT)
    Path("run/selected.jsonl").write_text("")
    assert "hold other examples" in words("run", "--to", "axolotl", "--out", "out")
    export("axolotl", TEXT)
    assert not Path("out/prompts.jsonl").exists()  # replaced as a whole
    assert "something else" in words("run", "--to", "axolotl", "--out", "run")


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("selected.parquet", b"PAR1 and no more", "cannot read"),
        ("selected.parquet", {"id": ["a"]}, "no content"),
        ("selected.parquet", {"content": ['{"text": "Once."}']}, "hold other examples"),
        ("selected.parquet", {"id": ["a"], "content": [7]}, "no content"),
        ("selected.parquet", {"id": ["a"], "content": ["{"]}, "no content"),
        ("selected.parquet", {"id": ["a"], "content": ["[]"]}, "no content"),
        ("selected.parquet", {"id": ["a"], "content": ["{}"]}, "no content"),
        ("selected.parquet", {"id": ["a"], "content": ['{"prompt": "1"}']}, "no content"),
        ("selected.parquet", {"id": ["a"], "content": ['{"text": 1}']}, "no content"),
        ("selected.jsonl", b"{", "malformed JSON"),
        ("selected.jsonl", b"\xff", "not UTF-8"),
        ("selected.jsonl", b"7", "hold other examples"),
        ("selected.jsonl", b"{}", "hold other examples"),
        ("selected.jsonl", b'{"selectune": "a"}', "hold other examples"),
        ("selected.jsonl", b'{"selectune": {"id": ["a"]}}', "hold other examples"),
    ],
)
def test_a_selection_that_was_damaged_or_edited_is_to_be_made_again(
    tmp_path: Path, name: str, held: bytes | dict[str, list[Any]], said: str
) -> None:
    write_jsonl(tmp_path / "selected.jsonl", [{**TEXT, "selectune": {"id": "a"}}])
    content = json.dumps(TEXT)
    pq.write_table(pa.table({"id": ["a"], "content": [content]}), tmp_path / "selected.parquet")
    assert [one.content for one in read_chosen(tmp_path)] == [TEXT]
    if isinstance(held, bytes):
        (tmp_path / name).write_bytes(held)
    else:
        pq.write_table(pa.table(held), tmp_path / name)
    with pytest.raises(DataError, match=said) as caught:
        read_chosen(tmp_path)
    assert str(tmp_path) in caught.value.where
    assert "select again" in caught.value.do
