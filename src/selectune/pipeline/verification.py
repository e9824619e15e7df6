"""What can be checked of a folder that a run left: run.json's shape, every file's checksum.

Nothing here imports torch: `selectune verify` answers at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.errors import ConfigError, CorruptFileError, IncompatibleRunError, SelectuneError
from selectune.files import open_dir, sha256_file

FORMAT = 1
FIELDS = ("format", "selectune", "libraries", "hardware", "inputs", "seed", "steps")


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found."""

    ok: bool
    problems: tuple[str, ...]


def verify(out: Path) -> Verification:
    """Check every file of a run against its checksums, and run.json for every field.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not (out / "run.json").exists():
        raise ConfigError(
            f"no run in {out}",
            where=str(out),
            why="a run's folder holds run.json",
            do="give the folder that a recipe's `output` names",
        )
    problems: list[str] = []
    try:
        run = read_run(out)
    except SelectuneError as error:
        return Verification(False, (str(error),))
    for step in run["steps"].values():
        for name, expected in step["files"].items():
            try:
                check_file(out / name, expected)
            except SelectuneError as error:
                problems.append(str(error))
    for manifest in sorted(out.rglob("manifest.json")):
        try:
            kind = json.loads(manifest.read_bytes())["format"].removeprefix("selectune/")
            opened = open_dir(manifest.parent, kind=kind)
            for name in opened.names:
                opened.read_bytes(name)
        except SelectuneError as error:
            problems.append(str(error))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{manifest}: no manifest of ours ({error})")
    return Verification(not problems, tuple(problems))


def check_file(path: Path, expected: str) -> None:
    """Raise CorruptFileError where a file is missing or has another sha256 than `expected`."""
    actual = sha256_file(path) if path.is_file() else "no such file"
    if actual != expected:
        raise CorruptFileError(
            f"{path.name} is not the file that the run wrote",
            where=str(path),
            why=f"expected sha256 {expected}, found {actual}",
            do="restore it, or remove the step's entry in run.json's folder by starting anew",
        )


def read_run(out: Path) -> dict[str, Any]:
    """Return a folder's run.json.

    Raises:
        CorruptFileError: it is no run.json of ours.
        IncompatibleRunError: a newer selectune wrote it.
    """
    path = out / "run.json"
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            "run.json cannot be read", where=str(path), why=str(error), do="start the run anew"
        ) from error
    missing = [f for f in FIELDS if f not in data] if isinstance(data, dict) else list(FIELDS)
    if missing:
        raise CorruptFileError(
            f"run.json lacks {', '.join(missing)}", where=str(path), do="start the run anew"
        )
    if not _is_sound(data["format"], data["steps"], data["inputs"], data["libraries"]):
        raise CorruptFileError(
            "run.json is not as selectune writes it", where=str(path), do="start the run anew"
        )
    if data["format"] > FORMAT:
        raise IncompatibleRunError(
            "run.json was written by a newer selectune",
            where=str(path),
            why=f"its format is {data['format']}, this version reads up to {FORMAT}",
            do="upgrade selectune",
        )
    return data


def _is_sound(version: object, steps: object, *plain: object) -> bool:
    """Return whether what other code reads of run.json has the types that `Record` wrote."""
    if type(version) is not int or not all(isinstance(part, dict) for part in plain):
        return False
    if not isinstance(steps, dict):
        return False
    shape = {"fingerprint": str, "files": dict, "cost": dict, "facts": dict}
    return all(
        isinstance(step, dict)
        and all(isinstance(step.get(key), kind) for key, kind in shape.items())
        # Names of files in the run's own folder, and nowhere else.
        and all(Path(name).name == name for name in step["files"])
        for step in steps.values()
    )
