"""Chosen rows in the forms that LLaMA-Factory and axolotl document: a JSONL file, and who reads it.

LLaMA-Factory (data/README.md of its repository): `dataset_info.json` beside the files; prompts as
alpaca, conversations in the OpenAI form of sharegpt, plain text as a pre-training set.
axolotl (docs/dataset-formats): the `datasets` of a configuration; prompts as `input_output`, which
keeps every character and masks the prompt, conversations as `chat_template`, text as `completion`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import yaml

from selectune.data.sources import Raw, read_jsonl, read_parquet
from selectune.errors import DataError
from selectune.files import refuse_other_result, staged

_KIND = "exported-selection"
_JSONL, _PARQUET = "selected.jsonl", "selected.parquet"
# With the entry in place the run would only say, once more, that the file is another.
_AGAIN = 'restore it, or take "select" out of the steps in run.json and select again'


class Tool(StrEnum):
    """Who shall read the selection."""

    llama_factory = "llama-factory"
    axolotl = "axolotl"


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around an example: the texts of the tokenizer's special tokens, "" for none."""

    begin: str
    end: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """One chosen row: its canonical content, and the row as it came."""

    content: Mapping[str, Any]
    row: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The file that holds rows of this form: "texts", "prompts" or "conversations"."""
        if "text" in self.content:
            return "texts"
        return "conversations" if "messages" in self.content else "prompts"


def read_chosen(run: Path) -> list[Chosen]:
    """Return the chosen rows of a run, best first.

    Raises:
        DataError: the run has chosen nothing yet, or the two files of the choice differ, cannot be
            read or were edited.
    """
    for name in (_JSONL, _PARQUET):
        if not (run / name).is_file():
            raise DataError(
                f"{run} holds no selection",
                where=str(run),
                why=f"there is no {name} in it",
                do="selectune select recipe.yaml writes it; then name the folder of the run",
            )
    rows = list(_rows(run / _JSONL, read_jsonl))
    lines = [cast("dict[str, Any]", line) for line in _rows(run / _PARQUET, read_parquet)]
    ids = [line.get("id") for line in lines]
    if None in ids or [_id(row) for row in rows] != ids:
        raise DataError(
            f"{_JSONL} and {_PARQUET} hold other examples",
            where=str(run),
            why="one of them was changed after the run wrote both",
            do=_AGAIN,
        )
    contents = [_content(line, run / _PARQUET) for line in lines]
    return [
        Chosen(content, cast("dict[str, Any]", row))
        for content, row in zip(contents, rows, strict=True)
    ]


def _rows(path: Path, read: Callable[[Path], Iterator[Raw]]) -> Iterator[object]:
    """Yield the rows of a file that the run wrote."""
    try:
        for _, row in read(path):
            yield row
    except DataError as error:
        why = f"{error.where}: {error.why}" if error.why else error.where
        raise DataError(error.what, where=str(path), why=why, do=_AGAIN) from error


def _id(row: object) -> object:
    match row:
        case {"selectune": {"id": found}}:
            return found
        case _:
            return None


def _content(line: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the canonical content of one row of the table."""
    try:
        found = json.loads(line.get("content") or "")
    except (ValueError, TypeError, RecursionError):
        found = None
    match found:
        case {"text": str()} | {"prompt": str(), "completion": str()} | {"messages": list()}:
            return cast("dict[str, Any]", found)
        case _:
            raise DataError(
                f'the row "{line["id"]}" of {path.name} has no content',
                where=str(path),
                why='its column "content" is neither text, nor a prompt and its completion, nor '
                "messages",
                do=_AGAIN,
            )


def write_for(
    tool: Tool, chosen: Sequence[Chosen], out: Path, *, base: str, marks: Marks
) -> tuple[str, ...]:
    """Write a folder that a tool reads.

    Args:
        tool: whose forms.
        chosen: the rows, best first.
        out: the folder; an older one of ours is replaced.
        base: the model, for axolotl's configuration.
        marks: of the base's tokenizer; axolotl adds none to `input_output`.

    Returns:
        The names of the data files, by the number of their rows.

    Raises:
        StorageError: the folder holds something else, or the disk refuses.
    """
    by_kind: dict[str, list[Chosen]] = {}
    for one in chosen:
        by_kind.setdefault(one.kind, []).append(one)
    refuse_other_result(out, _KIND)
    with staged(out, kind=_KIND, meta={"tool": str(tool), "n": len(chosen)}) as stage:
        for kind, rows in by_kind.items():
            made = [
                _llama_factory(r) if tool is Tool.llama_factory else _axolotl(r, marks)
                for r in rows
            ]
            lines = [json.dumps(row, ensure_ascii=False) for row in made]
            stage.write_text(f"{kind}.jsonl", "\n".join(lines) + "\n")
        if tool is Tool.llama_factory:
            info = {f"selected_{kind}": _DESCRIBED[kind] for kind in by_kind}
            stage.write_json("dataset_info.json", info)
        else:
            stage.write_text("axolotl.yaml", _configuration(out, base, list(by_kind)))
    return tuple(f"{kind}.jsonl" for kind in by_kind)


def _llama_factory(chosen: Chosen) -> dict[str, Any]:
    content, row = chosen.content, chosen.row
    if chosen.kind != "prompts":
        return dict(content)
    if row.get("instruction") is not None and row.get("output") is not None:
        # An alpaca row: its own parts, as the tool puts a template of its own around them.
        return {key: row.get(key) or "" for key in ("instruction", "input", "output")}
    return {"instruction": content["prompt"], "input": "", "output": content["completion"]}


_DESCRIBED: dict[str, dict[str, Any]] = {
    "prompts": {
        "file_name": "prompts.jsonl",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    },
    "conversations": {
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
    },
    "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}},
}


def _axolotl(chosen: Chosen, marks: Marks) -> dict[str, Any]:
    content = chosen.content
    if chosen.kind != "prompts":
        return dict(content)
    segments = [
        {"label": False, "text": marks.begin + content["prompt"]},
        {"label": True, "text": content["completion"] + marks.end},
    ]
    return {"segments": segments}


_TYPED: dict[str, dict[str, Any]] = {
    "prompts": {"type": "input_output"},
    "conversations": {
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": ["assistant"],
    },
    "texts": {"type": "completion", "field": "text"},
}


def _configuration(out: Path, base: str, kinds: Sequence[str]) -> str:
    datasets = [
        {"path": str(out / f"{kind}.jsonl"), "ds_type": "json", **_TYPED[kind]} for kind in kinds
    ]
    body = {"base_model": base, "datasets": datasets, "train_on_inputs": False}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
