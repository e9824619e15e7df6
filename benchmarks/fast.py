"""How much cheaper can a scoring pass be before it ranks the pool otherwise?

GIST on the demo's model, pool and several of its target tasks, after the demo's own warm-up. Every
setting scores the same examples in turns: the top layers alone, a context that leaves a share of
the examples whole, bfloat16, and some of them together. Cost is the time of targets and pool
together, as medians over neighbours of the ratio to full gradients in float32; beside it stand
Spearman's correlation with the full scores and the share of their best 5 % that is found again, for
each task the worst.

    python benchmarks/fast.py [--quick] [--tasks csqa siqa piqa]

`selectune.pipeline.economy.KNEE`, which `--fast` takes, is set by this table.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _common import ratio
from jaxtyping import Float
from torch import nn
from transformers.utils import logging as transformers_logging

from selectune.data import Tokens
from selectune.gradients.engine import GradientEngine
from selectune.gradients.store import GradientStore, Target
from selectune.methods.data.gist import GistOptions
from selectune.methods.data.gist import score as gist
from selectune.methods.evidence import Evidence
from selectune.models import Base
from selectune.pipeline.economy import Economy, length_of, only_layers
from selectune.pipeline.ground import Ground
from selectune.pipeline.ranks import rank_correlation
from selectune.pipeline.scoring import targets
from selectune.pipeline.warmup import warmed_model
from selectune.progress import Silent
from selectune.recipe import load_recipe
from selectune.recipes import demo_recipe

TOP = 0.05
BUDGET = 1024  # score.token_budget
Scored = Mapping[str, Float[np.ndarray, " n"]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to take gradients.

    Args:
        dtype: of the base weights and of autocast.
        layers: as in `Economy`.
        whole: share of examples that stay whole.
    """

    dtype: str
    layers: str | None = None
    whole: str | None = None

    def __str__(self) -> str:
        length = "" if self.whole is None else f"{self.whole} whole"
        return ", ".join(part for part in (self.dtype, self.layers, length) if part)


FULL = Setting("float32")
SETTINGS = (
    FULL,
    *(Setting("float32", layers) for layers in ("top:75%", "top:50%", "top:25%")),
    *(Setting("float32", None, share) for share in ("90%", "50%")),
    Setting("bfloat16"),
    *(Setting("bfloat16", layers) for layers in ("top:75%", "top:50%", "top:25%", "top:10%")),
    *(Setting("bfloat16", None, share) for share in ("95%", "90%", "75%", "50%", "10%")),
    *(Setting("bfloat16", layers, "90%") for layers in ("top:75%", "top:50%")),
)
QUICK = (FULL, Setting("float32", "top:25%"), Setting("float32", None, "90%"))


