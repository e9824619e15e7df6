"""Scores as one file: parquet or JSONL, a row per example, joined by id.

    {"id": "3f2a…-0", "score": 0.41, "energy": 0.87, "best_target": "9c1b…-0"}

`id` and `score` are needed; further columns of numbers are kept; `best_target`, an id, is optional.
In parquet the metadata also holds the scorer's name and facts. No other kind of file is read, and
never a pickle: it would run code.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from selectune.data.sources import Raw, read_jsonl, read_parquet
from selectune.errors import ConfigError, DataError, nearest
from selectune.files import write_file, write_parquet
from selectune.selection import Scores

_log = logging.getLogger(__name__)

OUTSIDE = "file"  # method of scores that nobody signed
MEANING = b"selectune"  # key of our facts in a parquet file's metadata
_READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}
_TEXT = ("id", "best_target")
_ANOTHER = "file_score"  # what becomes of a column "score" where another one ranks


def write_scores(scores: Scores, path: Path) -> None:
    """Write scores as one file, replacing an older one as a whole.

    Args:
        scores: what to write.
        path: ends in .parquet or .jsonl.

    Raises:
        ConfigError: another ending.
        DataError: JSON cannot say a number: infinity.
        StorageError: the disk refuses.
    """
    _reader_of(path)
    if path.suffix == ".jsonl":
        write_file(path, _to_jsonl(scores))
        return
    meaning = json.dumps({"method": scores.method, "about": dict(scores.about)})
    write_parquet(path, scores.to_table().replace_schema_metadata({MEANING: meaning.encode()}))


def read_scores(path: Path, *, column: str = "score", higher_is_better: bool = True) -> Scores:
    """Read scores that `write_scores` or another tool wrote.

    Args:
        path: a .parquet or .jsonl file with the columns `id` and `column`.
        column: what ranks.
        higher_is_better: False turns the sign of `column` round; other columns stay as they are.

    Returns:
        The scores in the order of the file. Columns of text are left out, and named in the log.

    Raises:
        ConfigError: the name ends in something else, or no row has the column.
        DataError: there is no such file, it cannot be read, or a row has no id, no finite score,
            an id that another row has, or a text among numbers; with the line.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path.name} holds no scores", where=str(path), do="write at least a row")
    names = dict.fromkeys(name for _, row in rows for name in row)
    for needed in ("id", column):
        if needed not in names:
            raise ConfigError(
                f'{path.name} has no column "{needed}"',
                where=str(path),
                why=f"its columns are {', '.join(names)}",
                do=nearest(needed, names),
            )
    ids = _ids(rows)
    score = np.asarray([_score(where, row, column) for where, row in rows])
    columns: dict[str, Any] = {}
    texts: list[str] = []
    for name in names:
        if name in (*_TEXT, column):
            continue
        kept = _ANOTHER if name == "score" else name
        values = [(where, row.get(name)) for where, row in rows]
        if any(_as_number(value) is not None for _, value in values):
            columns[kept] = np.asarray([_number(where, value, name) for where, value in values])
        elif any(value is not None for _, value in values):
            texts.append(name)
    if texts:
        _log.warning("%s: columns without numbers are left out: %s", path.name, ", ".join(texts))
    best = tuple(row.get("best_target") for _, row in rows)
    method, about = _meaning(path)
    return Scores(
        method,
        ids,
        score if higher_is_better else -score,
        columns,
        cast("tuple[str, ...]", best) if all(isinstance(b, str) for b in best) else (),
        about,
    )


def _reader_of(path: Path) -> Callable[[Path], Iterator[Raw]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f'"{path.name}" is no file of scores',
            where=str(path),
            why=f"scores are {' or '.join(_READERS)} files; pickles are never read, they run code",
            do="write them as .parquet or .jsonl, with the columns id and score",
        )
    return reader


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = _reader_of(path)
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f'the scores "{path.name}" do not exist',
            where=str(path.absolute()),
            why="there is no such file",
            do=nearest(path.name, near) if 0 < len(near) < 20 else "check the path",
        )
    for where, row in reader(path):
        if not isinstance(row, Mapping):
            raise DataError(
                f"a row of scores must be an object, found {str(row)[:60]!r}",
                where=where,
                do='write rows such as {"id": "...", "score": 0.5}',
            )
        yield where, cast("Mapping[str, Any]", row)


def _ids(rows: list[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    places: dict[str, str] = {}
    for where, row in rows:
        example_id = row.get("id")
        if not isinstance(example_id, str) or not example_id:
            raise DataError(
                f"a row of scores has no id: found {example_id!r}",
                where=where,
                why="scores are joined by id, which is text",
                do="give every row the id of its example",
            )
        if example_id in places:
            raise DataError(
                f'the id "{example_id}" stands twice',
                where=f"{places[example_id]} and {where}",
                why="an example has one score",
                do="remove one of the rows",
            )
        places[example_id] = where
    return tuple(places)


def _score(where: str, row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    number = _as_number(value)
    if number is None or not math.isfinite(number):
        raise DataError(
            f'the {column} of "{row["id"]}" is {value!r:.60}, which ranks nothing',
            where=where,
            why="every example needs a finite number",
            do="score this example, or give it a number that puts it last",
        )
    return number


def _as_number(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON lets a whole number have a thousand digits
        return math.inf


def _number(where: str, value: object, name: str) -> float:
    """Return a number of a further column; null is one that is not there."""
    number = math.nan if value is None else _as_number(value)
    if number is None:
        raise DataError(
            f'"{name}" is {value!r:.60} here and a number in other rows',
            where=where,
            why="a column holds numbers or none",
            do="correct the row, or remove the column",
        )
    return number


def _meaning(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the scorer's name and facts, where the file is one of ours."""
    if path.suffix.lower() == ".parquet":
        held = (pq.read_schema(path).metadata or {}).get(MEANING, b"")
        try:
            match json.loads(held):
                case {"method": str(method), "about": dict(about)}:
                    return method, cast("dict[str, Any]", about)
                case _:
                    pass
        except (ValueError, RecursionError):
            pass
    return OUTSIDE, {}


def _to_jsonl(scores: Scores) -> bytes:
    lines: list[str] = []
    for row in scores.to_table().to_pylist():
        # JSON has no NaN: null is a number that is not there.
        plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        try:
            lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False))
        except ValueError:
            raise DataError(
                f'a number of "{row["id"]}" is infinite, which JSON cannot say',
                where="scores",
                do="write a .parquet file",
            ) from None
    return ("\n".join(lines) + "\n").encode()
