"""What do two processes gain over one, when they share a scoring pass?

The demo's model and pool, LoRA r 8, 64 targets, one thread in each process. Both arms run the same
code on the same shards, interleaved; the clock runs from a common start, with models loaded and
target gradients on disk, to the last shard on disk. Two on an idle machine should reach 1.6 times
the pace of one: they share memory, and wait for each other at the end.

    python benchmarks/processes.py [--quick]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import look_trained
from transformers.utils import logging as transformers_logging

from selectune.adapters import add_adapter
from selectune.data import demo_assets, read_examples, tokenize
from selectune.files import Crew
from selectune.gradients.engine import GradientEngine
from selectune.gradients.store import GradientStore, Target, Worked
from selectune.models import load_base
from selectune.progress import Silent
from selectune.recipe import AdapterSection, ModelSection

GOAL = 1.6
NOBODYS = 10**6  # of so many fixed shards the last one is empty


def helper(folder: Path, index: int, n: int, n_pool: int) -> None:
    """Get ready, wait for the start, do one process's part."""
    assets, section = demo_assets(), AdapterSection()
    base = load_base(ModelSection(base=str(assets.model)), adapter=section)
    model = add_adapter(base.model, section, seed=0)
    look_trained(model)
    rows = list(read_examples(str(assets.pool)))
    pool = tokenize(rows[:: max(1, len(rows) // n_pool)][:n_pool], base.tokenizer, max_length=512)
    goals = [e for file in assets.targets.values() for e in read_examples(str(file))]
    aims = tokenize(goals[:64], base.tokenizer, max_length=512)
    engine = GradientEngine(model, precision=base.precision)
    store = GradientStore(folder / "store", {})

    def work(crew: Crew) -> Worked:
        worked = store.work(
            engine,
            list(pool),
            [Target(t, "task", "") for t in aims],
            pad_id=base.pad_id,
            token_budget=1024,
            shard_examples=max(1, n_pool // 16),
            progress=Silent(),
            hands=crew,
        )
        crew.close()
        return worked

    claims = folder / ".claims"
    if index == 0:
        work(Crew(claims, index=NOBODYS - 1, n=NOBODYS, is_fixed=True, waits=False))
    print("ready", flush=True)
    sys.stdin.readline()
    worked = work(Crew(claims, index=index, n=n, is_fixed=False, waits=index == 0))
    print(json.dumps({"computed": worked.n_computed, "shards": worked.n_shards}), flush=True)


def timed(n: int, n_pool: int) -> tuple[float, list[int]]:
    """Return the seconds that n processes take for a pass, and how many shards each computed."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--examples", str(n_pool), "--helper", folder, str(n)]
        processes = [
            subprocess.Popen(
                [*words, str(index)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
            for index in range(n)
        ]
        ways = []
        for process in processes:
            assert process.stdin is not None
            assert process.stdout is not None
            ways.append((process.stdin, process.stdout))
        for _, said in ways:
            if said.readline() != "ready\n":
                raise SystemExit("a process did not get ready")
        start = time.perf_counter()
        for asked, _ in ways:
            asked.write("\n")
            asked.flush()
        answers = [json.loads(said.readline()) for _, said in ways]
        seconds = time.perf_counter() - start
        for process in processes:
            process.wait()
    computed = [answer["computed"] for answer in answers]
    assert sum(computed) == answers[0]["shards"], "a shard was computed twice, or not at all"
    return seconds, computed


def main() -> None:
    """Time both arms in turns, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 examples, one round")
    parser.add_argument("--examples", type=int, help="pool examples (300; quick: 64)")
    parser.add_argument("--helper", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    n_pool = arguments.examples or (64 if arguments.quick else 300)
    if arguments.helper:
        folder, n, index = arguments.helper
        helper(Path(folder), int(index), int(n), n_pool)
        return
    ratios: list[float] = []
    for _ in range(1 if arguments.quick else 5):
        one, _ = timed(1, n_pool)
        two, computed = timed(2, n_pool)
        ratios.append(one / two)
        print(f"one {one:.1f} s, two {two:.1f} s, shards {computed}", file=sys.stderr)
    gain = round(statistics.median(ratios), 3)
    facts = {"device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "processes", "examples": n_pool, **facts,
                      "gain_of_two": gain, "goal": GOAL}))  # fmt: skip


if __name__ == "__main__":
    main()
