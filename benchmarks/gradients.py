"""What do gradients per example cost beside a plain backward pass of the same batch?

SmolLM2-135M, LoRA r 8 on q, k, v, o, 8 examples of 128 tokens, every token a target. Both arms run
the same forward pass and loss. `plain` fills `.grad`; `rows` hands every example's dense gradient
of every factor to a consumer that takes its norm. Steps are interleaved, medians printed. Memory
is of a process of its own for each arm, so that neither profits from the other's allocations.

    python benchmarks/gradients.py [--quick]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from _common import look_trained
from transformers.utils import logging as transformers_logging

from selectune.adapters import add_adapter
from selectune.data import Batch, demo_assets
from selectune.gradients.engine import GradientEngine, example_loss
from selectune.gradients.kernels import Rows
from selectune.models import load_base
from selectune.pipeline.measure import Measured
from selectune.recipe import AdapterSection, ModelSection

N, T = 8, 128


def build(dtype: str) -> tuple[GradientEngine, Batch]:
    """Return the engine on the demo's model with trained-looking factors, and one batch."""
    section = AdapterSection()
    base = load_base(ModelSection(base=str(demo_assets().model), dtype=dtype), adapter=section)
    model = add_adapter(base.model, section, seed=0)
    look_trained(model)
    ids = torch.randint(3, 49_000, (N, T), device=base.device)
    names = tuple(f"e{k}" for k in range(N))
    return GradientEngine(model, precision=dtype), Batch(names, ids, torch.ones_like(ids), ids)


def steps(engine: GradientEngine, batch: Batch) -> dict[str, Callable[[], object]]:
    """Return one step of each arm."""
    engine.probe(batch)
    norms: dict[str, torch.Tensor] = {}

    def consume(name: str, rows: Rows) -> None:
        norms[name] = rows.dense().flatten(1).square().sum(1)

    def plain() -> None:
        example_loss(engine.model, batch, engine.precision).sum().backward()
        engine.model.zero_grad()

    return {"plain": plain, "rows": lambda: engine.run(batch, consume)}


def peak(arm: str, dtype: str) -> int:
    """Return the peak resident bytes of one arm in a process of its own."""
    words = [sys.executable, __file__, "--arm", arm, "--dtype", dtype]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Measure time in turns, then memory, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 steps instead of 7")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.arm:
        run = steps(*build(arguments.dtype))[arguments.arm]
        with Measured() as measured:
            for _ in range(2):
                run()
        cuda = torch.cuda.is_available()
        print(measured.device_peak_bytes if cuda else measured.peak_bytes)
        return
    ratios: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        arms = steps(*build(dtype))
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for run in arms.values():
            run()
        for _ in range(3 if arguments.quick else 7):
            for name, run in arms.items():
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
        plain, rows = (statistics.median(seconds[name]) for name in ("plain", "rows"))
        bytes_plain, bytes_rows = peak("plain", dtype), peak("rows", dtype)
        print(
            f"{dtype}: plain {plain:.2f} s, rows {rows:.2f} s, ratio {rows / plain:.3f}; peak "
            f"{bytes_plain / 1e9:.2f} GB and {bytes_rows / 1e9:.2f} GB"
        )
        # Of each pair of neighbouring steps, so that a busy machine slows both.
        pairs = zip(seconds["plain"], seconds["rows"], strict=True)
        ratios[f"time_{dtype}"] = round(statistics.median(b / a for a, b in pairs), 3)
        ratios[f"peak_bytes_{dtype}"] = round(bytes_rows / bytes_plain, 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "gradients", **facts, **ratios}))


if __name__ == "__main__":
    main()
