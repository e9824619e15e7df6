"""The single files of a run that people open: scores, what was chosen, losses by step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selectune.errors import CorruptFileError
from selectune.files import write_file, write_parquet
from selectune.interchange.scores import MEANING
from selectune.pipeline.arms import TunedArm
from selectune.pipeline.ground import Ground
from selectune.selection import Scores, Selection

SCORES = "scores.parquet"
CHOSEN = ("selected.jsonl", "selected.parquet")
METRICS = "metrics.jsonl"


def read_own_scores(path: Path) -> Scores:
    """Return the scores that a run wrote, checked already against run.json.

    Raises:
        CorruptFileError: they cannot be read.
    """
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
        meaning = json.loads(table.schema.metadata[MEANING])
        return Scores.from_table(table, meaning["method"], meaning["about"])
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(
            "the scores cannot be read", where=str(path), why=str(error), do="score again"
        ) from error


def write_chosen(out: Path, ground: Ground, scores: Scores, selection: Selection) -> None:
    """Write the chosen rows, best first, each with what it was chosen by.

    Args:
        out: the run's folder.
        ground: of the run.
        scores: of all candidates.
        selection: what was chosen by them.
    """
    place = {i: n for n, i in enumerate(scores.ids)}
    rows: list[dict[str, Any]] = []
    for example in ground.prepared.chosen(selection):
        n = place[example.id]
        rows.append(
            {
                "id": example.id,
                "rank": len(rows) + 1,
                "score": float(scores.score[n]),
                "source": example.source,
                "best_target": scores.best_target[n] if scores.best_target else None,
                "reason": selection.reasons.get(example.id, ""),
            }
        )
    chosen = ground.prepared.chosen(selection)
    lines = [
        json.dumps({**example.extra, "selectune": row}, ensure_ascii=False, default=str)
        for example, row in zip(chosen, rows, strict=True)
    ]
    # A column that nothing reads may hold half a character.
    write_file(out / CHOSEN[0], ("\n".join(lines) + "\n").encode(errors="replace"))
    contents = [json.dumps(dict(e.content), ensure_ascii=False) for e in chosen]
    table = pa.Table.from_pylist(rows).append_column("content", pa.array(contents, pa.string()))
    write_parquet(out / CHOSEN[1], table)


def count_sources(ground: Ground, selection: Selection) -> dict[str, int]:
    """Return how many chosen examples each source has, the largest first."""
    counts: dict[str, int] = {}
    for example_id in selection.ids:
        source = ground.prepared.sources[example_id]
        counts[source] = counts.get(source, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write_metrics(out: Path, arms: Sequence[TunedArm]) -> None:
    """Write one line per arm and step: its loss, and what the training method did in it."""
    lines = [line for arm in arms for line in _metrics(arm)]
    write_file(out / METRICS, ("\n".join(lines) + "\n").encode())


def _metrics(arm: TunedArm) -> list[str]:
    facts = dict(arm.result.records)
    return [
        json.dumps({"arm": arm.name, "step": step, "loss": loss, **facts.get(step, {})})
        for step, loss in arm.result.losses
    ]
