"""What all verbs share: common options, how results leave, how a person is kept posted."""

import json
import math
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import typer

from selectune.errors import ConfigError, nearest
from selectune.pipeline.processes import Launch
from selectune.progress import Progress, Silent

RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Values that replace the recipe's, such as tune.epochs=2.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

AllowOption = Annotated[
    str,
    typer.Option(
        metavar="KEY[,KEY...]",
        help="What may differ from the run already there: keys or sections of the recipe, data "
        "(the files too), adapter_files, score_file, precision, libraries.",
        show_default=False,
    ),
]

LAUNCH: ContextVar[Launch | None] = ContextVar("LAUNCH", default=None)
"""The launch that this process belongs to, as `main` found it; None where it is the only one."""


@runtime_checkable
class Result(Protocol):
    """What a verb finds out."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        ...

    def lines(self) -> Sequence[str]:
        """Return it as lines for a person."""
        ...


def need_recipe(recipe: str | None, verb: str) -> Path:
    """Return the path of the recipe.

    Raises:
        ConfigError: none was named.
    """
    if recipe is not None:
        return Path(recipe)
    beside = sorted(p.name for p in Path().iterdir() if p.suffix in (".yaml", ".yml"))
    raise ConfigError(
        f"{verb} needs a recipe",
        where="command line",
        why=f"this folder holds {', '.join(beside[:5])}" if beside else "none was named",
        do=f"selectune {verb} {beside[0] if beside else 'recipe.yaml'}"
        + ("" if beside else " (`selectune demo` runs a recipe that ships with selectune)"),
    )


# What --allow takes beside keys: the inputs of a run that no key of the recipe holds.
INPUTS = ("adapter_files", "score_file", "precision", "libraries")


def read_allow(text: str) -> tuple[str, ...]:
    """Return the keys that --allow names.

    Raises:
        ConfigError: a name is no key and no section of a recipe.
    """
    from selectune.recipe import describe

    keys = [key for key, *_ in describe()]
    known = {*keys, *(key.split(".", 1)[0] for key in keys), *INPUTS}
    allowed = tuple(key.strip() for key in text.split(",") if key.strip())
    for key in allowed:
        # Below a key stand the names that a user gives, as in data.target.csqa.
        if key not in known and not any(key.startswith(f"{k}.") for k in keys):
            raise ConfigError(
                f'"{key}" is no key of a recipe',
                where=f"command line, --allow {text}",
                why="--allow takes keys or sections, with commas between them",
                do=nearest(key, known),
            )
    return allowed


def perform(
    action: Callable[[Progress], Result], *, as_json: bool, is_quiet: bool, prints: bool = True
) -> Result:
    """Run a verb, print its result and return it.

    Args:
        action: what to do.
        as_json: print one JSON object instead of lines for a person.
        is_quiet: show no progress even on a terminal.
        prints: whether this process tells the result; of several, one does.
    """
    try:
        with _stdout_for_results() as stdout:
            with _progress(is_quiet) as progress:
                result = action(progress)
            # Written after the bars are gone, or the two would run into each other.
            text = to_json_text(result.to_json()) if as_json else "\n".join(result.lines())
            if prints:
                _write(stdout, text + "\n")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    return result


@contextmanager
def _stdout_for_results() -> Generator[int]:
    """Send what libraries and their children print to stderr; yield a handle of stdout.

    A program reads our stdout: one stray line of a download or a tokenizer would break its JSON.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield ours
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


@contextmanager
def _progress(is_quiet: bool) -> Generator[Progress]:
    if is_quiet or not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console

    from selectune.cli.bars import Bars

    with Bars(Console(stderr=True)) as bars:
        yield bars


def to_json_text(value: object) -> str:
    """Return one line of JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value)
        return {str(key): _finite(inner) for key, inner in items.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in cast(Sequence[object], value)]
    if isinstance(value, Path):
        return str(value)
    return value


def _write(handle: int, text: str) -> None:
    """Write a result; a reader that has read enough (`| head`) is no error."""
    left = text.encode("utf-8", "replace")
    try:
        while left:
            left = left[os.write(handle, left) :]
    except BrokenPipeError:
        return
