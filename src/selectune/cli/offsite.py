"""The verbs of a model's owner: emulate, and plug."""

import json
from pathlib import Path
from typing import Annotated

import typer

from selectune.cli.shell import (
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
from selectune.progress import Progress

OwnerOption = Annotated[
    Path,
    typer.Option(
        "--owner", metavar="FOLDER", help="The owner's folder that `emulate` wrote.",
        show_default=False,
    ),
]  # fmt: skip
OntoOption = Annotated[
    str,
    typer.Option(
        "--onto", metavar="MODEL", help="The original: a folder or a name on the Hub.",
        show_default=False,
    ),
]  # fmt: skip
OutOption = Annotated[
    Path,
    typer.Option("--out", metavar="FOLDER", help="Where the tuned model goes.", show_default=False),
]
PluggedOption = Annotated[
    str | None,
    typer.Option(
        "--plugged", metavar="MODEL", help="What `plug` wrote; asks it too.", show_default=False
    ),
]
OriginalOption = Annotated[
    str | None,
    typer.Option(
        "--original", metavar="MODEL", help="With --plugged: the model that the package was made "
        "of.", show_default=False,
    ),
]  # fmt: skip
OpenOption = Annotated[
    Path | None,
    typer.Option(
        "--open", metavar="RUN", help="With --plugged: a finished run that tuned the original "
        "itself.", show_default=False,
    ),
]  # fmt: skip

_PACKAGE = "emulator.json"  # by which a package is known before anything heavy is imported


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    for verb in (emulate, plug):
        app.command(name=verb.__name__)(verb)


def emulate(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a package that others can tune without having the model.

    RECIPE is an owner's: the sections model and emulate, no data. Writes package/, to hand out, and
    owner/, to keep, into its output.
    """
    from selectune.recipe import load_owner_recipe

    loaded = load_owner_recipe(need_recipe(recipe, "emulate"), overrides or ())

    def action(progress: Progress) -> Result:
        from selectune.pipeline.emulation import Emulation

        return Emulation(loaded, progress).emulate()

    perform(action, as_json=as_json, is_quiet=quiet)


def is_owners(recipe: str) -> bool:
    """Return whether a file is the recipe of a model's owner."""
    from selectune.recipe import is_owner_recipe

    return is_owner_recipe(recipe)


def plan(recipe: str, overrides: list[str] | None, *, as_json: bool, is_quiet: bool) -> None:
    """Say what an emulator would be."""
    from selectune.recipe import load_owner_recipe

    loaded = load_owner_recipe(recipe, overrides or ())

    def action(progress: Progress) -> Result:
        from selectune.pipeline.emulation import Emulation

        return Emulation(loaded, progress).plan()

    perform(action, as_json=as_json, is_quiet=is_quiet)


def evaluate(
    recipe: str | None,
    overrides: list[str] | None,
    *,
    plugged: str | None,
    original: str | None,
    openly: Path | None,
    allow: str,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Say what offsite tuning won."""
    from selectune.recipe import load_recipe

    loaded = load_recipe(need_recipe(recipe, "evaluate"), overrides or ())
    if plugged is None:
        raise ConfigError(
            "there is no plugged model to compare",
            where="command line",
            why="--original and --open say what a plugged model is compared with",
            do="name what `selectune plug` wrote with --plugged",
        )
    allowed = read_allow(allow)

    def action(progress: Progress) -> Result:
        from selectune.pipeline.plugged import evaluate_plugged

        return evaluate_plugged(
            loaded, Path(loaded.output), plugged=plugged, original=original, openly=openly,
            allow=allowed, progress=progress,
        )  # fmt: skip

    perform(action, as_json=as_json, is_quiet=is_quiet)


def report(folder: Path, *, as_json: bool, is_quiet: bool) -> None:
    """Write the pages of the emulators in a folder."""

    def action(_: Progress) -> Result:
        from selectune.cli.listing import Listing
        from selectune.offsite.emulate import OWNER, PACKAGE
        from selectune.pipeline.emulator_story import write_pages

        pages = [str(page) for page in write_pages(folder, OWNER, PACKAGE)]
        return Listing({"reports": pages}, tuple(f"report: {page}" for page in pages))

    perform(action, as_json=as_json, is_quiet=is_quiet)


def with_package(
    first: str | None, others: list[str] | None, verb: str
) -> tuple[str | None, list[str] | None]:
    """Return recipe and overrides of a command line that may begin with a package.

    Raises:
        ConfigError: a package is named and no recipe.
    """
    if first is None or not (Path(first) / _PACKAGE).exists():
        return first, others
    if not others or "=" in others[0]:
        raise ConfigError(
            f"{verb} needs a recipe",
            where="command line",
            why=f"{first} is a package: it stands for the model, and says nothing of data",
            do=f"selectune {verb} {first} recipe.yaml",
        )
    return others[0], [*others[1:], f"model.base={json.dumps(first)}"]


def plug(
    plugin: Annotated[
        Path,
        typer.Argument(
            metavar="PLUGIN", help="The folder that a data owner sent back.", show_default=False
        ),
    ],
    owner: OwnerOption,
    onto: OntoOption,
    out: OutOption,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put layers that were tuned on a package into the model."""

    def action(_: Progress) -> Result:
        from selectune.cli.listing import Listing
        from selectune.offsite.plugin import plug_files
        from selectune.pipeline.prepare import DemoNames

        done = plug_files(DemoNames().path(onto), plugin, owner, out)
        first = max(done.changes, key=lambda name: done.changes[name])
        data = {"folder": str(out), "form": done.form, "changes": dict(done.changes)}
        lines = (
            f"{out}: {onto} with {plugin}",
            f"  {len(done.changes)} tensors of its adapter layers changed, and nothing else; "
            f"{first} the most, by {done.changes[first]:.2%} of its norm",
            "  evaluate it before it is used: no check sees what well-formed weights were taught",
        )
        return Listing(data, lines)

    perform(action, as_json=as_json, is_quiet=True)
