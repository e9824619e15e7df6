"""The verbs around a run: methods, doctor, verify, demo."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune.cli.shell import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    Result,
    perform,
)
from selectune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from selectune.run import Verification

    from selectune.progress import Progress
    from selectune.registry import Entry, Family

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


@dataclass(frozen=True, slots=True)
class Listing:
    """Something that is only printed."""

    data: dict[str, Any]
    text: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return self.data

    def lines(self) -> tuple[str, ...]:
        """Return it as lines for a person."""
        return self.text


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, told in full.")] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every key of a recipe instead.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the methods, or every key of a recipe."""
    if keys:
        listing = _keys()
    elif name is None:
        listing = _methods()
    else:
        listing = _method(name)
    perform(lambda _: listing, as_json=as_json, is_quiet=True)


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say whether this machine and its parts fit."""

    def action(_: "Progress") -> Result:
        from selectune.doctor import doctor

        return doctor()

    if not perform(action, as_json=as_json, is_quiet=True).to_json()["ok"]:
        raise typer.Exit(1)


def verify(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Folder of a run, or its recipe.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check every file of a run against its checksums."""
    out = _run_folder(folder)

    def action(_: "Progress") -> Result:
        from selectune import run

        found = run.verify(out)
        return Listing(
            {"ok": found.ok, "folder": str(out), "problems": list(found.problems)},
            _verdict(out, found),
        )

    if not perform(action, as_json=as_json, is_quiet=True).to_json()["ok"]:
        raise typer.Exit(1)


def demo(
    overrides: OverridesArgument = None,
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

    def action(progress: "Progress") -> Result:
        from selectune.run import Run

        return Run(recipe, out=Path(recipe.output), progress=progress).all()

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


def _verdict(out: Path, found: "Verification") -> tuple[str, ...]:
    if found.ok:
        return (f"{out}: every file is what its manifest says",)
    return (f"{out}: {len(found.problems)} problems", *(f"  {p}" for p in found.problems))


def _keys() -> Listing:
    from selectune.recipe import describe

    rows = describe()
    names = ("key", "type", "default", "description")
    text = [line for row in rows for line in (f"{row[0]}: {row[1]}; {row[2]}", f"    {row[3]}")]
    return Listing({"keys": [dict(zip(names, row, strict=True)) for row in rows]}, tuple(text))


_FAMILIES: "tuple[tuple[Family, str], ...]" = (
    ("data_scorer", "score.method"),
    ("selection_rule", "select.rule"),
)


def _methods() -> Listing:
    from selectune import registry

    data: dict[str, Any] = {}
    text: list[str] = []
    for family, key in _FAMILIES:
        entries = registry.methods(family)
        data[family] = [_facts(entry) for entry in entries]
        width = max((len(entry.name) for entry in entries), default=0)
        text.append(f"{family.replace('_', ' ')}s ({key})")
        for entry in entries:
            needs = f"  [{', '.join(sorted(entry.needs))}]" if entry.needs else ""
            text.append(f"  {entry.name:<{width}}  {entry.summary}{needs}")
        text.append("")
    text.append("[...] says what a method needs beside the tokens.")
    text.append("`selectune methods NAME` tells options, cost and when it disappoints.")
    return Listing(data, tuple(text))


def _method(name: str) -> Listing:
    from selectune import registry

    known = {e.name: e for family, _ in _FAMILIES for e in registry.methods(family)}
    if name not in known:
        raise ConfigError(
            f'"{name}" is no method',
            where="command line",
            why=f"known are: {', '.join(known)}",
            do=nearest(name, known),
        )
    entry = known[name]
    facts = _facts(entry)
    text = [f"{entry.name}: {entry.summary}"]
    text += [f"  {key + ':':<7} {facts[key]}" for key in ("paper", "cost", "fails") if facts[key]]
    text.append("  options:" if facts["options"] else "  options: none")
    for option in facts["options"]:
        text.append(f"    {option['key']}: {option['type']}; {option['default']}")
        if option["description"]:
            text.append(f"        {option['description']}")
    return Listing(facts, tuple(text))


def _facts(entry: "Entry") -> dict[str, Any]:
    from selectune.recipe_words import option_rows

    names = ("key", "type", "default", "description")
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": entry.summary,
        "needs": sorted(entry.needs),
        "paper": entry.paper,
        "cost": entry.cost,
        "fails": entry.fails,
        "options": [dict(zip(names, row, strict=True)) for row in option_rows(entry.options)],
    }
