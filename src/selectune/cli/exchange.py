"""What is handed on: scores to a file that anything reads, a selection in other tools' forms."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from selectune.cli.shell import DebugOption, JsonOption, Result, perform
from selectune.errors import ConfigError, nearest
from selectune.progress import Progress

if TYPE_CHECKING:
    from selectune.selection import Scores

_SCORES, _CONFIG = "scores.parquet", "config.yaml"
_N_SHOWN = 5
Given = TypeVar("Given")


class Similarity(StrEnum):
    """How gradients of an index are compared."""

    cosine = "cosine"
    dot = "dot"


class Aggregate(StrEnum):
    """What becomes of several queries."""

    max = "max"
    mean = "mean"


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(name="scores")(scores)


def scores(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a run or of one cell of a comparison; a .parquet or .jsonl file of "
            "scores; a folder of bergson's.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write .parquet or .jsonl.", show_default=False),
    ] = None,
    column: Annotated[str, typer.Option(help="Of a file: the column that ranks.")] = "score",
    higher: Annotated[
        bool | None,
        typer.Option(
            "--higher-is-better/--lower-is-better",
            help="Which end comes first; the highest, or what bergson recorded.",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="For bergson folders: the data set that bergson read, in its order; ids come from "
            "it.",
            show_default=False,
        ),
    ] = None,
    query: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of an index: bergson's index of the task.", show_default=False
        ),
    ] = None,
    similarity: Annotated[
        Similarity, typer.Option(help="Of an index: cosine, or inner product.")
    ] = Similarity.cosine,
    aggregate: Annotated[
        Aggregate, typer.Option(help="Over bergson's queries: the best, or their mean.")
    ] = Aggregate.max,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show scores that are there, or write them by id."""

    def action(_: Progress) -> Result:
        from selectune.interchange import bergson
        from selectune.selection import Scores

        folder = Path(source)
        if bergson.is_scores(folder):
            found = bergson.bergson_scores(
                folder, _needed(pool, "--pool"), aggregate=aggregate.value, higher_is_better=higher
            )
        elif bergson.is_index(folder):
            found = bergson.bergson_similarity(
                folder,
                _needed(query, "--query"),
                _needed(pool, "--pool"),
                similarity=similarity.value,
                aggregate=aggregate.value,
            )
        else:
            found = Scores.load(_file(source), column=column, higher_is_better=higher is not False)
        return _told(found, source, to)

    perform(action, as_json=as_json, is_quiet=True)


def _needed(value: Given | None, option: str) -> Given:
    if value is None:
        raise ConfigError(
            f"a folder of bergson's needs {option}",
            where=f"command line, {option}",
            why="its rows have no ids, and an index says nothing of the task",
            do="--pool DATA names what bergson read; for an index, --query FOLDER that of the task",
        )
    return value


def selection_for(tool: str, source: str, out: Path, base: str | None) -> Result:
    """Write the selection of a run for another tool; `export` calls it.

    Raises:
        ConfigError: the source is no run, or a base was named.
        DataError: the run has chosen nothing yet.
    """
    from selectune.cli.listing import Listing
    from selectune.interchange.selected import Marks, Tool, read_chosen, write_for
    from selectune.pipeline.prepare import resolve
    from selectune.recipe import load_recipe

    if base is not None:
        raise ConfigError(
            f"--to {tool} takes no base",
            where="command line, --base",
            why="a run knows its model",
            do="leave --base out",
        )
    run = Path(source)
    if not (run / _CONFIG).is_file():
        raise ConfigError(
            f"{source} is no run",
            where="command line, SOURCE",
            why=f"there is no {_CONFIG} in it",
            do="name the folder that `selectune select recipe.yaml` wrote",
        )
    chosen = read_chosen(run)
    model = resolve(load_recipe(run / _CONFIG)).model
    marks = Marks("", "")
    if Tool(tool) is Tool.axolotl:
        from selectune.data.encode import opening_ids
        from selectune.models import load_tokenizer

        tokenizer = load_tokenizer(model)
        opening = str(tokenizer.decode(opening_ids(tokenizer)))
        marks = Marks(opening, str(tokenizer.eos_token or ""))
    names = write_for(Tool(tool), chosen, out, base=model.base, marks=marks)
    settings = "axolotl.yaml" if Tool(tool) is Tool.axolotl else "dataset_info.json"
    return Listing(
        {"folder": str(out), "tool": tool, "n": len(chosen), "files": [*names, settings]},
        (
            f"{out}: {len(chosen):,} chosen rows for {tool}, in {', '.join(names)}",
            f"  {settings} describes them",
        ),
    )


def _file(source: str) -> Path:
    path = Path(source)
    if not path.is_dir():
        return path
    if (path / _SCORES).is_file():
        return path / _SCORES
    from selectune.grid.cells import selected_file  # brings torch

    if (chosen := selected_file(path)) is not None:
        return chosen
    runs = [p.parent.name for p in path.parent.glob(f"*/{_SCORES}")]
    raise ConfigError(
        f"{source} holds no scores",
        where="command line, SOURCE",
        why=f"there is no {_SCORES} in it",
        do=nearest(path.name, runs) if runs else "selectune score recipe.yaml writes them",
    )


def _told(found: "Scores", source: str, to: Path | None) -> Result:
    from selectune.cli.listing import Listing

    if to is not None:
        found.save(to)
    n_pool = found.about.get("chosen_of")  # of a cell of a comparison
    best = found.ranking()[:_N_SHOWN]
    data: dict[str, Any] = {
        "source": source,
        "file": None if to is None else str(to),
        "method": found.method,
        "n": len(found),
        "columns": list(found.columns),
        "best": {example_id: found[example_id] for example_id in best},
    }
    lines = [
        f"{len(found):,} examples"
        + (f" chosen of {n_pool:,}, " if isinstance(n_pool, int) else " ")
        + f"scored by {found.method}",
        f"  columns beside the score: {', '.join(found.columns) or 'none'}",
        "  best: " + ", ".join(f"{i} {score:.4g}" for i, score in data["best"].items()),
    ]
    if to is not None:
        lines.append(f"{to}: a row per example, by id")
    return Listing(data, tuple(lines))
