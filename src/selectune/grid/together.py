"""Several processes at one grid: each takes the next training that nobody has taken.

.claims           who does what at this moment
shared/ended/     trainings that are done, so that nobody looks at them again

What many trainings need is made by whoever comes to it first, while the others wait; gradient
passes are shared shard by shard. Nothing here decides anything: afterwards one process goes over
the grid as if it were alone (`compare`), finds what is done, and makes whatever is not.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from selectune.files import CLAIMS, Crew, share, write_file
from selectune.grid.cells import cell_name
from selectune.grid.grid import UNMADE, Grid, Tasks
from selectune.pipeline.ground import digest
from selectune.pipeline.processes import Part
from selectune.pipeline.record import Record
from selectune.progress import Progress
from selectune.recipe import MatrixMethod, Recipe

ENDED = "ended"


def share_grid(
    recipe: Recipe,
    *,
    out: Path,
    part: Part,
    progress: Progress,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Do one process's part of a grid, beside the others of its launch.

    Returns when nothing is left that nobody has taken; others may still be at work. `compare` waits
    for them, and writes the table.

    Args:
        recipe: with a `matrix` section.
        out: folder of the grid, which all processes see.
        part: which of the processes this is.
        progress: told of every long step.
        tell: told the forecast, line by line; None for `progress`. Only the leader tells it.

    Raises:
        SelectuneError: as `compare`.
        StorageError: another process writes there, or the folder knows no locks.
    """
    with share(out, launch=part.launch) as is_held:
        if not is_held:
            return
        with _crew(out, part) as crew:
            grid = Grid(recipe, out, progress, hands=crew)
            with crew.turn("run", lambda: (out / "run.json").exists()):
                Record(out, grid.recipe, allow=("matrix",), inputs=grid.inputs)
            grid.refuse_unworkable()
            if part.is_leader:
                for line in grid.forecast().lines():
                    (tell or progress.note)(line)
            _Share(grid, crew).work()
    if part.is_leader:
        progress.note("all that is left is taken; the table is made once the others have ended")


@contextmanager
def _crew(out: Path, part: Part) -> Generator[Crew]:
    crew = Crew(
        out / CLAIMS, index=part.index, n=part.n, is_fixed=False, waits=True,
        instead="run `selectune compare RECIPE` in one process, or choose another output",
    )  # fmt: skip
    try:
        yield crew
    finally:
        crew.close()


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one process does.

    Attributes:
        name: tells it from others.
        ended: a file that is there once it is done.
        do: do it.
    """

    name: str
    ended: Path
    do: Callable[[], object]


class _Share:
    """One process's share of a grid.

    Args:
        grid: whose hands are the crew.
        crew: of the processes.
    """

    def __init__(self, grid: Grid, crew: Crew) -> None:
        self._grid, self._crew = grid, crew
        matrix, ground = grid.matrix, grid.ground(grid.matrix.seeds[0])
        self._of_grid = {
            "recipe": grid.recipe.model_dump(mode="json", exclude={"output", "matrix"}),
            "matrix": matrix.model_dump(mode="json", exclude={"methods", "targets", "seeds"}),
            "first_seed": matrix.seeds[0],
            "base": ground.base_fingerprint,
            **grid.inputs,
        }

    def work(self) -> None:
        """Take piece after piece, until all are taken."""
        grid = self._grid
        first = grid.matrix.seeds[0]
        self._take(self._piece("base", {"tasks": grid.tasks}, grid.ask_base))
        grid.gather(first)
        for tasks, method in grid.rows:
            for piece in self._trials(method, tasks):
                self._take(piece)
        for seed in grid.matrix.seeds:
            if seed != first:
                grid.gather(seed)
            for tasks, method in grid.rows:
                self._take(self._cell(method, tasks, seed))
            grid.release(seed)

    def _trials(self, method: MatrixMethod, tasks: Tasks) -> list[_Piece]:
        """Return what chooses a row's setting; nothing where there is none to choose."""
        grid = self._grid
        settings = grid.settings(method)
        facts = {"method": method.model_dump(mode="json"), "tasks": tasks}
        return [
            self._piece(
                f"{method.name} on {', '.join(tasks)} with {setting}",
                {**facts, "setting": setting},
                partial(grid.trial, method, tasks, setting),
            )
            for setting in settings
            if len(settings) > 1
        ]

    def _cell(self, method: MatrixMethod, tasks: Tasks, seed: int) -> _Piece:
        grid = self._grid

        def do() -> None:
            for task, cell in grid.cells(method, tasks, seed).items():
                loss = cell.answers.answer_loss
                grid.progress.note(f"{task} {method.name} seed {seed}: answer loss {loss:.3f}")

        facts = {"method": method.model_dump(mode="json"), "tasks": tasks, "seed": seed}
        name = cell_name(method.name, tasks, seed)
        return self._piece(name, {**facts, "tested": grid.tested(tasks)}, do)

    def _piece(self, name: str, facts: dict[str, object], do: Callable[[], object]) -> _Piece:
        made = digest({**self._of_grid, **facts})[:16]
        return _Piece(name, self._grid.out / "shared" / ENDED / f"{made}.json", do)

    def _take(self, piece: _Piece) -> None:
        """Do a piece, unless it is done or another process is at it."""
        if piece.ended.exists():
            return
        with self._crew.claim(piece.name, 0) as is_ours:
            if is_ours and not piece.ended.exists():
                try:
                    piece.do()
                except UNMADE as error:  # told by who goes over the grid afterwards
                    self._grid.progress.note(f"{piece.name}: {error.what}")
                    return
                write_file(piece.ended, json.dumps({"name": piece.name}).encode())
