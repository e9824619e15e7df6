"""Raw rows of each kind of file, with the place that each came from."""

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow.parquet as pq
from datasets import Dataset
from datasets import load_dataset as _load_dataset  # pyright: ignore[reportUnknownVariableType]
from datasets import load_from_disk as _load_from_disk  # pyright: ignore[reportUnknownVariableType]

from selectune.errors import DataError

Raw = tuple[str, object]  # where a row stands, and the row, whatever it is
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w.-]+))?(?::([\w.\[\]%:+-]+))?")
# Real text packs 3 to 20 times; a file that grows beyond this is broken or a trap.
_MAX_INFLATION = 200
_FREE_BYTES = 64 * 2**20
_BATCH_ROWS = 64  # few enough that one batch of long texts does not fill the memory
# pyarrow's own errors derive from these, each from the one that fits.
_READ_ERRORS = (OSError, ValueError, TypeError, KeyError, NotImplementedError, MemoryError)


class _RecordBatch(Protocol):
    """What is used of pyarrow's, which has no type hints."""

    nbytes: int

    def to_pylist(self) -> list[dict[str, Any]]: ...


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f'the field "{twice}" is there twice')
    return row


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            what = f"malformed JSON: {error.msg} (column {error.colno})"
        else:
            what = f"malformed JSON: {error}"
        raise DataError(
            what, where=where, why=f"it reads {text[:80]!r}", do="correct or remove the line"
        ) from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte {data[error.start]:#04x} at position {error.start}",
            where=where,
            do="convert the file to UTF-8",
        ) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(
        f'cannot read "{path.name}": {str(error).splitlines()[0] if str(error) else error!r}',
        where=str(path),
        why="the file is damaged, is not what its name says, or may not be read",
        do="check the file, or fetch it again",
    )


def read_jsonl(path: Path) -> Iterator[Raw]:
    """Yield the rows of a file with one JSON object per line; empty lines are passed over."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path.name}:{number}"
                text = _decoded(line, where).strip()
                if text:
                    yield where, _parse(text, where)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> Iterator[Raw]:
    """Yield the rows of a file that is one JSON list; JSON lines under this name are read too."""
    try:
        text = _decoded(path.read_bytes(), path.name)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not text.lstrip().startswith("["):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        raise DataError(
            f"malformed JSON: {error.msg} (column {error.colno})",
            where=f"{path.name}:{error.lineno}",
            do="correct the line",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", where=path.name) from error
    for k, row in enumerate(rows):
        yield f"{path.name}[{k}]", row


def read_csv(path: Path) -> Iterator[Raw]:
    """Yield the rows of a CSV file with a header line.

    An empty cell means "not there"; a cell of `options` holds a JSON list.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for row in reader:
                yield _csv_row(row, f"{path.name}:{reader.line_num}")
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    finally:
        csv.field_size_limit(limit)


def _csv_row(row: Mapping[Any, Any], where: str) -> Raw:
    if None in row:
        raise DataError(
            f"{len(row[None])} more cells than the header names",
            where=where,
            do="put cells with a comma or a line break into double quotes",
        )
    cells: dict[str, Any] = {k: v or None for k, v in row.items()}
    for key in ("options", "messages", "conversations"):
        if cells.get(key):
            cells[key] = _parse(cells[key], where)
    if "prompt" in cells:
        cells["prompt"] = cells["prompt"] or ""  # the one needed field that may rightly be empty
    return where, cells


def read_parquet(path: Path) -> Iterator[Raw]:
    """Yield the rows of a parquet file, in small batches."""
    allowed = _FREE_BYTES + _MAX_INFLATION * path.stat().st_size
    n_bytes = number = 0
    try:
        with pq.ParquetFile(path) as table:
            batches = cast(
                Iterator[_RecordBatch],
                table.iter_batches(batch_size=_BATCH_ROWS),  # pyright: ignore[reportUnknownMemberType]
            )
            for batch in batches:
                n_bytes += batch.nbytes
                if n_bytes > allowed:
                    raise DataError(
                        f'"{path.name}" unpacks to more than {_MAX_INFLATION} times its size',
                        where=str(path),
                        why="real data does not; the file is damaged, or made to fill the memory",
                        do="write it anew as .jsonl if you trust it",
                    )
                for row in batch.to_pylist():
                    yield f"{path.name}[{number}]", row
                    number += 1
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error


def read_folder(path: Path) -> Iterator[Raw]:
    """Yield the rows of a folder written by `Dataset.save_to_disk`."""
    try:
        data = _load_from_disk(os.fspath(path))
    except _READ_ERRORS as error:
        raise DataError(
            f'"{path.name}" is not a folder saved by datasets: {error}',
            where=str(path),
            do="name a file, or a folder written by Dataset.save_to_disk",
        ) from error
    if not isinstance(data, Dataset):
        names = ", ".join(map(str, data))
        raise DataError(
            f'"{path.name}" holds several splits',
            where=str(path),
            do=f"name the folder of one of them: {path}/ and one of {names}",
        )
    for k, row in enumerate(cast(Iterator[object], iter(data))):
        yield f"{path.name}[{k}]", row


def read_hub(name: str, what: str) -> tuple[str, Iterator[Raw]]:
    """Return the short name and the rows of a data set on the Hub.

    Args:
        name: "owner/name" or "name", with "@config" and ":split" where they are wanted.
        what: what the data is for, for messages.
    """
    parts = _HUB_NAME.fullmatch(name)
    if parts is None:
        raise DataError(
            f'the {what} "{name}" is neither a file or folder here nor a name on the Hub',
            where=str(Path(name).absolute()),
            do="check the path; Hub names look like owner/name@config:split",
        )
    repository, config, split = parts[1], parts[2], parts[3] or "train"
    try:
        data = _load_dataset(repository, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f'the {what} "{name}" is no file or folder here, and the Hub does not give it',
            where=f"data set {repository}, config {config or 'default'}, split {split}",
            why=(str(error).splitlines() or [repr(error)])[0],
            do="check the name and the connection, or save the data to a .jsonl file",
        ) from error
    rows = cast(Iterator[object], iter(data))
    short = repository.rpartition("/")[2]
    return short, ((f"{repository}:{split}[{k}]", row) for k, row in enumerate(rows))


FILE_READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
