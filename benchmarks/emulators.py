"""What does an emulator cost to make, and how much cheaper is it to tune on?

SmolLM2-135M, first and last two layers as the adapter, 60 % of the layers between.

    build    64 blocks of 256 tokens: the statistics of all middle layers, to plain forward and
             backward passes over the same batches (gradients of all weights of the layers); the
             decompositions and scores of all layers apart. Repeats are interleaved.
    memory   in a process of its own each: what a pass holds beyond the loaded model. `counted` is
             the statistics of the layers at once plus what autograd saves; `peak` is measured.
    tune     steps of AdamW on the adapter layers, 16 examples of 96 tokens, on emulator and model,
             interleaved, on top of the same adapter. `predicted` is the ratio of all parameters.
             Speed does not depend on what an emulator's numbers are, so those are cut at random.

    python benchmarks/emulators.py [--quick] [--dtypes bfloat16] [--parts build,memory,tune]
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from _arms import clock, load, tokens
from _common import child, ratio
from _owners import forward, saved_bytes, size
from torch import Tensor, nn

from selectune.data import Batch, collate, length_sorted_batches, read_examples
from selectune.data.examples import plain_text
from selectune.models import blocks
from selectune.offsite.arrangement import Arrangement
from selectune.offsite.calibration import calibration_of
from selectune.offsite.compressor import compress_layer, needs_of
from selectune.offsite.emulate import compressor_of
from selectune.offsite.emulator import build_emulator
from selectune.offsite.layout import Layout
from selectune.offsite.quality import parameter_ratios
from selectune.offsite.statistics import LayerStatistics, collect
from selectune.offsite.views import LayerCompressor
from selectune.pipeline.measure import Measured
from selectune.pipeline.prepare import DemoNames
from selectune.registry import CompressorNeed

SHARES = {"keep_attention": 0.6, "keep_mlp": 0.6}
BUDGET = 2048  # padded tokens in a batch: the default of `emulate`
GRADIENTS: frozenset[CompressorNeed] = frozenset({"gradients"})
PARTS = ("build", "memory", "tune")


class Ground:
    """A model, its layout and calibration text, as batches."""

    def __init__(self, dtype: str, *, n_blocks: int, model: str | None) -> None:
        self.dtype, self.n_blocks = dtype, n_blocks
        self._base = load(dtype, model)
        self.model = self._base.model
        self.layout = Layout.of(len(blocks(self.model)), None)

    @cached_property
    def batches(self) -> list[Batch]:
        """The calibration text."""
        rows = read_examples(
            cast("Any", DemoNames().paths("demo:commonsense/text/calibration")),
            what="calibration text",
        )
        text = calibration_of(
            [plain_text(row.content) for row in rows], self._base.tokenizer,
            n_blocks=self.n_blocks, block_tokens=256, n_probe=1, seed=0,
        )  # fmt: skip
        lengths = [len(block.input_ids) for block in text.blocks]
        return [
            collate([text.blocks[k] for k in group], pad_id=0, device=self.device)
            for group in length_sorted_batches(lengths, token_budget=BUDGET)
        ]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def statistics(self, layers: list[int]) -> dict[int, LayerStatistics]:
        """Return what GradOT reads of some layers."""
        return collect(self.model, self.batches, layers, needs=GRADIENTS, precision=self.dtype)

    def plain(self) -> None:
        """Run forward and backward passes, as training the layers would."""
        self.model.requires_grad_(False)
        for block in blocks(self.model):
            block.requires_grad_(True)
        for batch in self.batches:
            nats, n_tokens = forward(self.model, batch, self.dtype)
            (nats / n_tokens).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def compress(self, name: str, found: dict[int, LayerStatistics]) -> dict[int, Any]:
        """Return what stands in for every middle layer."""
        compressor = cast("LayerCompressor", compressor_of(name, None))
        every = blocks(self.model)
        return {
            j: compress_layer(every[j], j, compressor, found.get(j), **SHARES)[0]
            for j in self.layout.middle
        }


def build(ground: Ground, *, repeats: int) -> dict[str, Any]:
    """Return the seconds of statistics, plain passes and decompositions."""
    assert needs_of(compressor_of("gradot", None)) == GRADIENTS
    middle = list(ground.layout.middle)
    seconds: dict[str, list[float]] = {"plain": [], "statistics": [], "compress": []}
    found: dict[int, LayerStatistics] = {}
    ground.plain()  # to warm up
    for _ in range(repeats):
        seconds["plain"].append(clock(ground.plain))
        found.clear()
        seconds["statistics"].append(clock(lambda: found.update(ground.statistics(middle))))
        seconds["compress"].append(clock(lambda: ground.compress("gradot", found)))
    return {
        "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
        "statistics_to_plain": ratio(seconds["statistics"], seconds["plain"]),
        "compress_seconds_per_layer": round(
            statistics.median(seconds["compress"]) / len(middle), 3
        ),
    }


def memory(ground: Ground, n_layers: int) -> dict[str, int]:
    """Return the bytes that a pass holds beyond the model, counted and measured.

    Args:
        ground: with one batch of text.
        n_layers: whose statistics are taken, the first of the middle; 0 for a plain pass without
            gradients of weights.
    """
    ground.batches  # noqa: B018  (read before anything is measured)
    layers = list(ground.layout.middle[:n_layers])
    found: dict[int, LayerStatistics] = {}

    def run() -> None:
        if layers:
            found.update(ground.statistics(layers))
            return
        ground.model.requires_grad_(False)
        blocks(ground.model)[ground.layout.middle[0]].requires_grad_(True)
        for batch in ground.batches:
            nats, _ = forward(ground.model, batch, ground.dtype)
            nats.sum().backward()

    before = _now()
    with Measured() as measured:
        run()
    peak = measured.device_peak_bytes if torch.cuda.is_available() else measured.peak_bytes
    with saved_bytes(ground.model) as saved:
        found.clear()
        run()
    tensors = [
        part
        for one in found.values()
        for matrix in one.matrices.values()
        for part in (matrix.A, matrix.S, matrix.G)
        if part is not None
    ]
    statistics_held = size(tensors)
    # One batch is alive at a time, and there is one.
    saved_held = sum(saved.values())
    return {
        "statistics": statistics_held,
        "saved": saved_held,
        "counted": statistics_held + saved_held,
        "peak": peak - before,
    }


def _now() -> int:
    """Return what the process, or the accelerator, holds now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with Measured() as measured:
        pass
    return measured.peak_bytes


