"""The verbs around a run: methods, doctor, verify, demo."""

from importlib import metadata
from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer

from selectune.cli import weights
from selectune.cli.shell import (
    AllowOption,
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    Result,
    perform,
    read_allow,
)
from selectune.errors import ConfigError, nearest
from selectune.progress import Progress

# What makes the demo small: a fifth of the pool, one pass of tuning, fewer questions.
QUICK = (
    "output=runs/demo-quick",
    "data.pool=demo:pool/30",
    "tune.epochs=1",
    "evaluate.limit=30",
)


def version() -> str:
    """Return the version of the installed package."""
    try:
        return metadata.version("selectune")
    except metadata.PackageNotFoundError:
        return "(run from its sources, not installed)"


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    for verb in (methods, doctor, verify, demo):
        app.command(name=verb.__name__)(verb)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, told in full.")] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every key of a recipe instead.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the methods, or every key of a recipe."""
    from selectune.cli import listing as lists

    if keys:
        listing = lists.keys()
    elif name is None:
        listing = lists.methods()
    else:
        listing = lists.method(name)
    perform(lambda _: listing, as_json=as_json, is_quiet=True)


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say whether this machine and its parts fit."""

    def action(_: Progress) -> Result:
        from selectune.doctor import doctor

        return doctor()

    if not perform(action, as_json=as_json, is_quiet=True).to_json()["ok"]:
        raise typer.Exit(1)


def verify(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER", help="Of a run, or its recipe; of a delta.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="See that a delta was made on it.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check every file of a run, or of a sparse delta."""
    out = _run_folder(folder)

    def action(_: Progress) -> Result:
        if weights.is_artefact(out):
            return weights.verify_delta(out, base)
        if base is not None:
            raise ConfigError(
                f"{out} holds no sparse delta",
                where="command line, --base",
                why="only a delta is made on a base",
                do="leave --base out, or give the folder of a delta",
            )
        from selectune.cli.listing import Listing
        from selectune.pipeline import verification

        found = verification.verify(out)
        return Listing(
            {"ok": found.ok, "folder": str(out), "problems": list(found.problems)},
            _verdict(out, tuple(found.problems)),
        )

    if not perform(action, as_json=as_json, is_quiet=True).to_json()["ok"]:
        raise typer.Exit(1)


def demo(
    overrides: OverridesArgument = None,
    allow: AllowOption = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="A fifth of the pool, one epoch: a few minutes.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the shipped recipe on real parts."""
    from selectune.recipe import load_recipe
    from selectune.recipes import demo_recipe

    recipe = load_recipe(demo_recipe(), [*(QUICK if quick else ()), *(overrides or ())])
    allowed = read_allow(allow)

    def action(progress: Progress) -> Result:
        from selectune.pipeline.run import Run

        return Run(recipe, out=Path(recipe.output), allow=allowed, progress=progress).all()

    perform(action, as_json=as_json, is_quiet=quiet)


def _run_folder(folder: str | None) -> Path:
    if folder is None:
        raise ConfigError(
            "verify needs the folder of a run",
            where="command line",
            why="none was named",
            do="selectune verify runs/NAME",
        )
    path = Path(folder)
    if path.is_file():
        from selectune.recipe import load_recipe

        path = Path(load_recipe(path).output)
    if not path.is_dir():
        raise ConfigError(
            f'there is no run "{path}"',
            where="command line",
            why="no such folder",
            do=nearest(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()])
            if path.parent.is_dir()
            else "name the folder that `selectune run` wrote",
        )
    return path


def _verdict(out: Path, problems: tuple[str, ...]) -> tuple[str, ...]:
    if not problems:
        return (f"{out}: every file is what its manifest says",)
    return (f"{out}: {len(problems)} problems", *(indent(p, "  ") for p in problems))
