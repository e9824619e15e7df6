"""How near is scoring a pool to the forward and backward passes that it cannot do without?

The demo's model and pool, LoRA r 8 on q, k, v, o. Three arms, interleaved, each in a process of its
own so that peak memory is its own too:

    bare     forward and backward of the example losses, the head at target positions, nothing kept
    m64      the whole scoring pass with 64 targets: tokens in, dot products and norms on disk
    m128     the same with 128 targets

Bare runs at the fastest of several token budgets, the passes at the recipe's default. The targets'
own gradients are left out of the clock: they are made once, whatever the size of the pool.

    python benchmarks/scoring.py [--quick]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Stopwatch, look_trained
from transformers.utils import logging as transformers_logging

from selectune.adapters import add_adapter
from selectune.data import (
    Tokens,
    collate,
    demo_assets,
    length_sorted_batches,
    read_examples,
    tokenize,
)
from selectune.gradients.engine import GradientEngine, example_loss
from selectune.gradients.store import GradientStore, Target
from selectune.models import Base, load_base
from selectune.pipeline.measure import Measured
from selectune.recipe import AdapterSection, ModelSection

ARMS = {"bare": 0, "m64": 64, "m128": 128}
BUDGET = 1024  # score.token_budget
BUDGETS = (1024, 2048, 4096)


def bare(base: Base, engine: GradientEngine, items: Sequence[Tokens], budget: int) -> float:
    """Return the seconds of plain forward and backward passes."""
    start = time.perf_counter()
    for rows in length_sorted_batches([len(t.input_ids) for t in items], token_budget=budget):
        batch = collate([items[k] for k in rows], pad_id=base.pad_id, device=base.device)
        example_loss(engine.model, batch, base.precision).sum().backward()
        engine.model.zero_grad()
    return time.perf_counter() - start


def measure(arm: str, dtype: str, n_pool: int) -> dict[str, Any]:
    """Run one arm in this process."""
    assets, section = demo_assets(), AdapterSection()
    base = load_base(ModelSection(base=str(assets.model), dtype=dtype), adapter=section)
    model = add_adapter(base.model, section, seed=0)
    look_trained(model)
    rows = list(read_examples(str(assets.pool)))
    pool = list(tokenize(rows[:: max(1, len(rows) // n_pool)][:n_pool], base.tokenizer,
                         max_length=512))  # fmt: skip
    goals = [e for file in assets.targets.values() for e in read_examples(str(file))]
    aims = tokenize(goals[: ARMS[arm]], base.tokenizer, max_length=512)
    engine = GradientEngine(model, precision=base.precision)
    probe = pool[:: max(1, len(pool) // 24)]
    bare(base, engine, probe, BUDGET)  # first touch of the weights
    if arm == "bare":
        best = min(BUDGETS, key=lambda budget: bare(base, engine, probe, budget))
        with Measured() as measured:
            seconds = bare(base, engine, pool, best)
    else:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder, Measured() as measured:
            GradientStore(Path(folder) / "store", {"arm": arm}).compute(
                engine,
                pool,
                [Target(t, "task", "") for t in aims],
                pad_id=base.pad_id,
                token_budget=BUDGET,
                shard_examples=256,
                progress=watch,
            )
            seconds = time.perf_counter() - watch.began["pool gradients"]
    cuda = torch.cuda.is_available()
    peak = measured.device_peak_bytes if cuda else measured.peak_bytes
    return {"examples_per_second": len(pool) / seconds, "peak_bytes": peak}


def main() -> None:
    """Run all arms in turns, and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 examples, one round, bf16")
    parser.add_argument("--examples", type=int, help="pool examples (300; quick: 60)")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    n_pool = arguments.examples or (60 if arguments.quick else 300)
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.dtype, n_pool)))
        return
    ratios: dict[str, float] = {}
    for dtype in ("bfloat16",) if arguments.quick else ("bfloat16", "float32"):
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(1 if arguments.quick else 3):
            for arm in ARMS:
                words = [sys.executable, __file__, "--arm", arm, "--dtype", dtype]
                words += ["--examples", str(n_pool)]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
        rate = {a: statistics.median(r["examples_per_second"] for r in v) for a, v in found.items()}
        peak = {a: statistics.median(r["peak_bytes"] for r in v) for a, v in found.items()}
        for arm in ARMS:
            print(f"{dtype} {arm:<5} {rate[arm]:6.2f} examples/s  peak {peak[arm] / 1e9:.2f} GB")
        ratios[f"pass_to_bare_{dtype}"] = round(rate["m64"] / rate["bare"], 3)
        ratios[f"time_m128_to_m64_{dtype}"] = round(rate["m64"] / rate["m128"], 3)
        ratios[f"peak_m128_to_m64_{dtype}"] = round(peak["m128"] / peak["m64"], 3)
        ratios[f"peak_m64_to_bare_{dtype}"] = round(peak["m64"] / peak["bare"], 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "scoring", "examples": n_pool, **facts, **ratios}))


if __name__ == "__main__":
    main()
