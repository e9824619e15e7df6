"""The table of offsite tuning: means, differences paired by example and seed, and what it shows."""

import csv
import io

import numpy as np
import pyarrow as pa
import pytest

from selectune.errors import DataError
from selectune.evaluation import Evaluation, compare_seeds, together
from selectune.evaluation.options import COLUMNS
from selectune.offsite.table import Offsite, offsite_table

TASKS = ("piqa", "siqa")


def answers(seed: int, share: float, n: int = 40) -> dict[str, Evaluation]:
    """Return made-up answers of which about a share is right."""
    found: dict[str, Evaluation] = {}
    for k, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, k])
        rows = [
            {
                "id": f"q{i}",
                "source": task,
                "answer_loss": float(rng.random()) - share,
                "n_target_tokens": 2,
                "correct_raw": bool(rng.random() < share),
                "correct_norm": bool(rng.random() < share),
                "chosen": 0,
            }
            for i in range(n)
        ]
        found[task] = Evaluation(
            pa.Table.from_pylist(rows, schema=pa.schema(list(COLUMNS.items())))
        )
    return found


ZS = answers(0, 0.4)
CELLS = {
    (method, seed): Offsite(
        answers(10 + seed, 0.2), answers(20 + seed, 0.5), answers(30 + seed, 0.6)
    )
    for method in ("gradot", "random")
    for seed in (0, 1)
}
OPEN = {seed: answers(40 + seed, 0.6) for seed in (0, 1)}


def test_differences_are_paired_by_example_and_seed() -> None:
    table = offsite_table(CELLS, ZS, ft_adapter=OPEN, n_boot=200)
    row = table.rows[0]
    assert (row.method, row.task, row.n_seeds) == ("gradot", "all", 2)
    pairs = [
        (together(CELLS["gradot", s].plugged), together(CELLS["gradot", s].tuned)) for s in (0, 1)
    ]
    expected = compare_seeds(pairs, n_boot=200, metric="correct_norm")
    assert row.delta.mean_difference == pytest.approx(100 * expected.mean_difference)
    assert (row.delta.low, row.delta.high) == pytest.approx(
        (100 * expected.low, 100 * expected.high)
    )
    assert row.delta.mean_difference == pytest.approx(row.pi - row.eft)
    assert row.gain.mean_difference == pytest.approx(row.pi - row.zs)
    assert row.lost.mean_difference == pytest.approx(row.pi - row.ft_adapter)
    assert row.ft is None


def test_rows_are_methods_by_tasks_and_all_of_them_first() -> None:
    rows = offsite_table(CELLS, ZS, n_boot=100).rows
    assert [(row.method, row.task) for row in rows] == [
        (method, task) for method in ("gradot", "random") for task in ("all", *TASKS)
    ]
    one = {"piqa": ZS["piqa"]}
    assert [row.task for row in offsite_table(CELLS, one, n_boot=100).rows] == ["piqa", "piqa"]


def test_losses_are_told_in_nats() -> None:
    row = offsite_table(CELLS, ZS, metric="answer_loss", n_boot=100).rows[1]
    losses = [cell.plugged["piqa"].answer_loss for (m, _), cell in CELLS.items() if m == "gradot"]
    assert row.pi == pytest.approx(sum(losses) / 2)


def test_delta_never_stands_alone() -> None:
    table = offsite_table(CELLS, ZS, ft={0: ZS, 1: ZS}, n_boot=100)
    head = table.lines()[0]
    assert all(name in head for name in ("ZS", "FT", "EFT", "PI", "Δ = PI − EFT"))
    [first, *_] = csv.DictReader(io.StringIO(table.to_csv()))
    assert float(first["delta_low"]) <= float(first["delta"]) <= float(first["delta_high"])
    assert first["lost"] == ""
    assert table.to_json()["rows"][0]["delta"]["n_seeds"] == 2


def test_a_seed_without_counterpart_is_refused() -> None:
    with pytest.raises(DataError, match="gradot has the seed 1, and ft has not"):
        offsite_table(CELLS, ZS, ft={0: ZS}, n_boot=100)
    with pytest.raises(DataError, match="nothing to show"):
        offsite_table({}, ZS)
