"""How fast does bergson build LoRA gradients? Runs in bergson's own environment.

`peers.py` and `less.py` make that environment and call this file, the second with a global
projection of all gradients to a few numbers; it imports nothing of selectune. The steps
are those of `bergson build` (2.5.1, `utils/worker_utils.py` and `collection.py`): its way to load
an adapter, its batches, its GradientCollector and loop. The gradients are dropped once they are
formed in memory, which spares it the 4 bytes per example and weight of an index on disk.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from bergson.collector.collector import CollectorComputer
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.data import allocate_batches
from bergson.gradients import GradientProcessor
from bergson.utils.peft import detect_peft_modules
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM


def load(model: str, adapter: str, dtype: torch.dtype, device: str) -> tuple[PeftModel, set[str]]:
    """Load base and adapter in one dtype, with a backward pass that reaches all of the adapter."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    adapted = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
    modules = detect_peft_modules(adapted)
    adapted.requires_grad_(False)
    adapted.get_input_embeddings().requires_grad_(True)  # its hooks need a graph, not weight grads
    return adapted, modules


def collect(
    model: PeftModel, modules: set[str], data: Dataset, token_budget: int, projection: int | None
) -> tuple[float, list[float]]:
    """Return the seconds that the gradients of `data` took, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(
            run_path=f"{folder}/index", loss_reduction="mean", token_batch_size=token_budget
        )
        config.partial_run_path.mkdir()
        collector = GradientCollector(
            model=model.base_model,
            cfg=config,
            processor=GradientProcessor(
                projection_dim=projection, projection_target="global", projection_seed=0
            ),
            target_modules=modules,
            data=data,
            skip_index=True,
        )
        computer = CollectorComputer(
            model,
            data,
            collector=collector,
            batches=allocate_batches(data["length"][:], token_budget),
            cfg=config,
        )
        start = time.perf_counter()
        computer.run_with_collector_hooks()
        seconds = time.perf_counter() - start
        return seconds, collector.per_doc_losses.tolist()


def peak_bytes(device: str) -> int:
    """Return the most memory that was held: by torch on an accelerator, else by this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: a child starts with its parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main() -> None:
    """Measure the fastest of the given token budgets, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--examples", required=True, help='JSON: [{"input_ids": [], "labels": []}]')
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--probe", type=int, default=24, help="examples that choose the budget")
    parser.add_argument("--projection", type=int, help="numbers left of a gradient; none: all")
    arguments = parser.parse_args()

    rows = json.loads(Path(arguments.examples).read_text(encoding="utf-8"))
    for row in rows:
        row["length"] = len(row["input_ids"])
    data = Dataset.from_list(rows)
    dtype = getattr(torch, arguments.dtype)
    model, modules = load(arguments.model, arguments.adapter, dtype, arguments.device)
    to: int | None = arguments.projection
    longest = max(row["length"] for row in rows)
    budgets = sorted({max(budget, longest) for budget in arguments.budgets})
    # Evenly over the lengths, so that the probe's batches look like the real ones.
    by_length = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    probe = data.select(by_length[:: max(1, len(rows) // arguments.probe)])
    collect(model, modules, probe.select(range(min(4, len(probe)))), budgets[0], to)  # warm-up
    best = budgets[0]
    if len(budgets) > 1:
        best = min(budgets, key=lambda budget: collect(model, modules, probe, budget, to)[0])
    seconds, losses = collect(model, modules, data, best, to)
    print(
        json.dumps(
            {
                "examples_per_second": len(rows) / seconds,
                "dtype": arguments.dtype,
                "seconds": seconds,
                "peak_bytes": peak_bytes(arguments.device),
                "batch": best,
                "mean_loss": sum(losses) / len(losses),
            }
        )
    )


if __name__ == "__main__":
    main()
