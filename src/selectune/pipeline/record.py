"""run.json and config.yaml: what a run is, what each step made of what, and at what price."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from selectune.errors import CorruptFileError, IncompatibleRunError
from selectune.files import sha256_file, write_file
from selectune.models import choose_device, choose_precision
from selectune.pipeline.measure import Measured
from selectune.pipeline.verification import FORMAT, check_file, read_run
from selectune.recipe import ModelSection, Recipe

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Return the installed version of every library that a result depends on."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Return what the process runs on, without names of people or machines."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
    }


def precision_input(model: ModelSection) -> str:
    """Return how a model computes here, as one of a record's inputs."""
    device = choose_device(model.device)
    return f"{choose_precision(model.dtype, device)} on {device.type}"


class Record:
    """run.json of one folder.

    A step is done when its entry carries the fingerprint of its inputs and every file it names has
    the recorded sha256.

    Args:
        out: the run's folder.
        recipe: as resolved now; written to config.yaml.
        allow: keys, sections or names of inputs that may differ from what the folder was made with.
        inputs: what else decides the result, by name: fingerprints of data and adapter, precision.

    Raises:
        IncompatibleRunError: the folder holds a run of another recipe, other inputs or libraries,
            or of a newer selectune.
        CorruptFileError: config.yaml or run.json cannot be read.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        *,
        allow: Sequence[str] = (),
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.out = out
        self._path = out / "run.json"
        self._data: dict[str, Any] = {
            "format": FORMAT,
            "selectune": metadata.version("selectune"),
            "libraries": versions(),
            "hardware": hardware(),
            "inputs": dict(inputs or {}),
            "seed": recipe.seed,
            "steps": {},
        }
        config = out / "config.yaml"
        if config.exists():
            _refuse_changes(config, recipe, allow)
        if self._path.exists():
            then = read_run(out)
            self._refuse_inputs(then, allow)
            self._data |= {"steps": then["steps"]}
        write_file(config, recipe.resolved_yaml().encode())
        self._save()

    def _refuse_inputs(self, then: Mapping[str, Any], allow: Sequence[str]) -> None:
        old = {**then["inputs"], "libraries": then["libraries"]}
        new = {**self._data["inputs"], "libraries": self._data["libraries"]}
        changed = [key for key in sorted(new) if old.get(key) != new[key] and key not in allow]
        if changed:
            raise IncompatibleRunError(
                f"{self.out} was made with other {' and '.join(changed)}",
                where=str(self._path),
                why="; ".join(f"{key}: {_difference(old.get(key), new[key])}" for key in changed),
                do="choose another output folder, or allow it by name: --allow "
                + ",".join(changed),
            )

    def entry(self, step: str) -> dict[str, Any] | None:
        """Return what run.json says about a step, whatever its inputs were."""
        return self._data["steps"].get(step)

    def done(self, step: str, fingerprint: str) -> dict[str, Any] | None:
        """Return the entry of a step that is done with these inputs, else None.

        Raises:
            CorruptFileError: a file of the step is not what run.json says.
        """
        entry = self.entry(step)
        if entry is None or entry["fingerprint"] != fingerprint:
            return None
        for name, expected in entry["files"].items():
            check_file(self.out / name, expected)
        return entry

    def write(
        self,
        step: str,
        fingerprint: str,
        *,
        cost: Measured | Mapping[str, Any],
        files: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a finished step on record.

        Args:
            step: its name.
            fingerprint: of its inputs.
            cost: what it took.
            files: names in the run's folder that it wrote.
            facts: plain values that explain its result.
        """
        self._data["steps"][step] = {
            "fingerprint": fingerprint,
            "files": {name: sha256_file(self.out / name) for name in files},
            "cost": cost.to_json() if isinstance(cost, Measured) else dict(cost),
            "facts": dict(facts or {}),
        }
        self._save()

    def _save(self) -> None:
        text = json.dumps(self._data, indent=2, ensure_ascii=False, allow_nan=False)
        write_file(self._path, text.encode())

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Every step on record."""
        return dict(self._data["steps"])

    def to_json(self) -> dict[str, Any]:
        """Return run.json as plain values."""
        return dict(self._data)


def _difference(old: Any, new: Any) -> str:  # noqa: ANN401
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        return ", ".join(f"{k} {old.get(k)} then, {new.get(k)} now" for k in names)
    return f"{old} then, {new} now"


def _refuse_changes(config: Path, recipe: Recipe, allow: Sequence[str]) -> None:
    try:
        then = _flat(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise CorruptFileError(
            "config.yaml cannot be read",
            where=str(config),
            why=str(error).split("\n", 1)[0],
            do="choose another output folder",
        ) from error
    now = _flat(yaml.safe_load(recipe.resolved_yaml()))
    free = ("output", *allow)
    changed = [
        key
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
        and not any(key == k or key.startswith(f"{k}.") for k in free)
    ]
    if changed:
        raise IncompatibleRunError(
            f"{config.parent} holds a run of another recipe",
            where=str(config),
            why="; ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in changed),
            do="choose another output folder, or allow it by name: --allow " + ",".join(changed),
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