class Bench:
    """A warmed-up model in each dtype, with the examples.

    Args:
        dtypes: of the settings.
        tasks: target tasks of the demo.
        n_pool: pool examples.
        folder: for the warm-ups.
    """

    def __init__(
        self, dtypes: Sequence[str], tasks: Sequence[str], n_pool: int, folder: Path
    ) -> None:
        self.models: dict[str, tuple[Base, nn.Module]] = {}
        names = ", ".join(f"{task}: demo:target/{task}" for task in tasks)
        for dtype in dtypes:
            changes = [f"model.dtype={dtype}", f"data.target={{{names}}}", "data.heldout=null"]
            recipe = load_recipe(demo_recipe(), [*changes, "tune.controls=[]"])
            ground = Ground(recipe, folder / dtype, shared=None, tasks=None, progress=Silent())
            base = ground.base()
            self.models[dtype] = base, warmed_model(ground, base)
            pool = list(ground.tokens.pool)
            self.pool: list[Tokens] = pool[:: max(1, len(pool) // n_pool)][:n_pool]
            self.lengths = ground.tokens.pool.lengths
            self.targets: list[Target] = targets(ground)

    def scored(self, setting: Setting) -> tuple[float, Scored]:
        """Return the seconds of a whole pass, and GIST's scores by task."""
        base, model = self.models[setting.dtype]
        length = None if setting.whole is None else length_of(setting.whole, self.lengths)
        economy = Economy(setting.layers, length)
        short = economy.shortened([t.tokens for t in self.targets])
        aims = [Target(own, t.task, t.group)
                for own, t in zip(short, self.targets, strict=True)]  # fmt: skip
        pool = economy.shortened(self.pool)
        with tempfile.TemporaryDirectory() as folder, only_layers(model, economy.layers):
            engine = GradientEngine(model, precision=setting.dtype)
            start = time.perf_counter()
            found = GradientStore(Path(folder) / "store", {"setting": str(setting)}).compute(
                engine,
                pool,
                aims,
                pad_id=base.pad_id,
                token_budget=BUDGET,
                shard_examples=256,
                progress=Silent(),
            )
            seconds = time.perf_counter() - start
        n_tokens = np.asarray([int(t.is_target.sum()) for t in pool])
        evidence = {
            task: Evidence(found.ids, n_tokens, gradients=found.of_task(task))
            for task in dict.fromkeys(found.tasks)
        }
        return seconds, {task: gist(e, GistOptions()).score for task, e in evidence.items()}


def found_again(scores: Float[np.ndarray, " n"], full: Float[np.ndarray, " n"]) -> float:
    """Return the share of the best 5 % of full scores that other scores choose too."""
    k = max(1, round(TOP * len(full)))
    best = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (scores, full)]
    return len(best[0] & best[1]) / k


def main() -> None:
    """Measure all settings in turns, print the frontier, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="60 examples, 3 settings, one round")
    parser.add_argument("--examples", type=int, help="pool examples (500; quick: 60)")
    parser.add_argument("--rounds", type=int, help="rounds of all settings (3; quick: 1)")
    parser.add_argument("--tasks", nargs="+", help="(csqa siqa piqa; quick: csqa siqa)")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quick: bool = arguments.quick
    settings = QUICK if quick else SETTINGS
    tasks: list[str] = arguments.tasks or (["csqa", "siqa"] if quick else ["csqa", "siqa", "piqa"])
    n_pool = arguments.examples or (60 if quick else 500)
    n_rounds = arguments.rounds or (1 if quick else 3)
    seconds: dict[Setting, list[float]] = {setting: [] for setting in settings}
    scores: dict[Setting, Scored] = {}
    with tempfile.TemporaryDirectory(prefix="selectune-fast-") as folder:
        bench = Bench(sorted({s.dtype for s in settings}), tasks, n_pool, Path(folder))
        for turn in range(n_rounds):
            for setting in settings:
                if not scores:
                    bench.scored(setting)  # first touch of the weights
                spent, scores[setting] = bench.scored(setting)
                seconds[setting].append(spent)
                print(f"round {turn + 1}: {setting} {spent:.1f} s", file=sys.stderr)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(
        f"{len(bench.pool)} examples, {len(bench.targets)} targets of {', '.join(tasks)}, "
        f"{n_rounds} rounds, {device}, {facts['threads']} threads, torch {torch.__version__}"
    )
    print(f"{'setting':<30} examples/s   cost  Spearman  best 5 % found")
    rows: list[dict[str, object]] = []
    for setting in settings:
        pairs = [(scores[setting][task], scores[FULL][task]) for task in tasks]
        alike = min(rank_correlation(own, full) for own, full in pairs)
        again = min(found_again(own, full) for own, full in pairs)
        cost = ratio(seconds[setting], seconds[FULL])
        rate = len(bench.pool) / statistics.median(seconds[setting])
        print(f"{setting!s:<30} {rate:>10.2f} {cost:>6.3f} {alike:>9.3f} {again:>15.2f}")
        rows.append(
            {"setting": str(setting), "cost": cost, "spearman": round(alike, 4),
             "found_again": round(again, 4)}
        )  # fmt: skip
    print(
        json.dumps(
            {"benchmark": "fast", "examples": n_pool, "tasks": tasks, **facts, "settings": rows}
        )
    )


if __name__ == "__main__":
    main()
