"""The Trainer's `checkpoint-N` folders, sealed by a manifest, and whose run they belong to.

transformers writes straight into `checkpoint-N` and takes the highest number for the newest, so a
save that was cut off would block every restart. Here a folder counts once its manifest stands.
"""

import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from selectune import files
from selectune.data.tokens import Tokens
from selectune.errors import CorruptFileError, IncompatibleRunError, StorageError
from selectune.recipe import TuneSection
from selectune.training.chosen import fingerprint_of
from selectune.training.method import Method

KIND = "checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")
# What changes neither weights nor losses, and the method, which has an entry of its own.
_FREE = frozenset({"save_every", "keep_checkpoints", "controls", "method", "options"})
_FREE |= {"reselect_every"}  # what it does stands in an entry of each phase


def identify(
    items: Sequence[Tokens],
    options: TuneSection,
    *,
    start: str,
    method: Method | None = None,
    target: Sequence[Tokens] = (),
    **rest: object,
) -> dict[str, Any]:
    """Return all that the trained weights depend on, flat, so that a difference has a name.

    Args:
        items: the examples, in the order they were given.
        options: how to train; what only says where to save is left out.
        start: fingerprint of the trainable weights before the first step.
        method: acts during training; None for plain training.
        target: the target examples, of which only some methods make use.
        rest: further entries, JSON values.
    """
    acting: dict[str, str] = {} if method is None else {"method": repr(method)}
    if method is not None and method.reads_target:
        acting["target"] = fingerprint_of(target)
    tuning = options.model_dump(mode="json", exclude=set(_FREE))
    packages = ["torch", "transformers", "peft", "accelerate"]
    packages += ["trl"] if options.trainer == "trl" else []
    return {
        **rest,
        **acting,
        "examples": fingerprint_of(items),
        "start": start,
        **{f"tune.{key}": value for key, value in tuning.items()},
        **{f"version.{name}": version(name) for name in packages},
    }


def refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path) -> None:
    """Compare two identities.

    Raises:
        IncompatibleRunError: they differ; every entry that does is named with both values.
    """
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if keys:
        lines = [f"{key} was {found.get(key)}, is now {wanted.get(key)}" for key in keys]
        raise IncompatibleRunError(
            f"{where.name} was trained by another run: {', '.join(keys)} differ",
            where=str(where),
            why="; ".join(lines),
            do="give this run another output, or remove that folder to train again",
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte was checked."""

    path: Path
    step: int
    seconds: float
    opened: files.Opened


def open_earlier(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint at which the phase before ended.

    Args:
        path: its folder, called checkpoint-N.
        identity: of the phase that goes on from it.

    Raises:
        IncompatibleRunError: it is of another training.
        CorruptFileError: it is not what its manifest says.
    """
    opened = files.open_dir(path, kind=KIND)
    found, wanted = (
        {key: value for key, value in one.items() if key not in ("examples", "phase")}
        for one in (opened.meta["identity"], identity)
    )
    refuse_other(found, wanted, where=path)
    return Checkpoint(path, int(opened.meta["step"]), float(opened.meta["seconds"]), opened)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        keep: int,
        every: int,
        warn: Callable[[str], None],
    ) -> None:
        """Look at nothing yet.

        Args:
            folder: where the Trainer writes `checkpoint-N`.
            identity: of the run; sealed into each checkpoint.
            keep: how many of the newest regular checkpoints stay.
            every: steps between regular ones; others come from interrupts.
            warn: takes a sentence that the user should read.
        """
        self.folder, self.identity = folder, identity
        self.keep, self.every, self.warn = keep, every, warn

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint, and remove everything after it.

        Raises:
            IncompatibleRunError: it belongs to another run.
        """
        for step, path in self._found():
            # No manifest: the save was cut off, or the process died before it was sealed.
            if (path / files.MANIFEST).exists():
                try:
                    opened = files.open_dir(path, kind=KIND)
                except CorruptFileError as error:
                    self.warn(f"{path.name} is damaged, using an older checkpoint: {error}")
                else:
                    refuse_other(opened.meta["identity"], self.identity, where=path)
                    return Checkpoint(path, step, float(opened.meta["seconds"]), opened)
            shutil.rmtree(path)
        return None

    def seal(self, step: int, *, seconds: float) -> None:
        """Give the folder of `step` its manifest, then remove what is no longer needed.

        Args:
            step: whose folder the Trainer has just written.
            seconds: training time up to this step.
        """
        meta = {"identity": dict(self.identity), "step": step, "seconds": seconds}
        files.seal(self.folder / f"checkpoint-{step}", kind=KIND, meta=meta)
        self._remove(found for found, _ in self._found() if found < step and not self._stays(found))

    @contextmanager
    def written_by_others(self) -> Generator[None]:
        """Say what went wrong while the Trainer wrote a checkpoint.

        torch reports a full disk as a RuntimeError without a number: the folder that has no
        manifest yet tells what it was about.

        Raises:
            StorageError: the disk refused.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            half = next((p for _, p in self._found() if not (p / files.MANIFEST).exists()), None)
            if half is None:
                raise
            raise StorageError(
                f"cannot write {half.name}",
                where=str(half),
                why=f"the disk may be full; the writer said: {str(error).splitlines()[0]}",
                do="free some space, or choose an output on another disk; then run the same "
                "command again",
            ) from error

    def finish(self, last: int | None) -> None:
        """Remove what only an interrupted run leaves, so that its folder looks like any other.

        Args:
            last: step at the end of the schedule, where the Trainer saves whatever `every` says;
                None where the run ended before it.
        """
        self._remove(
            step
            for step, _ in self._found()
            if step != last and (step % self.every or not self._stays(step))
        )

    def _stays(self, step: int) -> bool:
        regular = [found for found, _ in self._found() if found % self.every == 0]
        return step in regular[: self.keep]

    def _remove(self, steps: Iterable[int]) -> None:
        for step in list(steps):
            shutil.rmtree(self.folder / f"checkpoint-{step}")

    def _found(self) -> list[tuple[int, Path]]:
        """List the folders, newest first; whether they are valid is another matter."""
        if not self.folder.is_dir():
            return []
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(m[1]), path) for m, path in named if m and path.is_dir()), reverse=True)
