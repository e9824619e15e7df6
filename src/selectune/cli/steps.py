"""The verbs of one run: all of it, or one step of it."""

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selectune.cli import grid, offsite
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
from selectune.pipeline.processes import read_part, take_gpu
from selectune.progress import Progress

if TYPE_CHECKING:
    from selectune.pipeline.run import Run


# The verbs whose scoring several processes share.
SHARED = ("score", "select", "tune", "evaluate", "run")


class TokenForm(StrEnum):
    """How an example's score is split by token, by the names of `token_scoring.Form`."""

    loss = "loss"
    position = "position"


ShardOption = Annotated[
    str,
    typer.Option(
        metavar="I/N",
        help="Take the gradients of one of N shards only, from 1; several may run at a time, on "
        "machines that see the same folder. Without it, what is missing.",
        show_default=False,
    ),
]


FastOption = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Take cheaper gradients, and say how alike the ranks of a random probe are to those "
        "of full ones; the same as score.fast=true.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    for verb in (plan, score, select, tokens, tune, evaluate, run, report):
        app.command(name=verb.__name__)(verb)


def plan(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a run, a grid or an emulator would be and cost."""
    if recipe is not None and offsite.is_owners(recipe):
        offsite.plan(recipe, overrides, as_json=as_json, is_quiet=quiet)
        return
    if recipe is not None and grid.plan(recipe, overrides, as_json=as_json, is_quiet=quiet):
        return
    _step("plan", lambda run: run.plan(), recipe, overrides, allow, as_json, quiet)


def score(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    shard: ShardOption = "",
    fast: FastOption = False,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Score every example of the pool."""
    _step(
        "score", lambda run: run.score(), recipe, _with(overrides, fast), allow, as_json, quiet,
        shard=shard,
    )  # fmt: skip


def select(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose examples by their scores, with reasons."""
    _step("select", lambda run: run.select(), recipe, overrides, allow, as_json, quiet)


def tokens(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    form: Annotated[
        TokenForm,
        typer.Option(
            help="loss: credit the token whose own loss term gives the gradient; position: credit "
            "the position at which that gradient reaches the weights."
        ),
    ] = TokenForm.loss,
    ids: Annotated[
        str,
        typer.Option(
            metavar="ID[,ID...]",
            help="Candidates to look at instead of the selection.",
            show_default=False,
        ),
    ] = "",
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell which tokens of the chosen examples help the task."""
    asked = [name.strip() for name in ids.split(",") if name.strip()]
    _step(
        "tokens", lambda run: run.tokens(form=form.value, ids=asked), recipe, overrides, allow,
        as_json, quiet,
    )  # fmt: skip


def tune(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Tune an adapter on the choice and one per control.

    `selectune tune PACKAGE RECIPE`: the package replaces model.base.
    """
    recipe, overrides = offsite.with_package(recipe, overrides, "tune")
    _step("tune", lambda run: run.tune(), recipe, overrides, allow, as_json, quiet)


def evaluate(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    plugged: offsite.PluggedOption = None,
    original: offsite.OriginalOption = None,
    openly: offsite.OpenOption = None,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare adapters and base on held-out examples.

    `selectune evaluate PACKAGE RECIPE`: the package replaces model.base. With --plugged, what
    offsite tuning won.
    """
    recipe, overrides = offsite.with_package(recipe, overrides, "evaluate")
    if plugged is not None or original is not None or openly is not None:
        launch = LAUNCH.get()
        if launch is not None and not launch.is_leader:
            return  # scores nothing
        offsite.evaluate(
            recipe, overrides, plugged=plugged, original=original, openly=openly,
            allow=allow, as_json=as_json, is_quiet=quiet,
        )  # fmt: skip
        return
    _step("evaluate", lambda run: run.evaluate(), recipe, overrides, allow, as_json, quiet)


def run(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    fast: FastOption = False,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Do all of it; the same command again goes on where it stopped."""
    _step("run", lambda run: run.all(), recipe, _with(overrides, fast), allow, as_json, quiet)


def report(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    allow: AllowOption = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the report of a run, one HTML page.

    RECIPE may also be the folder of a run, or of `selectune emulate`, or one with several of these.
    """
    if recipe is not None and (Path(recipe) / "run.json").exists():
        overrides = [f"output={json.dumps(recipe)}", *(overrides or ())]
        recipe = str(Path(recipe) / "config.yaml")
    elif recipe is not None and Path(recipe).is_dir():
        offsite.report(Path(recipe), as_json=as_json, is_quiet=quiet)
        return
    _step("report", lambda run: run.report(), recipe, overrides, allow, as_json, quiet)


def _with(overrides: list[str] | None, fast: bool) -> list[str]:
    return [*(overrides or ()), *(["score.fast=true"] if fast else ())]


def _step(
    verb: str,
    step: Callable[["Run"], Result],
    recipe: str | None,
    overrides: list[str] | None,
    allow: str,
    as_json: bool,
    quiet: bool,
    *,
    shard: str = "",
) -> None:
    from selectune.recipe import load_recipe

    path = need_recipe(recipe, verb)
    loaded = load_recipe(path, overrides or ())
    if loaded.matrix is not None:
        raise ConfigError(
            f"{path.name} is a grid, and {verb} would do one run of it",
            where=str(path),
            why="it has a matrix",
            do=f"selectune compare {path}; for one run remove the matrix",
        )
    allowed = read_allow(allow)
    launch = LAUNCH.get()  # None for verbs that are not SHARED
    part = read_part(shard, launch, allow=allow)
    leads = launch is None or launch.is_leader

    def action(progress: Progress) -> Result:
        # Imported only now: a wrong recipe is told in half a second, torch takes longer.
        from selectune.pipeline.run import Run

        if launch is not None:
            take_gpu(launch)
        run = Run(loaded, out=Path(loaded.output), allow=allowed, progress=progress)
        if part is None:
            return step(run)
        if leads:
            run.refuse_early(verb)
        shared = run.share(part)
        return step(run) if part.is_leader else shared

    perform(action, as_json=as_json, is_quiet=quiet or not leads, prints=leads)
