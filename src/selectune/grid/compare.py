"""A grid of runs, one table: methods x target tasks x seeds, base and random always beside.

What cells have in common is done once, by `selectune.grid.grid`, and by several processes where a
launcher starts them (`selectune.grid.together`). The same command again goes on where it stopped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from selectune.errors import SelectuneError
from selectune.evaluation import Evaluation
from selectune.files import KillPoint, kill_point, lock, sweep, write_file
from selectune.grid.cells import cell_name
from selectune.grid.grid import UNMADE, Grid
from selectune.grid.story import write_page
from selectune.grid.table import Cell, ComparisonTable, make_rows
from selectune.pipeline.ground import digest
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.record import Record
from selectune.progress import Progress
from selectune.recipe import Recipe

_OTHERS_NAMED = 5


def plan_grid(recipe: Recipe, *, out: Path, progress: Progress) -> Outcome:
    """Say what a grid would train, ask and cost; nothing is written.

    Args:
        recipe: with a `matrix` section.
        out: folder of the grid.
        progress: told of every long step.

    Raises:
        SelectuneError: as `compare`, before anything is trained.
    """
    grid = Grid(recipe, out, progress)
    grid.refuse_unworkable()
    return grid.forecast()


def compare(
    recipe: Recipe,
    *,
    out: Path,
    progress: Progress,
    allow: Sequence[str] = (),
    tell: Callable[[str], None] | None = None,
    launch: str = "",
) -> ComparisonTable:
    """Run or resume a grid, and write its table.

    Args:
        recipe: with a `matrix` section.
        out: folder of the grid.
        progress: told of every long step.
        allow: recipe keys or sections that may differ from what the folder was made with, beside
            `matrix`, "data" (the files too), "precision", "libraries"; what depends on them is made
            anew.
        tell: told the forecast, line by line; None for `progress`.
        launch: whose processes have shared the work (`share_grid`) and may not have left yet.

    Raises:
        ConfigError: the recipe has no matrix, or a task has no held-out examples.
        IncompatibleRunError: the folder holds a grid of another recipe, or of other data.
    """
    with lock(out, waits=bool(launch), launch=launch):
        sweep(out)
        grid = Grid(recipe, out, progress)
        record = Record(out, grid.recipe, allow=("matrix", *allow), inputs=grid.inputs)
        grid.refuse_unworkable()
        if not launch:
            for line in grid.forecast().lines():
                (tell or progress.note)(line)
        bases = grid.bases()
        cells: dict[tuple[str, str, int], Cell] = {}
        unmade: dict[str, SelectuneError] = {}
        for seed in grid.matrix.seeds:
            for tasks, method in grid.rows:
                try:
                    made = grid.cells(method, tasks, seed)
                except UNMADE as error:
                    unmade[cell_name(method.name, tasks, seed)] = error
                    continue
                for task, cell in made.items():
                    cells[task, method.name, seed] = cell
                    progress.note(_progress_line(cells, task, method.name, seed, bases[task]))
            grid.release(seed)
        _refuse_gaps(unmade, len(grid.rows) * len(grid.matrix.seeds))
        costs = grid.costs
        rows = make_rows(
            cells,
            bases,
            references=grid.references,
            seeds=grid.matrix.seeds,
            n_boot=grid.recipe.evaluate.intervals,
        )
        table = ComparisonTable(
            rows,
            out,
            costs,
            grid.tried,
            grid.transfer_table(bases),
            grid.text_table(),
            grid.fast,
            grid.emulators.tables(
                grid.methods, cells, bases, n_boot=grid.recipe.evaluate.intervals
            ),
            grid.emulators.facts(grid.methods),
        )
        write_file(out / "table.json", json.dumps(table.to_json(), indent=1).encode())
        write_file(out / "table.csv", table.to_csv().encode())
        write_file(out / "table.md", ("\n".join(table.tables()) + "\n").encode())
        page = write_page(table, grid.matrix.seeds)
        grid.emulators.write_page(grid.methods, table.offsite)
        kill_point(KillPoint.REPORT_DONE)
        files = ["table.json", "table.csv", "table.md", page.name]
        made = digest({"rows": [row.to_json() for row in table.rows]})
        record.write("compare", made, cost={}, files=files, facts={"costs": costs})
        return table


def _refuse_gaps(unmade: Mapping[str, SelectuneError], n_asked: int) -> None:
    """Refuse a table of which cells are missing, once all others are made."""
    if not unmade:
        return
    (name, first), *others = unmade.items()
    where = f"{name}: {first.where}"
    if others:
        told = ", ".join(f'"{other}"' for other, _ in others[:_OTHERS_NAMED])
        more = f" and {len(others) - _OTHERS_NAMED} more" if len(others) > _OTHERS_NAMED else ""
        where += f"; so with {len(others)} others: {told}{more}"
    raise type(first)(
        f"{len(unmade)} of {n_asked} cells cannot be made, so there is no table: {first.what}",
        where=where,
        why=first.why,
        do=f"{first.do}; or take the row out of the matrix. All other cells are kept: the same "
        "command finds them",
    ) from first


def _progress_line(
    cells: Mapping[tuple[str, str, int], Cell], task: str, name: str, seed: int, base: Evaluation
) -> str:
    cell = cells[task, name, seed]
    return (
        f"{task} {name} seed {seed}: answer loss {cell.answers.answer_loss:.3f} "
        f"(base {base.answer_loss:.3f})"
    )
