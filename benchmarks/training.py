"""What do methods that act during training cost, in time and in memory?

SmolLM2-135M, LoRA r 32 on q, k, v, up and down, 16 examples of 96 tokens of which the last 24 are
targets, AdamW. Steps of all forms are interleaved; time is the sum of a form's steps over that of
plain ones. `saved` counts the bytes that autograd keeps for the backward pass, each storage once,
weights left out, in the mean over twenty choices of layers. Peak memory is of a process of its own
for each form, with an allocator that gives freed blocks back: glibc else keeps what an earlier,
smaller pass has freed, and its habits would be measured instead of ours.

    python benchmarks/training.py [--quick] [--dtype bfloat16] [--forms gast,ist]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from selectune.adapters import add_adapter
from selectune.data import Batch, Tokens, demo_assets
from selectune.gradients.engine import precision_of
from selectune.gradients.loss import target_nll
from selectune.models import load_base
from selectune.pipeline.measure import Measured
from selectune.recipe import AdapterSection, ModelSection
from selectune.registry import get
from selectune.training.method import Method, Session
from selectune.training.sources import TokenSource

N, T, ANSWER = 16, 96, 24
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("plain", {}),
    "gast": ("gast", {}),
    "gast every 8": ("gast", {"refresh_every": 8}),
    "greats": ("greats", {}),
    "rst": ("rst", {"layers": 0.25}),
    "ist": ("ist", {"layers": 0.25}),
    "ist held 10 merged": ("ist", {"layers": 0.25, "hold": 10, "merge": True}),
    "gast every 8 + ist": ("gast", {"refresh_every": 8, "sampler": "ist"}),
    "gast every 8 + rst": ("gast", {"refresh_every": 8, "sampler": "rst"}),
}


class Arm:
    """One model with one form of training."""

    def __init__(self, form: str, dtype: str) -> None:
        section = AdapterSection(
            rank=32, alpha=64.0, modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
        )
        base = load_base(ModelSection(base=str(demo_assets().model), dtype=dtype), adapter=section)
        self.model = add_adapter(base.model, section, seed=0).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:  # zero at the start, and then no gradient reaches A
                    p.normal_(0, 0.02)
        self.dtype = dtype
        self.tokens = [_tokens(k) for k in range(256)]
        self.source = TokenSource(self.tokens, pad_id=0, device=base.device)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-5
        )
        self.stack = ExitStack()
        self.session: Session | None = None
        name, options = FORMS[form]
        if name != "plain":
            method: Method = get("training_method", name).parse(dict(options))
            self.session = self.stack.enter_context(
                method.attach(
                    self.model, self.optimizer, pool=self.source, weighting="token", precision=dtype
                )
            )
        self.number = 0

    def step(self) -> None:
        """Run one optimizer step."""
        batch = self.source.draw([(self.number * N + k) % 256 for k in range(N)])
        self.number += 1
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss over target tokens."""
        if self.session is not None:
            self.session.expect(batch.labels)
        with precision_of(batch.input_ids.device, self.dtype):
            nats, n_tokens = target_nll(self.model, batch)
        return nats.sum() / n_tokens.sum()

    def saved_bytes(self, draws: int = 20) -> float:
        """Return what a forward pass keeps for backward, in the mean over choices of layers."""
        batch = self.source.draw(list(range(N)))
        found: list[int] = []
        for k in range(1 if self.session is None else draws):
            if self.session is not None:
                self.session.begin_step(10 * k)  # a choice that is held is held for ten steps
            with counted(self.model) as seen:
                self.loss(batch)
            found.append(sum(seen.values()))
        return statistics.mean(found)


@contextmanager
def counted(model: nn.Module) -> Generator[dict[int, int]]:
    """Count the bytes that autograd saves, by storage, without the model's own weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept = t.detach()  # a node that keeps its own output would never be freed
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


def _tokens(k: int) -> Tokens:
    rng = torch.Generator().manual_seed(k)
    ids = torch.randint(3, 49_000, (T,), generator=rng).numpy()
    return Tokens(f"e{k}", ids, (torch.arange(T) >= T - ANSWER).numpy())


def peak(form: str, dtype: str) -> int:
    """Return the peak bytes of one form in a process of its own."""
    words = [sys.executable, __file__, "--arm", form, "--dtype", dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure time in turns, then memory, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 steps instead of 40")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--forms", help="names, with commas between; all by default")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.arm:
        arm = Arm(arguments.arm, arguments.dtype)
        with Measured() as measured:
            for _ in range(3):
                arm.step()
        print(measured.device_peak_bytes if torch.cuda.is_available() else measured.peak_bytes)
        return
    chosen = arguments.forms.split(",") if arguments.forms else list(FORMS)
    names = list(dict.fromkeys(["plain", *chosen]))
    arms = {name: Arm(name, arguments.dtype) for name in names}
    for arm in arms.values():
        arm.step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(10 if arguments.quick else 40):
        for name, arm in arms.items():
            seconds[name].append(_timed(arm.step))
    saved = {name: arm.saved_bytes() for name, arm in arms.items()}
    peaks = {name: peak(name, arguments.dtype) for name in names}
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        # Steps differ (probes, refreshes), so the sum of a run over the sum of plain ones.
        rows[name] = {
            "time": round(sum(seconds[name]) / sum(seconds["plain"]), 3),
            "median_step": round(
                statistics.median(
                    b / a for a, b in zip(seconds["plain"], seconds[name], strict=True)
                ),
                3,
            ),
            "saved_bytes": round(saved[name] / saved["plain"], 3),
            "peak_bytes": round(peaks[name] / peaks["plain"], 3),
        }
        told = ", ".join(f"{key} {value:.3f}" for key, value in rows[name].items())
        print(f"{name:<22} {told}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"dtype": arguments.dtype, "plain_seconds": statistics.median(seconds["plain"])}
    print(json.dumps({"benchmark": "training", **facts, "forms": rows}))


if __name__ == "__main__":
    main()
