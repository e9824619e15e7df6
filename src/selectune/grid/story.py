"""From a comparison's table to what its page shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selectune.evaluation import Interval
from selectune.evaluation.estimate import Estimate
from selectune.grid.cells import CELLS
from selectune.grid.table import ComparisonTable, Row, fast_lines
from selectune.report.grid import write_grid_report
from selectune.report.grid_facts import Ends, GridCell, GridFacts, TextFacts
from selectune.report.weight_facts import TransferFacts


def write_page(table: ComparisonTable, seeds: Sequence[int]) -> Path:
    """Write the page beside a table, and return its path.

    Args:
        table: the finished comparison.
        seeds: of its runs.

    Raises:
        StorageError: it cannot be written.
    """
    return write_grid_report(table.out, grid_facts(table, seeds))


def grid_facts(table: ComparisonTable, seeds: Sequence[int]) -> GridFacts:
    """Return what the page shows, as plain values.

    Args:
        table: the finished comparison.
        seeds: of its runs.
    """
    return GridFacts(
        title=table.out.name,
        seeds=tuple(seeds),
        cells=[_cell(row) for row in table.rows],
        transfers=[TransferFacts.of(row.method, row.to_json()) for row in table.transfers],
        texts=[
            TextFacts(
                method=row.method,
                nats_per_token=row.nats_per_token,
                over_base=_estimated(row.vs_base),
                against_random=_estimated(row.vs_random),
            )
            for row in table.texts
        ],
        tried=[_tried(one) for one in table.tried],
        cells_folder=str(table.out / CELLS),
        notes=fast_lines(table.fast),
        offsite=table.offsite,
    )


def _cell(row: Row) -> GridCell:
    return GridCell(
        task=row.task,
        method=row.method,
        losses=row.per_seed,
        accuracy=row.accuracy,
        against_random=_ends(row.loss_vs_random),
        accuracy_against_random=_ends(row.accuracy_vs_random),
        over_base=_ends(row.loss_vs_base),
        learning_rate=row.learning_rate,
        epochs=row.epochs,
        seconds=row.seconds,
    )


def _tried(one: Mapping[str, Any]) -> tuple[str, str, float, int, float | None]:
    tasks = ", ".join(one["tasks"])
    return (one["method"], tasks, one["learning_rate"], one["epochs"], one["answer_loss"])


def _ends(found: Interval | None) -> Ends | None:
    return None if found is None else found.ends


def _estimated(found: Estimate | None) -> Ends | None:
    return None if found is None else (found.value, found.low, found.high)
