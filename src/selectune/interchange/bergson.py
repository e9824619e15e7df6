"""What bergson leaves on disk, as scores by id: its scores, or gradients of a pool and of a query.

    scores/   info.json  scores.bin      per row: (score_i, written_i) for every query i
    index/    info.json  gradients.bin   rows x sum(grad_sizes), module after module

The layout is that of bergson 2.5.1 (`score/score_writer.py`, `data.py`), and of older indexes that
describe their rows as a structured type. Rows stand in the order of bergson's data set, without
ids: the pool that is given lends them, and must have as many rows. Arrays are mapped with types
from a list of ours; `.pth`, `.pt` and `.npy` files beside them are never opened.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import yaml
from jaxtyping import Float

from selectune.data import Spec, read_examples
from selectune.errors import ConfigError, DataError, IncompatibleRunError
from selectune.files.disk import read_file
from selectune.selection import Scores

Aggregate = Literal["max", "mean"]
Similarity = Literal["cosine", "dot"]

_SCORES, _GRADIENTS, _INFO = "scores.bin", "gradients.bin", "info.json"
_PROCESSOR = "processor_config.yaml"
# bfloat16 is a type of ml_dtypes in numpy: read as its bits and widened, which is exact.
_BFLOAT16 = "bfloat16"
_TYPES = {
    "float64": "<f8", "<f8": "<f8", "float32": "<f4", "<f4": "<f4", "float16": "<f2",
    "<f2": "<f2", _BFLOAT16: "<u2", "bool": "?",
}  # fmt: skip
_INFO_LIMIT_BYTES = 64 << 20  # a large model has hundreds of thousands of module names at most
_BLOCK_BYTES = 32 << 20  # of gradients in memory at a time


def is_scores(folder: Path) -> bool:
    """Return whether a folder looks like one of bergson's scores."""
    return (folder / _SCORES).exists()


def is_index(folder: Path) -> bool:
    """Return whether a folder looks like one of bergson's gradient indexes."""
    return (folder / _GRADIENTS).exists()


def bergson_scores(
    folder: Path,
    pool: Spec,
    *,
    aggregate: Aggregate = "max",
    higher_is_better: bool | None = None,
) -> Scores:
    """Return the scores that `bergson score` wrote.

    Args:
        folder: of the scores, complete.
        pool: the rows that bergson scored, in its order; they lend their ids.
        aggregate: over queries, the best or their mean; each query is a column `query:<i>` too.
        higher_is_better: False turns signs round; None takes what bergson's config.yaml says.

    Raises:
        ConfigError: nothing says whether high scores are good.
        DataError: the folder holds something else, or scores that were never written.
        IncompatibleRunError: it has another number of rows than the pool.
    """
    info = _read_info(folder)
    _refuse_tokens(info, folder)
    if (folder / "candidates.npy").exists():
        raise DataError(
            f"{folder.name} holds scores of candidates, not of the pool",
            where=str(folder),
            why="bergson was told to score only what an earlier run ranked highest",
            do="score without score_cfg.candidates",
        )
    n, m = _count(info, "num_items", folder), _count(info, "num_scores", folder)
    rows = _mapped(folder / _SCORES, _score_type(info, m, folder), n)
    is_bfloat = _BFLOAT16 in info["dtype"]["formats"]
    ids = _ids(pool, n, folder)
    unwritten = sum(int(np.count_nonzero(~rows[f"written_{i}"])) for i in range(m))
    if unwritten:
        raise DataError(
            f"{unwritten} of {n * m} scores in {folder.name} were never written",
            where=str(folder / _SCORES),
            why="bergson marks what it has scored, and stopped before the end",
            do="run bergson score to its end",
        )
    sign = 1 if _is_high_good(folder, higher_is_better) else -1
    by_query = np.stack([sign * _widened(rows[f"score_{i}"], is_bfloat) for i in range(m)], axis=1)
    return _scores(ids, by_query, aggregate, {"from": "bergson scores"})


