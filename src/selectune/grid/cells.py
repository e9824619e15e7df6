"""One cell of a grid on disk: what it found, and the recipe that makes it anew by itself.

cells/<method>-<task>-seed-<n>/cell.json         numbers, by the task asked about
                               config.yaml       `selectune compare` of it alone, beside random
                               selected.parquet  what it chose, as scores by id
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selectune.errors import ConfigError
from selectune.files import write_file
from selectune.files.disk import remove
from selectune.interchange.scores import write_scores
from selectune.pipeline.scoring import shares_passes
from selectune.recipe import MatrixMethod, Recipe
from selectune.recipe.methods import FULL
from selectune.selection import Scores, Selection

CELLS, SELECTED = "cells", "selected.parquet"
_WHOLE = {"layers": None, "max_length": None, "precision": None, "fast": False}


def cell_name(method: str, tasks: Sequence[str], seed: int) -> str:
    """Return what a cell is called in messages."""
    return f"{method} on {', '.join(tasks)}, seed {seed}"


def cell_folder(out: Path, method: str, tasks: tuple[str, ...], seed: int) -> Path:
    """Return where a cell lies.

    Args:
        out: of the grid.
        method: its name in the table.
        tasks: that it was trained for; those of all are not named.
        seed: of the run.
    """
    parts = [method, *(tasks if len(tasks) == 1 else ()), f"seed-{seed}"]
    return out / CELLS / "-".join(re.sub(r"[^\w.+=-]+", "_", part) for part in parts)


def replay(
    recipe: Recipe,
    folder: Path,
    method: MatrixMethod,
    *,
    tasks: tuple[str, ...],
    tested: Iterable[str],
    seed: int,
    setting: tuple[float, int],
) -> Recipe:
    """Return the grid of one cell alone, with the setting that was chosen for it.

    Data, halves held aside and checks for leaks are those of the whole grid, so that the cell comes
    out with the same bits on the same machine.

    Args:
        recipe: of the grid.
        folder: of the cell.
        method: its row.
        tasks: that it was trained for.
        tested: the tasks that it was asked about.
        seed: of the run.
        setting: learning rate and epochs.
    """
    matrix = recipe.matrix
    assert matrix is not None
    rate, epochs = setting
    tune: dict[str, Any] | None = None
    if matrix.tune is not None:
        tune = {**matrix.tune.model_dump(mode="json"), "learning_rate": [rate], "epochs": [epochs]}
    grid = {
        "methods": [method.model_dump(mode="json")],
        "targets": list(tasks),
        "seeds": [seed],
        "tune": tune,
        "transfer": list(tested) if matrix.transfer else False,
    }
    changes: dict[str, Any] = {"output": str(folder / "replay"), "matrix": grid}
    if method.method == FULL or not shares_passes(method.method):
        # What makes gradient passes cheaper is refused where there are none.
        changes |= {f"score.{key}": value for key, value in _WHOLE.items()}
    return recipe.changed(changes)


def chosen_scores(scores: Scores, selection: Selection) -> Scores:
    """Return the scores of what was chosen alone, in the order of the choice.

    Args:
        scores: of every candidate.
        selection: what was chosen by them.
    """
    place = {example_id: k for k, example_id in enumerate(scores.ids)}
    rows = [place[i] for i in selection.ids]
    best = tuple(scores.best_target[k] for k in rows) if scores.best_target else ()
    about = {"chosen_of": len(scores)}
    return Scores(scores.method, selection.ids, np.asarray(scores.score)[rows], {}, best, about)


def write_cell(
    folder: Path, facts: Mapping[str, Any], recipe: Recipe, chosen: Scores | None
) -> None:
    """Write a cell's numbers, its recipe and what it chose.

    Args:
        folder: of the cell.
        facts: plain values.
        recipe: from `replay`.
        chosen: from `chosen_scores`; None where everything was taken.
    """
    head = f"# One cell of a grid, by itself: selectune compare {folder / 'config.yaml'}\n"
    write_file(folder / "config.yaml", (head + recipe.resolved_yaml()).encode())
    if chosen is None:
        remove(folder / SELECTED)  # of a row that went by another method
    else:
        write_scores(chosen, folder / SELECTED)
    write_file(folder / "cell.json", json.dumps(facts, indent=1).encode())


def selected_file(folder: Path) -> Path | None:
    """Return the file of what a cell chose; None where a folder is no grid's and no cell.

    Raises:
        ConfigError: the folder is a grid of many cells, or a cell that has no such file.
    """
    if (folder / "cell.json").is_file():
        if (folder / SELECTED).is_file():
            return folder / SELECTED
        raise ConfigError(
            f"{folder} does not say what it chose",
            where=f"command line, {folder}",
            why="a cell of `full` takes everything and scores nothing; one that selectune made "
            f"before it kept {SELECTED} has only a digest",
            do=f"selectune compare {folder.parent.parent / 'config.yaml'} writes it for every "
            "other cell, and trains none again",
        )
    cells = sorted((folder / CELLS).glob("*/cell.json"))
    if not cells:
        return None
    known = [path.parent for path in cells if (path.parent / SELECTED).is_file()]
    raise ConfigError(
        f"{folder} is a comparison of {len(cells)} cells",
        where=f"command line, {folder}",
        why=f"each cell chose by itself: {CELLS}/NAME/{SELECTED}",
        do=f"name one, such as selectune scores {(known or [cells[0].parent])[0]}",
    )
