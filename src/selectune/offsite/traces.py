"""What a folder may carry besides tensors: no name of the base, no link, no code of others."""

import json
import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, cast

from selectune.errors import CorruptFileError, DataError
from selectune.files import MANIFEST
from selectune.files.disk import read_file, storage_errors
from selectune.files.manifest import parse_json, to_json

TENSORS = ".safetensors"
_TEXTS = (".json", ".txt", ".jinja")
# Here every key is a token, so that none of them means anything else.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
# Where a model or tokenizer came from.
_ORIGINS = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "tokenizer_file"})
# What makes a loader fetch and run code, or other weights. "attn_implementation" may name a kernel
# on the Hub.
_CODE = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "custom_generate",
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "use_kernels",
        "kernel_config",
    }
)


def strip(folder: Path) -> None:
    """Remove from the JSON files of a folder where they came from, and what names code.

    Args:
        folder: as `save_pretrained` wrote it; not yet sealed.
    """
    for path in sorted(folder.rglob("*.json")):
        if path.name in _VOCABULARIES:
            continue
        value = json.loads(path.read_text(encoding="utf-8"))
        path.write_bytes(to_json(_without(value, _ORIGINS | _CODE), path.name))


def refuse_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder of which a text names where the base came from.

    Args:
        folder: not yet sealed.
        names: of base and tokenizer; one that is no path may be an ordinary word and is let pass.

    Raises:
        DataError: one of them occurs in a file.
    """
    paths = {name for name in names if "/" in name or os.sep in name}
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _TEXTS or not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in paths:
            if name in text:
                raise DataError(
                    f"{file.name} names the base, {name}",
                    where=str(file),
                    why="a package must not say which model it was made of",
                    do="remove it from the tokenizer or the configuration",
                )


def refuse_foreign_files(folder: Path, names: Collection[str]) -> None:
    """Refuse a folder that holds anything but these files.

    Args:
        folder: that somebody else has made.
        names: relative, beside the manifest.

    Raises:
        CorruptFileError: a file is of a kind that is not exchanged, is a link or a device, or is
            not among these.
    """
    expected = {*names, MANIFEST}
    with storage_errors(folder, "read"):
        for root, folders, files in os.walk(folder):
            for name in sorted([*files, *folders]):
                path = Path(root) / name
                relative = path.relative_to(folder).as_posix()
                mode = os.lstat(path).st_mode
                if stat.S_ISDIR(mode):
                    continue
                if not stat.S_ISREG(mode):
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
                    raise _unwanted(path, f"it is {kind}")
                if path.suffix not in (TENSORS, *_TEXTS):
                    raise _unwanted(path, "only safetensors, JSON and text are exchanged")
                if relative not in expected:
                    raise _unwanted(path, f"expected are {', '.join(sorted(expected))}")


def refuse_code(folder: Path, names: Iterable[str]) -> None:
    """Refuse configurations that would make a loader run code or fetch other weights.

    Args:
        folder: that somebody else has made.
        names: its files.

    Raises:
        CorruptFileError: one does, or is no JSON.
    """
    for name in names:
        path = folder / name
        if path.suffix != ".json" or path.name in _VOCABULARIES:
            continue
        found = _keys(parse_json(read_file(path), path)) & _CODE
        if found:
            raise CorruptFileError(
                f'{name} has the key "{min(found)}"',
                where=str(path),
                why="it can make a loader run code, or fetch weights, that are not in the folder",
                do="ask for a folder without it, or remove it if you trust its sender",
            )


def _unwanted(path: Path, why: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path.name} does not belong into this folder",
        where=str(path),
        why=why,
        do="ask for the folder again",
    )


def _without(value: Any, names: Collection[str]) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        return {k: _without(v, names) for k, v in found.items() if k not in names}
    if isinstance(value, list):
        return [_without(v, names) for v in cast("list[Any]", value)]
    return value


def _keys(value: object) -> set[str]:
    found: set[str] = set()
    waiting = [value]  # no recursion: the file is somebody else's, and may be deep
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            found |= cast("dict[str, Any]", here).keys()
            waiting += cast("dict[str, Any]", here).values()
        elif isinstance(here, list):
            waiting += cast("list[Any]", here)
    return found