def bergson_similarity(
    folder: Path,
    query: Path,
    pool: Spec,
    *,
    similarity: Similarity = "cosine",
    aggregate: Aggregate = "max",
) -> Scores:
    """Score a pool by its gradients and those of a query, both as `bergson build` wrote them.

    Gradients are compared as they stand: projected, normalised or preconditioned in the same way.

    Args:
        folder: the index of the pool.
        query: the index of the examples that stand for the task.
        pool: the rows of the first index, in its order; they lend their ids.
        similarity: cosine (0 where a gradient is 0), or the inner product.
        aggregate: over queries, the best or their mean; each query is a column `query:<i>` too.

    Raises:
        DataError: a folder holds something else, or a gradient is no number.
        IncompatibleRunError: the indexes differ in modules, sizes or processing, or the pool has
            another number of rows.
    """
    ours, theirs = _open_index(folder), _open_index(query)
    if dict(ours.sizes) != dict(theirs.sizes):
        names = {**ours.sizes, **theirs.sizes}
        odd = next(k for k in names if ours.sizes.get(k) != theirs.sizes.get(k))
        raise IncompatibleRunError(
            f"{folder.name} and {query.name} are indexes of other modules",
            where=f'module "{odd}"',
            why=f"{ours.sizes.get(odd, 'no')} numbers in one, {theirs.sizes.get(odd, 'no')} in the "
            "other",
            do="build both with the same model, modules and projection",
        )
    _refuse_other_processing(folder, query)
    ids = _ids(pool, len(ours.rows), folder)
    aims = theirs.block(0, len(theirs.rows))
    wanted = np.concatenate([aims[:, theirs.columns[name]] for name in ours.sizes], axis=1)
    dots = np.empty((len(ours.rows), len(theirs.rows)))
    norms = np.empty(len(ours.rows))
    step = max(1, _BLOCK_BYTES // (8 * max(1, wanted.shape[1])))
    for start in range(0, len(ours.rows), step):
        block = ours.block(start, start + step)
        dots[start : start + step] = block @ wanted.T
        norms[start : start + step] = np.linalg.norm(block, axis=1)
    if not np.isfinite(dots).all():
        row = int(np.flatnonzero(~np.isfinite(dots).all(1))[0])
        raise DataError(
            f"a gradient in {folder.name} or {query.name} is no number",
            where=f"row {row} of the pool, {ids[row]}",
            why="its product with a query is infinite or not a number",
            do="look at this row, or build the index in fp32",
        )
    if similarity == "cosine":
        scale = norms[:, None] * np.linalg.norm(wanted, axis=1)
        dots = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    return _scores(ids, dots, aggregate, {"from": "bergson index", "similarity": similarity})


@dataclass(frozen=True, slots=True)
class _Index:
    rows: np.ndarray
    sizes: Mapping[str, int]
    is_bfloat: bool

    @property
    def columns(self) -> dict[str, slice]:
        ends = np.cumsum(list(self.sizes.values())).tolist()
        return {
            name: slice(end - size, end)
            for (name, size), end in zip(self.sizes.items(), ends, strict=True)
        }

    def block(self, start: int, end: int) -> Float[np.ndarray, "n d"]:
        return _widened(self.rows[start:end], self.is_bfloat)


def _open_index(folder: Path) -> _Index:
    info = _read_info(folder)
    _refuse_tokens(info, folder)
    sizes = info.get("grad_sizes")
    if not isinstance(sizes, dict) or not sizes or not all(_is_count(v) for v in sizes.values()):
        raise _odd(folder, f"grad_sizes are {str(sizes)[:80]}")
    sizes = cast("dict[str, int]", sizes)
    kind = _gradient_type(info, folder)
    n, d = _count(info, "num_grads", folder), sum(sizes.values())
    flat = _mapped(folder / _GRADIENTS, np.dtype(_TYPES[kind]), n * d)
    return _Index(flat.reshape(n, d), sizes, kind == _BFLOAT16)


def _gradient_type(info: Mapping[str, Any], folder: Path) -> str:
    told = info.get("base_dtype")
    kind = told
    if told is None:  # an older index tells it in the format of a field, such as "(16,)<f4"
        told = info.get("dtype")
        match told:
            case {"formats": [str(first), *_]}:
                kind = first.rpartition(")")[2]
            case _:
                pass
    if not isinstance(kind, str) or kind not in _TYPES or kind == "bool":
        raise _odd(folder, f"gradients are of the type {told!r:.40}")
    return kind


def _read_info(folder: Path) -> dict[str, Any]:
    file = folder / _INFO
    if not file.is_file():
        raise DataError(
            f"{folder.name} is no folder of bergson",
            where=str(folder),
            why=f"there is no {_INFO} in it",
            do="name what bergson's run_path named; a .part folder is unfinished",
        )
    try:
        found: object = json.loads(read_file(file.resolve(), limit_bytes=_INFO_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise _odd(folder, f"{_INFO} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _odd(folder, f"{_INFO} holds no object")
    return cast("dict[str, Any]", found)


def _refuse_tokens(info: Mapping[str, Any], folder: Path) -> None:
    if info.get("attribute_tokens"):
        raise DataError(
            f"{folder.name} has a row per token",
            where=str(folder),
            why="selections are of examples",
            do="run bergson without attribute_tokens",
        )


def _score_type(info: Mapping[str, Any], m: int, folder: Path) -> np.dtype[Any]:
    told = info.get("dtype")
    match told:
        case {
            "names": list(found),
            "formats": list(formats),
            "offsets": list(offsets),
            "itemsize": int(size),
        } if len(found) == len(formats) == 2 * m:
            names = [name for i in range(m) for name in (f"score_{i}", f"written_{i}")]
            known = all(isinstance(f, str) and f in _TYPES for f in formats)
            known = known and {*formats[1::2]} == {"bool"} and "bool" not in formats[::2]
            known = known and len({*formats[::2]}) == 1  # bfloat16 is widened in all or in none
            if found == names and known:
                try:
                    return np.dtype(
                        {
                            "names": names,
                            "formats": [_TYPES[f] for f in formats],
                            "offsets": offsets,
                            "itemsize": size,
                        }
                    )
                except (ValueError, TypeError, OverflowError) as error:
                    raise _odd(folder, f"its row is described wrongly: {error}") from error
        case _:
            pass
    raise _odd(folder, f"its row is described as {str(told)[:80]}")


def _mapped(file: Path, dtype: np.dtype[Any], n: int) -> np.ndarray:
    expected, found = n * dtype.itemsize, file.stat().st_size if file.is_file() else -1
    if found != expected:
        raise DataError(
            f"{file.name} is cut off or no file of bergson's",
            where=str(file),
            why=f"{_INFO} promises {expected} bytes, "
            + ("there is no such file" if found < 0 else f"the disk holds {found}"),
            do="copy the folder again, or let bergson finish",
        )
    return np.memmap(file, dtype=dtype, mode="r", shape=(n,))


def _widened(values: np.ndarray, is_bfloat: bool) -> np.ndarray:
    if is_bfloat:
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float64)


def _count(info: Mapping[str, Any], key: str, folder: Path) -> int:
    value = info.get(key)
    if not _is_count(value):
        raise _odd(folder, f"{key} is {value!r:.40}")
    return cast("int", value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _odd(folder: Path, why: str) -> DataError:
    return DataError(
        f"{folder.name} does not have the form of bergson 2.5",
        where=str(folder / _INFO),
        why=why[:300],
        do="write the scores as .jsonl with id and score, which any version can",
    )


def _ids(pool: Spec, n: int, folder: Path) -> tuple[str, ...]:
    ids = tuple(example.id for example in read_examples(pool))
    if len(ids) != n:
        raise IncompatibleRunError(
            f"{folder.name} has {n} rows, the pool {len(ids)}",
            where=str(folder),
            why="bergson keeps no ids: rows are matched by their place",
            do="give the very data set that bergson read, in its order",
        )
    return ids


def _is_high_good(folder: Path, told: bool | None) -> bool:
    recorded = _recorded_direction(folder / "config.yaml") if told is None else told
    if recorded is None:
        raise ConfigError(
            f"nothing says whether high scores of {folder.name} are good",
            where=str(folder),
            why="bergson's config.yaml holds no score_cfg.higher_is_better",
            do="say it: higher_is_better=True or False; on the command line --higher-is-better or "
            "--lower-is-better",
        )
    return recorded


def _recorded_direction(file: Path) -> bool | None:
    document = _read_yaml(file)
    steps = document.get("steps") if isinstance(document, dict) else None
    for step in steps if isinstance(steps, list) else []:
        for command in step.values() if isinstance(step, dict) else []:
            config = command.get("score_cfg") if isinstance(command, dict) else None
            found = config.get("higher_is_better") if isinstance(config, dict) else None
            if isinstance(found, bool):
                return found
    return None


def _read_yaml(file: Path) -> Any:  # noqa: ANN401
    if not file.is_file():
        return None
    try:
        return yaml.safe_load(read_file(file.resolve(), limit_bytes=_INFO_LIMIT_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file.name} is not YAML", where=str(file), why=str(error)[:300]
        ) from error


def _refuse_other_processing(folder: Path, query: Path) -> None:
    files = [path / _PROCESSOR for path in (folder, query)]
    lacking = [file.parent for file in files if not file.is_file()]
    if len(lacking) == 1:
        (other,) = {folder, query}.difference(lacking)
        raise IncompatibleRunError(
            f"nothing says whether {folder.name} and {query.name} processed their gradients alike",
            where=_PROCESSOR,
            why=f"there is no {_PROCESSOR} in {lacking[0]}, and one in {other}",
            do="copy the whole folder again, or build both with the same projection and normalizer",
        )
    ours, theirs = map(_read_yaml, files)
    if ours != theirs:
        raise IncompatibleRunError(
            f"{folder.name} and {query.name} processed their gradients differently",
            where=_PROCESSOR,
            why=f"{str(ours)[:200]} in one, {str(theirs)[:200]} in the other",
            do="build both with the same projection and normalizer",
        )


def _scores(
    ids: tuple[str, ...],
    by_query: Float[np.ndarray, "n m"],
    aggregate: Aggregate,
    about: Mapping[str, Any],
) -> Scores:
    main = by_query.max(1) if aggregate == "max" else by_query.mean(1)
    m = by_query.shape[1]
    width = math.ceil(math.log10(m)) if m > 1 else 1
    columns = {f"query:{i:0{width}}": by_query[:, i] for i in range(m)} if m > 1 else {}
    return Scores("bergson", ids, main, columns, (), {**about, "aggregate": aggregate})
