"""The manifest of a result: what it is, which files belong to it, and their checksums.

    {"files": {name: {"bytes": n, "sha256": hex}}, "format": "selectune/<kind>",
     "meta": {...}, "sha256": hex of this manifest without this entry, "version": 1}

The manifest is believed only when its bytes are exactly those we would write for its content, so a
flipped bit anywhere in it shows. That finds accidents; who rewrites a file can rewrite its
manifest too, and nothing here claims otherwise.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from selectune.errors import CorruptFileError, DataError, IncompatibleRunError
from selectune.files.disk import MANIFEST, exists, is_temp_name, read_file

VERSION = 1
_FORMAT = "selectune/"
_LIMIT_BYTES = 16 << 20
_REPAIR = "remove this folder and run the command again, or restore it from a copy"


@dataclass(frozen=True, slots=True)
class Entry:
    """Size and checksum of one file of a result."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says."""

    kind: str
    files: Mapping[str, Entry]
    meta: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Return the one rendering of this manifest that a reader accepts.

        Raises:
            DataError: `meta` holds what JSON cannot say.
        """
        body: dict[str, Any] = {
            "format": _FORMAT + self.kind,
            "version": VERSION,
            "files": {n: {"sha256": e.sha256, "bytes": e.n_bytes} for n, e in self.files.items()},
            "meta": self.meta,
        }
        # Through JSON and back: keys that are numbers become text, and then sort as text.
        body = json.loads(to_json(body, MANIFEST))
        digest = hashlib.sha256(to_json(body, MANIFEST)).hexdigest()
        return to_json({**body, "sha256": digest}, MANIFEST)


def read_manifest(path: Path, kind: str) -> Manifest:
    """Return the manifest of a result folder, believed in every byte.

    Args:
        path: the folder.
        kind: what the folder should be.

    Raises:
        CorruptFileError: the manifest is missing or is not one that we wrote for this kind.
        IncompatibleRunError: a newer selectune wrote it.
    """
    file = path / MANIFEST
    if not exists(file):
        raise CorruptFileError(
            f"{path.name or path} is not a finished result",
            where=str(path),
            why=f"it has no {MANIFEST}" if exists(path) else "there is no such folder",
            do="run the command that makes it",
        )
    raw = read_file(file, limit_bytes=_LIMIT_BYTES)
    found: object = parse_json(raw, file)
    if not isinstance(found, dict):
        _refuse(file, "its top level is not an object")
    body = cast("dict[str, Any]", found)
    _check_head(file, body, kind)
    if set(body) != {"format", "version", "files", "meta", "sha256"}:
        _refuse(file, f"its entries are {', '.join(map(repr, sorted(body)))}")
    if not isinstance(body["meta"], dict):
        _refuse(file, '"meta" is not an object')
    meta = cast("dict[str, Any]", body["meta"])
    manifest = Manifest(kind, _entries(file, body["files"]), meta)
    expected = manifest.to_bytes()
    if raw != expected:
        _refuse(
            file,
            f"expected sha256 {hashlib.sha256(expected).hexdigest()}, "
            f"found {hashlib.sha256(raw).hexdigest()}: it was changed after it was written",
        )
    return manifest


def is_ours(path: Path) -> bool:
    """Return whether a folder may be replaced: it holds a manifest of ours, be it a damaged one."""
    try:
        found: object = parse_json(read_file(path / MANIFEST, limit_bytes=_LIMIT_BYTES), path)
    except CorruptFileError:
        return exists(path / MANIFEST)
    if not isinstance(found, dict):
        return False
    return str(cast("dict[str, Any]", found).get("format")).startswith(_FORMAT)


def is_safe_name(name: str) -> bool:
    """Return whether a name stays inside its folder: relative, no way up, no temp name."""
    parts = name.split("/")
    return (
        0 < len(name) <= 1000
        and "\0" not in name
        and "\\" not in name
        and name != MANIFEST
        and not any(part in ("", ".", "..") or is_temp_name(part) for part in parts)
    )


def to_json(value: object, name: str) -> bytes:
    """Return a value as the JSON that we write: sorted keys, ASCII, no NaN.

    Raises:
        DataError: JSON cannot say it.
    """
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{name} cannot be written as JSON", why=str(error), do="use plain, finite values"
        ) from error
    return text.encode() + b"\n"


def parse_json(raw: bytes, path: Path) -> Any:  # noqa: ANN401
    """Return the value that JSON bytes stand for; each key once, no NaN, no depth attack.

    Raises:
        CorruptFileError: the bytes are not such JSON.
    """
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        why = str(error)
    raise CorruptFileError(
        f"{path.name} is not valid JSON", where=str(path), why=why, do=_REPAIR
    ) from None


def corrupt(path: Path, expected: str, found: str) -> CorruptFileError:
    """Return the error for a file that is not what its manifest says."""
    return CorruptFileError(
        f"{path.name} is damaged",
        where=str(path),
        why=f"its manifest expects {expected}, the disk holds {found}",
        do=_REPAIR,
    )


def _check_head(file: Path, body: Mapping[str, Any], kind: str) -> None:
    form, version = body.get("format"), body.get("version")
    if not isinstance(form, str) or not form.startswith(_FORMAT):
        _refuse(file, f'expected format "{_FORMAT}{kind}", found {form!r:.80}')
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        _refuse(file, f"expected version 1 to {VERSION}, found {version!r:.80}")
    if version > VERSION:
        raise IncompatibleRunError(
            f"{file.parent.name} was written by a newer selectune",
            where=str(file),
            why=f"its format has version {version}, this selectune reads up to {VERSION}",
            do="upgrade selectune",
        )
    if form != _FORMAT + kind:
        _refuse(file, f'expected format "{_FORMAT}{kind}", found "{form:.80}"')


def _entries(file: Path, found: object) -> dict[str, Entry]:
    if not isinstance(found, dict):
        _refuse(file, '"files" is not an object')
    entries: dict[str, Entry] = {}
    for name, value in cast("dict[str, Any]", found).items():
        if not is_safe_name(name):
            _refuse(file, f"the file name {name!r:.200} leaves its folder or is reserved")
        match value:
            case {"bytes": int(n), "sha256": str(digest)} if len(value) == 2 and n >= 0:
                entries[name] = Entry(n, digest)
            case _:
                _refuse(file, f"the entry of {name!r:.200} is not a size and a sha256")
    return entries


def _refuse(file: Path, why: str) -> NoReturn:
    raise CorruptFileError(f"{file.name} is damaged", where=str(file), why=why, do=_REPAIR)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
