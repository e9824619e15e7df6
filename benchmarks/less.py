"""What does LESS's pass over the pool cost beside the forward and backward passes it cannot spare?

The demo's model and pool, LoRA r 8, one checkpoint, pool gradients as steps of Adam. All arms read
the same examples at one token budget, in turns in one process; ratios are medians over neighbours:

    plain              forward and backward of the example losses, nothing kept
    none               the pass in the space of all trainable numbers
    hadamard:8192      the pass with a structured projection; goal 1.25 times plain
    rademacher:8192    the pass with LESS's own dense one; goal 2 times plain

Beside each projection stands how far its cosines are from the unprojected ones. With --bergson,
bergson 2.5.1 projects plain gradients of the same examples to 8192 numbers (`projection_target`
"global"), beside ours with rademacher:8192 and without Adam; see peers.py for its environment.

    python benchmarks/less.py [--quick] [--dtypes float32 bfloat16] [--bergson]
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Stopwatch, look_trained, ratio
from peers import bergson_python, call, make_ground
from torch import nn
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
from selectune.gradients.adam import AdamSteps, Moments
from selectune.gradients.engine import GradientEngine, example_loss
from selectune.gradients.projection import Projection
from selectune.gradients.store import GradientStore, StoredPool, Target
from selectune.models import Base, load_base
from selectune.pipeline.ranks import rank_correlation
from selectune.recipe import AdapterSection, ModelSection

DIM = 8192
STRUCTURED, DENSE = f"hadamard:{DIM}", f"rademacher:{DIM}"
GOALS = {STRUCTURED: 1.25, DENSE: 2.0}
PEER = "rademacher, no Adam"
BUDGET = 1024  # score.token_budget


class Bench:
    """The model, the data and what Adam holds, for one dtype.

    Args:
        dtype: of the base.
        n_pool: pool examples.
        n_targets: target examples.
    """

    def __init__(self, dtype: str, n_pool: int, n_targets: int) -> None:
        assets, section = demo_assets(), AdapterSection()
        model = ModelSection(base=str(assets.model), dtype=dtype)  # pyright: ignore[reportArgumentType]
        self.base: Base = load_base(model, adapter=section)
        adapted = add_adapter(self.base.model, section, seed=0)
        look_trained(adapted)
        self.engine = GradientEngine(adapted, precision=self.base.precision)
        rows = list(read_examples(str(assets.pool)))
        some = rows[:: max(1, len(rows) // n_pool)][:n_pool]  # every source of the pool
        self.pool: list[Tokens] = list(tokenize(some, self.base.tokenizer, max_length=512))
        file = next(iter(assets.targets.values()))
        aims = tokenize(list(read_examples(str(file)))[:n_targets], self.base.tokenizer,
                        max_length=512)  # fmt: skip
        self.targets = [Target(t, "task", "") for t in aims]
        self.moments = self._after(self.pool[:: max(1, len(self.pool) // 32)])

    def _after(self, items: Sequence[Tokens]) -> dict[str, Moments]:
        """Return Adam's moments after steps on some examples, with the weights left as they are."""
        kept = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self._parameters.items()}
        groups = [items[k : k + 8] for k in range(0, len(items), 8)]
        for group in groups:
            batch = collate(group, pad_id=self.base.pad_id, device=self.base.device)
            example_loss(self.engine.model, batch, self.base.precision).mean().backward()
            for name, (m, v) in kept.items():
                grad = self._parameters[name].grad
                assert grad is not None
                m.lerp_(grad, 0.1)
                v.lerp_(grad.square(), 0.001)
            self.engine.model.zero_grad()
        return {name: Moments(m, v, len(groups)) for name, (m, v) in kept.items()}

    @property
    def _parameters(self) -> Mapping[str, nn.Parameter]:
        return self.engine.parameters

    def plain(self) -> float:
        """Return the seconds of plain forward and backward passes."""
        start = time.perf_counter()
        lengths = [len(t.input_ids) for t in self.pool]
        for rows in length_sorted_batches(lengths, token_budget=BUDGET):
            items = [self.pool[k] for k in rows]
            batch = collate(items, pad_id=self.base.pad_id, device=self.base.device)
            losses = example_loss(self.engine.model, batch, self.base.precision)
            losses.sum().backward()
            losses.tolist()  # waits for an accelerator
            self.engine.model.zero_grad()
        return time.perf_counter() - start

    def scored(self, projection: str, *, adam: bool = True) -> tuple[float, StoredPool]:
        """Return the seconds of the pool pass, the targets' part left out, and what it found."""
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            found = GradientStore(Path(folder) / "store", {"arm": projection}).compute(
                self.engine,
                self.pool,
                self.targets,
                pad_id=self.base.pad_id,
                token_budget=BUDGET,
                shard_examples=256,
                progress=watch,
                adam=AdamSteps(self.moments, "release") if adam else None,
                projection=Projection.of(projection, 0, self.base.precision),
            )
            return time.perf_counter() - watch.began["pool gradients"], found


