"""How fast do 1 % deltas go into a model and out again, beside peft's SHiRA and LoRA?

SmolLM2-135M; random deltas on 1 % of the weights of its layers, and adapters of peft of as many
numbers on the same matrices. Interleaved, medians:

    merge    delta A into the base; ours hashes the base first, which `fingerprint` tells apart
    switch   from A to B, both at hand
    unmerge  B out again
    load     from a folder into a base that knows no adapter yet, merged

`not_restored` counts weights of the base whose bits are others after A, B and out again: peft
subtracts. `disk_bytes` is what one delta takes.

    python benchmarks/merging.py [--quick] [--dtypes float32] [--model FOLDER]
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from _arms import DENSITY, clock, fill, load, lora, shira, shira_config
from peft import LoraConfig, PeftModel, ShiraConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from selectune import merge, unmerge
from selectune.adapters.add import quiet
from selectune.weights import Random, SparseDelta, WeightMask, switch
from selectune.weights.base import base_fingerprint, base_weights
from selectune.weights.delta import type_name


class Arm(Protocol):
    """One way to add deltas to weights."""

    n_entries: int

    def merge(self) -> object:
        """Put A in."""
        ...

    def switch(self) -> object:
        """Put B in its place."""
        ...

    def unmerge(self) -> object:
        """Take B out."""
        ...

    def save(self, folder: Path) -> Path:
        """Save A, and return where to."""
        ...

    def load(self, base: nn.Module, folder: Path) -> object:
        """Load A and merge it into a bare base."""
        ...


class Ours:
    """Sparse deltas."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.a, self.b = (
            made_up(base, Random(density=DENSITY, seed=k).score(base).select()) for k in range(2)
        )
        self.n_entries = self.a.n_entries

    def merge(self) -> object:
        """Put A in."""
        return merge(self.base, self.a)

    def switch(self) -> object:
        """Put B in its place."""
        return switch(self.base, self.a, self.b)

    def unmerge(self) -> object:
        """Take B out."""
        return unmerge(self.base)

    def save(self, folder: Path) -> Path:
        """Save A, and return where to."""
        return self.a.save(folder)

    def load(self, base: nn.Module, folder: Path) -> object:
        """Load A and merge it into a bare base."""
        return merge(base, folder)


class Peft:
    """Adapters of peft, two on one model."""

    def __init__(self, base: nn.Module, kind: str, count: int) -> None:
        if kind == "shira":
            # Before the model is wrapped: its modules have other names then.
            config: LoraConfig | ShiraConfig = shira_config(base, count, 1)
            self.model, part = shira(base, count), "shira_weight"
        else:
            self.model, part = lora(base, count), "lora_B"
            config = copy.deepcopy(cast("LoraConfig", self.model.peft_config["default"]))
        with quiet():
            self.model.add_adapter("second", config)
        fill(self.model, f"{part}.second", 1)
        self.tuner = cast("BaseTuner", self.model.base_model)
        self.n_entries = sum(p.numel() for n, p in self.model.named_parameters() if ".second" in n)

    def merge(self) -> object:
        """Put A in."""
        return self.tuner.merge_adapter(adapter_names=["default"])

    def switch(self) -> object:
        """Put B in its place."""
        self.tuner.unmerge_adapter()
        return self.tuner.merge_adapter(adapter_names=["second"])

    def unmerge(self) -> object:
        """Take B out."""
        return self.tuner.unmerge_adapter()

    def save(self, folder: Path) -> Path:
        """Save A, and return where to."""
        self.model.save_pretrained(str(folder), selected_adapters=["default"])
        return folder

    def load(self, base: nn.Module, folder: Path) -> object:
        """Load A and merge it into a bare base."""
        with quiet():
            adapted = PeftModel.from_pretrained(base, str(folder))
        return cast("BaseTuner", adapted.base_model).merge_adapter()


def made_up(base: nn.Module, mask: WeightMask) -> SparseDelta:
    """Return a delta of random numbers on chosen weights."""
    rng = torch.Generator().manual_seed(0)
    weights = base_weights(base)
    return SparseDelta(
        mask.indices,
        {n: torch.empty(len(i)).normal_(0, 1e-3, generator=rng) for n, i in mask.indices.items()},
        mask.shapes,
        {name: type_name(weights[name].dtype) for name in mask.indices},
        mask.base,
        mask.about,
    )


def measure(dtype: str, model: str | None, repeats: int) -> dict[str, Any]:
    """Measure one type of weights, and print a row for each way."""
    bare = load(dtype, model).model
    bases = {name: copy.deepcopy(bare) for name in ("ours", "shira", "lora")}
    weights = {name: base_weights(base) for name, base in bases.items()}  # peft wraps them
    ours = Ours(bases["ours"])
    arms: dict[str, Arm] = {"ours": ours}
    for kind in ("shira", "lora"):
        arms[kind] = Peft(bases[kind], kind, ours.n_entries)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    odd: dict[str, int] = {}
    for k in range(repeats + 1):  # the first is to warm up
        for name, arm in arms.items():
            for step in (arm.merge, arm.switch, arm.unmerge):
                _add(seconds[name], step.__name__, clock(step), k)
            odd.setdefault(name, n_other(weights[name], base_weights(bare)))
        _add(seconds["ours"], "fingerprint", clock(lambda: base_fingerprint(bare)), k)
    with tempfile.TemporaryDirectory() as folder:
        saved = {name: arm.save(Path(folder) / name) for name, arm in arms.items()}
        for k in range(repeats + 1):
            for name, arm in arms.items():
                into = copy.deepcopy(bare)
                _add(seconds[name], "load", clock(_loading(arm, into, saved[name])), k)
        sizes = {name: max(f.stat().st_size for f in p.iterdir()) for name, p in saved.items()}
    rows: dict[str, Any] = {}
    for name, arm in arms.items():
        medians = {key: round(statistics.median(t), 4) for key, t in seconds[name].items()}
        facts = {"not_restored": odd[name], "disk_bytes": sizes[name], "n_entries": arm.n_entries}
        rows[name] = {"seconds": medians, **facts}
        told = ", ".join(f"{key} {value:.3f} s" for key, value in medians.items())
        print(
            f"{dtype} {name:<6} {arm.n_entries:>9,} numbers, {sizes[name] / 1e6:.1f} MB; {told}; "
            f"{odd[name]:,} weights not restored",
            flush=True,
        )
    return rows


def _loading(arm: Arm, base: nn.Module, folder: Path) -> Callable[[], object]:
    return lambda: arm.load(base, folder)


def _add(table: dict[str, list[float]], name: str, seconds: float, k: int) -> None:
    if k:
        table.setdefault(name, []).append(seconds)


def n_other(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> int:
    """Return how many weights have other bits than in the base."""
    n = 0
    for name, held in weights.items():
        as_bits = {2: torch.int16, 4: torch.int32}[held.element_size()]
        n += int((held.detach().view(as_bits) != base[name].detach().view(as_bits)).sum())
    return n


def main() -> None:
    """Measure each type of weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 round instead of 9")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the weights")
    parser.add_argument("--model", help="folder of another model; SmolLM2-135M by default")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    repeats = 1 if arguments.quick else 9
    found = {d: measure(d, arguments.model, repeats) for d in arguments.dtypes.split(",")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"model": arguments.model or "SmolLM2-135M", "density": DENSITY}
    print(json.dumps({"benchmark": "merging", **facts, "dtypes": found}))


if __name__ == "__main__":
    main()