class Arm:
    """Adapter layers that train, on a model or on its emulator."""

    def __init__(self, model: nn.Module, adapters: list[int], dtype: str) -> None:
        self.model, self._dtype = model.requires_grad_(False), dtype
        every = blocks(model)
        for index in adapters:
            every[index].requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5)
        device = trained[0].device
        self._batch = collate([tokens(k) for k in range(16)], pad_id=0, device=device)

    def loss(self) -> Tensor:
        """Return the mean loss over target tokens."""
        nats, n_tokens = forward(self.model, self._batch, self._dtype)
        return nats.sum() / n_tokens.sum()

    def step(self) -> None:
        """Run one optimizer step."""
        self.loss().backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def held(self) -> dict[str, int]:
        """Return the bytes of weights, of the optimizer's state, and of what autograd saves."""
        with saved_bytes(self.model) as saved:
            self.loss()
        state = [t for held in self._optimizer.state.values() for t in held.values()]
        return {
            "weights": size(self.model.parameters()),
            "optimizer": size(t for t in state if isinstance(t, Tensor)),
            "saved": sum(saved.values()),
        }


def tune(ground: Ground, *, repeats: int) -> dict[str, Any]:
    """Return the ratio of steps on an emulator to steps on its model, and what size predicts."""
    layout = ground.layout
    middle = ground.compress("random", {})
    emulator = build_emulator(ground.model, layout, middle)
    places = Arrangement.of(layout, middle).places
    ratios = parameter_ratios(ground.model, emulator, {j: places[j] for j in layout.adapters})
    arms = {
        "model": Arm(ground.model, list(layout.adapters), ground.dtype),
        "emulator": Arm(emulator, [places[j] for j in layout.adapters], ground.dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm.step()
    for _ in range(repeats):
        for name, arm in arms.items():
            seconds[name].append(clock(arm.step))
    found = {name: arm.held() for name, arm in arms.items()}
    return {
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "time": ratio(seconds["emulator"], seconds["model"]),
        "predicted": round(ratios.whole, 4),
        "middle": round(ratios.middle, 4),
        "bytes": found,
        "memory": round(sum(found["emulator"].values()) / sum(found["model"].values()), 4),
    }


def measure(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that are asked for, for one type of weights."""
    n_blocks = 8 if arguments.quick else 64
    words = ["--dtypes", dtype, *(["--model", arguments.model] if arguments.model else [])]
    parts: dict[str, Callable[[], Any]] = {
        "build": lambda: build(
            Ground(dtype, n_blocks=n_blocks, model=arguments.model),
            repeats=1 if arguments.quick else 3,
        ),
        "memory": lambda: {
            name: child(__file__, "--layers", str(count), *words)
            for name, count in (("plain", 0), ("one layer", 1), ("all layers", 1000))
        },
        "tune": lambda: tune(
            Ground(dtype, n_blocks=1, model=arguments.model),
            repeats=2 if arguments.quick else 20,
        ),
    }
    found: dict[str, Any] = {}
    for name in arguments.parts.split(","):
        found[name] = parts[name]()
        print(f"{dtype} {name}: {json.dumps(found[name])}", flush=True)
    return found


def main() -> None:
    """Measure each part for each type of weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 blocks, 2 steps")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the weights")
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--model", help="folder of another model; SmolLM2-135M by default")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layers is not None:
        ground = Ground(arguments.dtypes, n_blocks=BUDGET // 256, model=arguments.model)
        print(json.dumps(memory(ground, arguments.layers)))
        return
    found = {dtype: measure(dtype, arguments) for dtype in arguments.dtypes.split(",")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"model": arguments.model or "SmolLM2-135M"}
    print(json.dumps({"benchmark": "emulators", **facts, "dtypes": found}))


if __name__ == "__main__":
    main()
