"""The verb for many runs: compare."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer

from selectune.cli.shell import (
    LAUNCH,
    AllowOption,
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    Result,
    need_recipe,
    perform,
    read_allow,
)
from selectune.errors import ConfigError
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.processes import read_part, take_gpu
from selectune.progress import Progress

# The verb that several processes share as a whole.
SHARED = ("compare",)


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(name="compare")(compare)


def compare(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a matrix of methods, targets and seeds.

    RECIPE has a section `matrix`; what may stand there: selectune methods --keys.
    """
    from selectune.recipe import load_recipe

    path = need_recipe(recipe, "compare")
    loaded = load_recipe(path, overrides or ())
    if loaded.matrix is None:
        raise ConfigError(
            f"{path.name} has no matrix to compare",
            where=str(path),
            why="compare runs a grid; without `matrix:` a recipe is one run",
            do=f"add matrix.methods, such as [gist, length], or selectune run {path}",
        )

    allowed = read_allow(allow)
    launch = LAUNCH.get()
    part = read_part("", launch, allow=allow)
    leads = launch is None or launch.is_leader
    out, tell = Path(loaded.output), _teller(is_quiet=quiet)

    def action(progress: Progress) -> Result:
        if launch is not None:
            take_gpu(launch)
        if part is not None:
            from selectune.grid.together import share_grid

            share_grid(loaded, out=out, part=part, progress=progress, tell=tell)
            if not part.is_leader:
                return Outcome({})
        from selectune.grid import compare as grid

        name = "" if part is None else part.launch
        return grid.compare(
            loaded, out=out, progress=progress, allow=allowed, tell=tell, launch=name
        )

    perform(action, as_json=as_json, is_quiet=quiet or not leads, prints=leads)


def _teller(*, is_quiet: bool) -> Callable[[str], None] | None:
    """Return who tells the forecast off a terminal: the log of a batch job has no bars, but this.

    Args:
        is_quiet: nobody.
    """
    return None if is_quiet or sys.stderr.isatty() else partial(print, file=sys.stderr, flush=True)


def plan(recipe: str, overrides: list[str] | None, *, as_json: bool, is_quiet: bool) -> bool:
    """Say what a grid would cost, and return whether the recipe has one."""
    from selectune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if loaded.matrix is None:
        return False

    def action(progress: Progress) -> Result:
        from selectune.grid.compare import plan_grid

        return plan_grid(loaded, out=Path(loaded.output), progress=progress)

    perform(action, as_json=as_json, is_quiet=is_quiet)
    return True
