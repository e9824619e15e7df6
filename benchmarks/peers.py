"""Is scoring a pool with selectune faster than the other ways to get the same gradients?

Side by side on the demo's model and pool, LoRA r 8, each arm in a process of its own:

    selectune   the scoring pass of `selectune score`: tokens in, dot products and norms on disk
    loop        the same numbers one example at a time: backward, flatten, multiply by the targets
    bergson     bergson 2.5.1 building the same adapter's unprojected gradients, not even stored
    plain       forward and backward alone, all logits, no gradient per example: what training costs

Rounds are interleaved and medians printed. Every arm but the loop runs at the fastest of the same
token budgets, found in its first round. The targets' gradients are made before its clock starts.

    python benchmarks/peers.py [--quick] [--rounds 3] [--dtypes float32 bfloat16]
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Stopwatch, look_trained
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from selectune.adapters import add_adapter, load_adapter
from selectune.data import (
    Tokens,
    collate,
    demo_assets,
    length_sorted_batches,
    read_examples,
    tokenize,
)
from selectune.data.demo import cache_folder
from selectune.gradients.engine import GradientEngine, precision_of
from selectune.gradients.store import GradientStore, Target
from selectune.models import Base, load_base
from selectune.pipeline.measure import peak_rss
from selectune.recipe import AdapterSection, ModelSection

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peers_requirements.txt"
ARMS = ("selectune", "bergson", "loop", "plain")
BUDGETS = (512, 1024, 2048)
PROBE = 24  # examples that choose the token budget


def make_ground(folder: Path, n_pool: int, n_targets: int) -> Path:
    """Write adapter/, pool.json and targets.json into `folder`; return the base model's folder."""
    assets = demo_assets()
    section = AdapterSection()
    base = load_base(ModelSection(base=str(assets.model), dtype="float32"), adapter=section)
    model: Any = add_adapter(base.model, section, seed=0)
    look_trained(model)
    model.save_pretrained(folder / "adapter")
    target = next(iter(assets.targets.values()))
    for name, file, n in (("pool", assets.pool, n_pool), ("targets", target, n_targets)):
        rows = list(read_examples(str(file)))
        some = rows[:: max(1, len(rows) // n)][:n]  # every source of the pool
        written = [
            {
                "input_ids": t.input_ids.tolist(),
                "labels": [
                    int(i) if counts else -100
                    for i, counts in zip(t.input_ids, t.is_target, strict=True)
                ],
            }
            for t in tokenize(some, base.tokenizer, max_length=512)
        ]
        (folder / f"{name}.json").write_text(json.dumps(written), encoding="utf-8")
    return assets.model


def read_tokens(file: Path) -> list[Tokens]:
    """Return what `make_ground` wrote."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    items: list[Tokens] = []
    for k, row in enumerate(rows):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        items.append(Tokens(f"{file.stem}{k}", ids.numpy(), (labels != -100).numpy()))
    return items


# One pass of an arm over `items` in batches of at most `budget` tokens: seconds, losses.
Pass = Callable[[Sequence[Tokens], int], tuple[float, list[float]]]


def selectune_pass(base: Base, model: nn.Module, targets: Sequence[Tokens]) -> Pass:
    """Return the scoring pass, all that it writes included, the targets' part left out."""
    engine = GradientEngine(model, precision=base.precision)
    goal = [Target(t, "task", "") for t in targets]

    def run(items: Sequence[Tokens], budget: int) -> tuple[float, list[float]]:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            found = GradientStore(Path(folder) / "store", {"budget": budget}).compute(
                engine,
                items,
                goal,
                pad_id=base.pad_id,
                token_budget=budget,
                shard_examples=256,
                progress=watch,
            )
            seconds = time.perf_counter() - watch.began["pool gradients"]
        return seconds, found.losses.tolist()

    return run


def loop_pass(base: Base, model: nn.Module, targets: Sequence[Tokens]) -> Pass:
    """Return the obvious way: one backward pass and one matrix-vector product per example."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(item: Tokens) -> tuple[Tensor, float]:
        batch = collate([item], pad_id=base.pad_id, device=base.device)
        with precision_of(base.device, base.precision):
            loss = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).loss
        parts = torch.autograd.grad(loss, parameters)
        return torch.cat([part.flatten() for part in parts]), float(loss)

    directions = torch.stack([gradient(t)[0] for t in targets])

    def run(items: Sequence[Tokens], budget: int) -> tuple[float, list[float]]:
        start = time.perf_counter()
        losses: list[float] = []
        facts: list[tuple[Tensor, Tensor]] = []
        for item in items:
            g, loss = gradient(item)
            facts.append((directions @ g, g.norm()))
            losses.append(loss)
        return time.perf_counter() - start, losses

    return run


def plain_pass(base: Base, model: nn.Module) -> Pass:
    """Return forward and backward as a training step does them."""

    def run(items: Sequence[Tokens], budget: int) -> tuple[float, list[float]]:
        start = time.perf_counter()
        losses: list[float] = []
        for rows in length_sorted_batches([len(t.input_ids) for t in items], token_budget=budget):
            batch = collate([items[k] for k in rows], pad_id=base.pad_id, device=base.device)
            with precision_of(base.device, base.precision):
                logits = model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                ).logits[:, :-1]
                nats = functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none"
                ).view(len(rows), -1)
            each = nats.float().sum(1) / (batch.labels[:, 1:] != -100).sum(1)
            each.sum().backward()
            losses += each.tolist()
            model.zero_grad()
        return time.perf_counter() - start, losses

    return run


def measure(arm: str, folder: Path, model: Path, dtype: str, budgets: Sequence[int]) -> None:
    """Run one arm in this process, and print its measurement."""
    base = load_base(ModelSection(base=str(model), dtype=dtype), adapter=AdapterSection())
    adapted = load_adapter(base, folder / "adapter").eval()
    pool, targets = read_tokens(folder / "pool.json"), read_tokens(folder / "targets.json")
    match arm:
        case "selectune":
            run = selectune_pass(base, adapted, targets)
        case "loop":
            run = loop_pass(base, adapted, targets)
        case _:
            run = plain_pass(base, adapted)
    by_length = sorted(pool, key=lambda t: len(t.input_ids))
    probe = by_length[:: max(1, len(pool) // PROBE)]
    run(probe[:4], budgets[0])  # warm-up: first touch of the weights, kernels, probe of the engine
    best = budgets[0]
    if arm != "loop" and len(budgets) > 1:
        best = min(budgets, key=lambda budget: run(probe, budget)[0])
    seconds, losses = run(pool, best)
    peak = peak_rss() if base.device.type == "cpu" else torch.cuda.max_memory_allocated()
    found = {
        "examples_per_second": len(pool) / seconds,
        "dtype": dtype,
        "seconds": seconds,
        "peak_bytes": peak,
        "batch": best,
        "mean_loss": statistics.fmean(losses),
    }
    print(json.dumps(found))


def bergson_python() -> Path:
    """Return the interpreter of an environment that holds bergson, made on the first call."""
    pins = REQUIREMENTS.read_bytes()
    version = hashlib.sha256(pins + sys.version.encode()).hexdigest()[:12]
    folder = cache_folder() / f"bergson-{version}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        print(f"making an environment for bergson in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
        done.touch()
    return python


def call(
    arm: str,
    folder: Path,
    model: Path,
    dtype: str,
    budgets: Sequence[int],
    bergson: Path,
    *more: str,
) -> dict[str, Any]:
    """Run one arm in a process of its own, and return its measurement."""
    common = ["--model", str(model), "--dtype", dtype, "--budgets", *map(str, budgets)]
    if arm == "bergson":
        words = [str(bergson), str(HERE / "peers_bergson.py"), *common]
        words += ["--adapter", str(folder / "adapter"), "--examples", str(folder / "pool.json")]
        words += ["--device", "cuda" if torch.cuda.is_available() else "cpu", *more]
    else:
        words = [sys.executable, __file__, "--arm", arm, "--ground", str(folder), *common]
    done = subprocess.run(
        words,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{arm} ({dtype}) failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(arguments: argparse.Namespace) -> None:
    """Run all arms in turn, print the table and the ratios."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="selectune-peers-") as name:
        folder = Path(name)
        model = make_ground(folder, arguments.examples, arguments.targets)
        bergson = arguments.bergson_python or bergson_python()
        for turn in range(arguments.rounds):
            for dtype in arguments.dtypes:
                for arm in ARMS:
                    known = found.setdefault((arm, dtype), [])
                    budgets = [known[0]["batch"]] if known else arguments.budgets
                    known.append(call(arm, folder, model, dtype, budgets, bergson))
                    rate = known[-1]["examples_per_second"]
                    print(f"round {turn + 1}: {arm} {dtype} {rate:.2f} examples/s", file=sys.stderr)
        lengths = [len(t.input_ids) for t in read_tokens(folder / "pool.json")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"{len(lengths)} examples of {statistics.fmean(lengths):.0f} tokens, {arguments.targets} "
        f"targets, {arguments.rounds} rounds, {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print("arm        dtype     examples/s  peak GB tokens/batch    loss")
    rates: dict[tuple[str, str], float] = {}
    for (arm, dtype), runs in found.items():
        rate = rates[arm, dtype] = statistics.median(run["examples_per_second"] for run in runs)
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        print(
            f"{arm:<10} {dtype:<9} {rate:>10.2f} {peak:>8.2f} "
            f"{'one by one' if arm == 'loop' else runs[0]['batch']:>12} "
            f"{runs[0]['mean_loss']:>7.3f}"
        )
    ratios = {
        f"selectune_to_{arm}_{dtype}": round(rates["selectune", dtype] / rates[arm, dtype], 3)
        for arm in ARMS[1:]
        for dtype in arguments.dtypes
    }
    print(json.dumps({"benchmark": "peers", "device": device, **ratios}))


def main() -> None:
    """Compare all arms, or run one of them (`--arm`, for its own process)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="24 examples, one round")
    parser.add_argument("--examples", type=int, help="pool examples (240; quick: 24)")
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--rounds", type=int, help="rounds of all arms (3; quick: 1)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--bergson-python", type=Path, help="an environment that you made")
    for word in ("--arm", "--ground", "--model", "--dtype"):
        parser.add_argument(word, help=argparse.SUPPRESS)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=BUDGETS, help="tokens per batch to choose from"
    )
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.arm:
        ground, model = Path(arguments.ground), Path(arguments.model)
        measure(arguments.arm, ground, model, arguments.dtype, arguments.budgets)
        return
    arguments.examples = arguments.examples or (24 if arguments.quick else 240)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    compare(arguments)


if __name__ == "__main__":
    main()
