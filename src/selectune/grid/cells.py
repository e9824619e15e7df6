"""One cell of a grid on disk: what it found, and the recipe that makes it anew by itself.

cells/<method>-<task>-seed-<n>/cell.json     numbers, by the task asked about
                               config.yaml   `selectune compare` of this cell alone, beside random
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selectune.files import write_file
from selectune.recipe import MatrixMethod, Recipe

CELLS = "cells"


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
    return recipe.changed({"output": str(folder / "replay"), "matrix": grid})


def write_cell(folder: Path, facts: Mapping[str, Any], recipe: Recipe) -> None:
    """Write a cell's numbers and its recipe.

    Args:
        folder: of the cell.
        facts: plain values.
        recipe: from `replay`.
    """
    head = f"# One cell of a grid, by itself: selectune compare {folder / 'config.yaml'}\n"
    write_file(folder / "config.yaml", (head + recipe.resolved_yaml()).encode())
    write_file(folder / "cell.json", json.dumps(facts, indent=1).encode())