def measure(dtype: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run all arms of one dtype in turns, print their table, return its numbers."""
    bench = Bench(dtype, arguments.examples, arguments.targets)
    arms = ("none", STRUCTURED, DENSE, *([PEER] if arguments.bergson else []))
    times: dict[str, list[float]] = {arm: [] for arm in ("plain", *arms)}
    found: dict[str, StoredPool] = {}
    bench.plain()  # first touch of the weights
    for turn in range(arguments.rounds):
        times["plain"].append(bench.plain())
        for arm in arms:
            how = DENSE if arm == PEER else arm
            seconds, found[arm] = bench.scored(how, adam=arm != PEER)
            times[arm].append(seconds)
        told = ", ".join(f"{arm} {seconds[-1]:.1f} s" for arm, seconds in times.items())
        print(f"{dtype}, round {turn + 1}: {told}", file=sys.stderr)
    exact = found["none"].facts.cosines
    n = len(bench.pool)
    numbers: dict[str, float] = {}
    print(f"{dtype:<18} examples/s  to plain  goal  cosine error: std    max  Spearman of means")
    for arm, seconds in times.items():
        cost = ratio(seconds, times["plain"])
        line = f"{arm:<18} {n / statistics.median(seconds):>10.2f} {cost:>9.3f}"
        line += f" {GOALS.get(arm, ''):>5}"
        if arm in GOALS:
            cosines = found[arm].facts.cosines
            error = cosines - exact
            alike = rank_correlation(cosines.mean(1), exact.mean(1))
            line += f" {error.std():>18.4f} {np.abs(error).max():>6.4f} {alike:>9.3f}"
            numbers[f"error_{arm}_{dtype}"] = round(float(error.std()), 5)
            numbers[f"spearman_{arm}_{dtype}"] = round(alike, 4)
        numbers[f"time_{arm}_{dtype}"] = cost
        print(line)
    numbers[f"examples_per_second_plain_{dtype}"] = round(n / statistics.median(times["plain"]), 2)
    if arguments.bergson:
        rate = beside_bergson(dtype, arguments)
        ours = n / statistics.median(times[PEER])
        print(f"bergson, global    {rate:>10.2f} examples/s; ours {ours / rate:.2f} times as fast")
        numbers[f"ours_to_bergson_{dtype}"] = round(ours / rate, 3)
    return numbers


def beside_bergson(dtype: str, arguments: argparse.Namespace) -> float:
    """Return how many examples a second bergson projects to as many numbers."""
    python = arguments.bergson_python or bergson_python()
    with tempfile.TemporaryDirectory(prefix="selectune-less-") as name:
        folder = Path(name)
        model = make_ground(folder, arguments.examples, 1)
        to = ("--projection", str(DIM))
        runs: list[dict[str, Any]] = [
            call("bergson", folder, model, dtype, [BUDGET], python, *to)
            for _ in range(arguments.rounds)
        ]
    return statistics.median(run["examples_per_second"] for run in runs)


def main() -> None:
    """Measure every dtype, and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="64 examples, one round, bfloat16")
    parser.add_argument("--examples", type=int, help="pool examples (256; quick: 64)")
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--rounds", type=int, help="rounds of all arms (5; quick: 1)")
    parser.add_argument("--dtypes", nargs="+", help="(bfloat16 float32; quick: bfloat16)")
    parser.add_argument("--threads", type=int, help="of torch; its own choice")
    parser.add_argument("--bergson", action="store_true", help="measure bergson too")
    parser.add_argument("--bergson-python", type=Path, help="an environment that you made")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quick = arguments.quick
    arguments.examples = arguments.examples or (64 if quick else 256)
    arguments.rounds = arguments.rounds or (1 if quick else 5)
    arguments.dtypes = arguments.dtypes or (["bfloat16"] if quick else ["bfloat16", "float32"])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"{arguments.examples} examples, {arguments.targets} targets, {arguments.rounds} rounds, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    numbers: dict[str, float] = {}
    for dtype in arguments.dtypes:
        numbers |= measure(dtype, arguments)
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "less", "examples": arguments.examples, **facts, **numbers}))


if __name__ == "__main__":
    main()
