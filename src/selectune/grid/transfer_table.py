"""The second table of a comparison by transfer: what tuning on one task did to the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectune.evaluation import (
    Estimate,
    Evaluation,
    Generation,
    Transfer,
    compare_transfer,
    round_robin,
    transfer,
)
from selectune.evaluation.transfer import Metric, RoundRobin, Scoring, right_answers
from selectune.tables import aligned, signed

# By method, task trained on, task tested on and seed.
Answers = Mapping[tuple[str, str, str, int], Evaluation | Generation]
_METRICS: dict[Metric, str] = {
    "id_accuracy": "own task",
    "ood_accuracy": "other tasks",
    "ood_gain": "gain on others",
    "forget_ratio": "forget ratio",
    "collapse_percent": "collapse %",
}


@dataclass(frozen=True, slots=True)
class TransferRow:
    """One method under one scoring.

    Args:
        method: its name in the table.
        found: the metrics of its round-robin, with intervals.
        vs_random: the same less those of random; None for random itself.
    """

    method: str
    found: Transfer
    vs_random: Mapping[Metric, Estimate | None] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        differences = self.vs_random or {}
        return {
            "method": self.method,
            **self.found.to_json(),
            "vs_random": {k: None if v is None else v.to_json() for k, v in differences.items()},
        }


def transfer_rows(
    answers: Answers,
    bases: Mapping[str, Evaluation | Generation],
    *,
    scoring: Scoring,
    methods: Sequence[str],
    seeds: Sequence[int],
    references: Mapping[str, str],
    n_boot: int,
) -> list[TransferRow]:
    """Return the rows of the table, in the order of the methods.

    Args:
        answers: of every model on every task.
        bases: of the untouched base, by task.
        scoring: how answers were judged.
        methods: in the table's order.
        seeds: of the models.
        references: the method that each is compared with; itself for none.
        n_boot: draws behind an interval.

    Raises:
        DataError: fewer than two tasks, or models that did not answer the same questions.
    """
    untouched = {task: right_answers(found) for task, found in bases.items()}

    def rounds(method: str) -> RoundRobin:
        tuned = {
            (r, m): [right_answers(answers[method, r, m, seed]) for seed in seeds]
            for r in bases
            for m in bases
        }
        return round_robin(tuned, untouched, scoring=scoring)

    made = {method: rounds(method) for method in methods}
    return [
        TransferRow(
            method,
            transfer(found, n_boot=n_boot),
            None
            if method == references[method]
            else compare_transfer(found, made[references[method]], n_boot=n_boot),
        )
        for method, found in made.items()
    ]


def transfer_lines(rows: Sequence[TransferRow]) -> list[str]:
    """Return the rows as a Markdown table, widths aligned."""
    scorings = dict.fromkeys(row.found.scoring for row in rows)
    lines: list[str] = []
    for scoring in scorings:
        mine = [row for row in rows if row.found.scoring == scoring]
        shown: list[Metric] = [m for m in _METRICS if any(m in row.found.estimates for row in mine)]
        head = ["answers", "method", *(_METRICS[m] for m in shown), "others - random [95 %]"]
        base = mine[0].found.base
        mean = sum(base.values()) / len(base)
        body = [[scoring, "base", f"{mean:.3f}", f"{mean:.3f}", *("-" for _ in shown[2:]), "-"]]
        for row in mine:
            cells = [_told(row.found.estimates.get(m), m) for m in shown]
            away = None if row.vs_random is None else row.vs_random.get("ood_accuracy")
            body.append([scoring, row.method, *cells, _interval(away)])
        lines += [*aligned(head, body), ""]
    return lines[:-1]


def _told(found: Estimate | None, metric: Metric) -> str:
    if found is None:
        return "-"
    return f"{found.value:.1f}" if metric == "collapse_percent" else f"{found.value:.3f}"


def _interval(found: Estimate | None) -> str:
    return "-" if found is None else signed(found.value, found.low, found.high)
