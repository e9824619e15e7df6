"""How soon does a stored pool answer another question, and what do further scorers cost?

Two parts:

    rescore    100,000 examples and 64 targets in a store as `selectune score` writes it, ranked by
               GIST anew for another grouping of the targets; goal 2 seconds, disk reads and
               checksums included
    scorers    gist, grad_cosine, tracin, less and rds for one comparison of the demo's model and
               pool, beside less alone, the dearest of them, which reads a checkpoint after each
               epoch of its warm-up; goal 1.3 times its time. The warm-up that they share is left
               out of the clock.

    python benchmarks/rescore.py [--quick] [--parts rescore scorers] [--epochs 4]
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from _common import ratio
from transformers.utils import logging as transformers_logging

import selectune
from selectune.data import Batch
from selectune.files import staged
from selectune.gradients.engine import GradientEngine
from selectune.pipeline.ground import Ground
from selectune.pipeline.scoring import score_pool
from selectune.pipeline.warmup import warm_up
from selectune.progress import Silent
from selectune.recipe import load_recipe
from selectune.recipes import demo_recipe

SHARD = 256  # score.shard_examples
SCORERS = ("gist", "grad_cosine", "tracin", "less", "rds")
DEAREST = "less"
GOALS = {"rescore_seconds": 2.0, "five_to_dearest": 1.3}


def write_store(path: Path, n: int, m: int) -> None:
    """Write a finished pass over n examples and m targets, of 32 directions and some noise."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(32, 256)).astype(np.float32)
    goals = rng.normal(size=(m, 32)).astype(np.float32) @ basis
    goals += rng.normal(size=goals.shape).astype(np.float32)
    meta = {"identity": {"synthetic": [n, m]}}
    loss = [1.0] * m
    targets = [f"target-{j}" for j in range(m)]
    table = pa.table(
        {"id": targets, "task": ["task"] * m, "group": [""] * m, "loss": loss,
         "n_target_tokens": [5] * m}
    )  # fmt: skip
    with staged(path / "targets", kind="targets", meta={**meta, "directions": ""}) as stage:
        stage.write_table("targets.parquet", table)
        stage.write_tensors("gram.safetensors", {"gram": goals.astype(np.float64) @ goals.T})
    ids: list[str] = []
    for k, first in enumerate(range(0, n, SHARD)):
        size = min(SHARD, n - first)
        own = rng.normal(size=(size, 32)).astype(np.float32) @ basis
        own += 3 * rng.normal(size=own.shape).astype(np.float32)
        names = [f"{first + i:016x}-0" for i in range(size)]
        columns: dict[str, Any] = {
            "id": names,
            "norm": np.linalg.norm(own, axis=1),
            "loss": [1.0] * size,
            "n_target_tokens": [5] * size,
        }
        with staged(path / f"shard-{k:05d}", kind="shard", meta=meta) as stage:
            stage.write_table("examples.parquet", pa.table(columns))
            stage.write_tensors("dots.safetensors", {"dots": own @ goals.T})
        ids += names
    ended = {**meta, "n_shards": -(-n // SHARD), "n_examples": n}
    with staged(path / "pool", kind="pool", meta=ended) as stage:
        stage.write_json("ids.json", ids)


def rescored(n: int, n_rounds: int) -> dict[str, float]:
    """Return the median seconds from a stored pool to a ranking, and to a selection."""
    m = 64
    seconds: dict[str, list[float]] = {"score": [], "select": []}
    with tempfile.TemporaryDirectory(prefix="selectune-rescore-") as name:
        path = Path(name) / "store"
        write_store(path, n, m)
        for turn in range(n_rounds):
            groups = {f"target-{j}": f"group {(j + turn) % (turn + 2)}" for j in range(m)}
            start = time.perf_counter()
            scores = selectune.rescore("gist", path, groups=groups, aggregate="max_subtask_mean")
            middle = time.perf_counter()
            picks = selectune.select(scores, budget=0.05)
            seconds["score"].append(middle - start)
            seconds["select"].append(time.perf_counter() - middle)
            assert len(picks) == round(0.05 * n)
    score, select = (statistics.median(column) for column in seconds.values())
    print(
        f"rescore   {n:,} examples, {m} targets: {score:.2f} s, then {select:.2f} s to select 5 %"
    )
    return {"rescore_seconds": round(score, 3), "select_seconds": round(select, 3)}


@contextmanager
def counted() -> Generator[list[int]]:
    """Count the examples whose gradients are taken."""
    seen: list[int] = []
    plain = GradientEngine.run

    def run(engine: GradientEngine, batch: Batch, consume: Any) -> Any:  # noqa: ANN401
        seen.append(len(batch.ids))
        return plain(engine, batch, consume)

    with mock.patch.object(GradientEngine, "run", run):
        yield seen


def scored(methods: Sequence[str], pool: str, epochs: int) -> tuple[float, float]:
    """Return the seconds that scorers take together, and how often the pool was passed over."""
    names = ", ".join(methods)
    changes = [f"data.pool={pool}", f"matrix={{methods: [{names}]}}", "data.heldout=null"]
    # Several steps in an epoch even of a small pool: the first one of a schedule has rate 0.
    changes += [
        f"warmup.schedule_epochs={epochs}",
        f"warmup.epochs={epochs}",
        "warmup.fraction=0.3",
        "tune.batch_size=4",
        "tune.controls=[]",
    ]
    with tempfile.TemporaryDirectory(prefix="selectune-scorers-") as name:
        folder = Path(name)
        recipe = load_recipe(demo_recipe(), changes)
        ground = Ground(
            recipe, folder, shared=folder / "shared", tasks=None, progress=Silent()
        )  # as `compare` makes it
        warm_up(ground, ground.base())
        with counted() as seen:
            start = time.perf_counter()
            for method in methods:
                score_pool(ground, method, {})
            seconds = time.perf_counter() - start
        return seconds, sum(seen) / len(ground.tokens.pool)


def together(pool: str, epochs: int, n_rounds: int) -> dict[str, float]:
    """Return what five scorers cost beside the dearest of them, in time and gradient passes."""
    all_of_them: list[float] = []
    alone: list[float] = []
    passes = (0.0, 0.0)
    for turn in range(n_rounds):
        own, n_own = scored([DEAREST], pool, epochs)
        five, n_five = scored(SCORERS, pool, epochs)
        alone.append(own)
        all_of_them.append(five)
        passes = (n_five, n_own)
        print(f"round {turn + 1}: {DEAREST} {own:.1f} s, five {five:.1f} s", file=sys.stderr)
    cost = ratio(all_of_them, alone)
    print(
        f"scorers   {', '.join(SCORERS)}: {cost:.3f} times {DEAREST} alone; examples' gradients "
        f"{passes[0]:.2f} and {passes[1]:.2f} times the pool, targets included"
    )
    return {
        "five_to_dearest": cost,
        "passes_five": round(passes[0], 3),
        "passes_dearest": round(passes[1], 3),
    }


def main() -> None:
    """Run both parts, and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="10,000 rows, 28 examples, one round")
    parser.add_argument("--parts", nargs="+", default=["rescore", "scorers"])
    parser.add_argument("--rows", type=int, help="stored examples (100,000; quick: 10,000)")
    parser.add_argument("--pool", help="of the scorers (demo:pool/30; quick: demo:pool/4)")
    parser.add_argument("--epochs", type=int, help="of the warm-up (4, as LESS; quick: 1)")
    parser.add_argument("--rounds", type=int, help="rounds of each part (5; quick: 1)")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quick: bool = arguments.quick
    rounds = arguments.rounds or (1 if quick else 5)
    n_rows = arguments.rows or (10_000 if quick else 100_000)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{device}, {facts['threads']} threads, torch {torch.__version__}, {rounds} rounds")
    found: dict[str, float] = {}
    if "rescore" in arguments.parts:
        found |= rescored(n_rows, rounds)
    if "scorers" in arguments.parts:
        pool = arguments.pool or ("demo:pool/4" if quick else "demo:pool/30")
        epochs = arguments.epochs or (1 if quick else 4)
        found |= together(pool, epochs, rounds)
        found["epochs"] = epochs
    print(json.dumps({"benchmark": "rescore", **facts, "rows": n_rows, **found, "goals": GOALS}))


if __name__ == "__main__":
    main()
