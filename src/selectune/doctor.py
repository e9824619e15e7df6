"""What this machine offers, whether its parts fit together, and how exact its gradients are."""

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from packaging.requirements import Requirement

State = Literal["ok", "note", "problem"]

# Gradients of one example, in a batch and alone, agree to rounding in fp32; a backend that is off
# by more than this mixes up examples or computes in lower precision than it says.
NOISE_LIMIT = 1e-4
_GIB = 2**30
_FEW_GIB = 2 * _GIB


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was looked at.

    Args:
        name: what.
        value: what was found.
        state: "ok"; "note": works, but know it; "problem": will fail.
        advice: what to do about it.
    """

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Doctor:
    """What was found.

    Args:
        facts: all that was looked at, in order.
        gradient_noise: largest relative difference between an example's gradient computed in a
            padded batch and alone, over the examples of a tiny random Llama in fp32.
    """

    facts: tuple[Fact, ...]
    gradient_noise: float

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of a run."""
        return all(fact.state != "problem" for fact in self.facts)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "ok": self.ok,
            "gradient_noise": self.gradient_noise,
            "facts": [asdict(fact) for fact in self.facts],
        }

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        width = max(len(fact.name) for fact in self.facts)
        marks = {"ok": "  ", "note": "? ", "problem": "! "}
        lines: list[str] = []
        for fact in self.facts:
            lines.append(f"{marks[fact.state]}{fact.name:<{width}}  {fact.value}")
            if fact.advice:
                lines.append(f"{'':<{width + 4}}{fact.advice}")
        lines.append("all is well" if self.ok else "something stands in the way: see the lines !")
        return lines


def doctor(folder: Path | None = None) -> Doctor:
    """Look at the machine; takes a few seconds and no network.

    Args:
        folder: where runs will be written; None: the current folder.
    """
    noise = gradient_noise()
    facts = [
        *_versions(),
        *_device(),
        *_threads(),
        *_room(folder or Path()),
        *_network(),
        Fact("chromium", "not needed: a report is one HTML file, for any browser"),
        _noise(noise),
    ]
    return Doctor(tuple(facts), noise)


def gradient_noise(n_examples: int = 6, seed: int = 0) -> float:
    """Return the largest relative difference of a gradient computed in a batch and alone.

    Args:
        n_examples: examples of unequal length in the batch.
        seed: of the weights and the tokens.

    Returns:
        max over examples of |g_batch - g_alone| / |g_alone|, over all parameters together; alone
        is autograd's own gradient of the one-example loss.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from selectune.data.collate import Batch
    from selectune.gradients.engine import GradientEngine, example_loss
    from selectune.gradients.kernels import Rows

    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        ).eval()
        lengths = [4 + 3 * k for k in range(n_examples)]
        tokens = [torch.randint(0, 64, (length,)) for length in lengths]
    n_columns = max(lengths)
    ids = torch.zeros(n_examples, n_columns, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for k, (length, row) in enumerate(zip(lengths, tokens, strict=True)):
        ids[k, :length] = row
        mask[k, :length] = 1
        labels[k, 1:length] = row[1:]

    def batch(rows: slice, width: int) -> Batch:
        names = tuple(str(k) for k in range(n_examples))[rows]
        return Batch(names, ids[rows, :width], mask[rows, :width], labels[rows, :width])

    together: dict[str, torch.Tensor] = {}

    def keep(name: str, rows: Rows) -> None:
        together[name] = rows.dense().detach().clone()

    GradientEngine(model).run(batch(slice(None), n_columns), keep)
    worst = 0.0
    for k, length in enumerate(lengths):
        model.zero_grad(set_to_none=True)
        loss = example_loss(model, batch(slice(k, k + 1), length)).sum()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        error = norm = 0.0
        for name, parameter in model.named_parameters():
            alone = parameter.grad
            if alone is not None:
                error += float((together[name][k] - alone).double().square().sum())
                norm += float(alone.double().square().sum())
        worst = max(worst, (error / norm) ** 0.5)
    return worst


def _versions() -> Iterator[Fact]:
    yield Fact("python", platform.python_version())
    try:
        texts = metadata.requires("selectune") or []
    except metadata.PackageNotFoundError:
        yield Fact(
            "selectune",
            "run from its sources",
            "note",
            "the tested ranges of its parts are known once it is installed: pip install -e .",
        )
        texts = ["torch", "transformers", "peft", "accelerate", "safetensors", "pyarrow"]
    else:
        yield Fact("selectune", metadata.version("selectune"))
    for text in texts:
        need = Requirement(text)
        if need.marker is not None and need.marker.evaluate({"extra": "dev"}):
            continue  # what only developers of selectune need
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield _version(need, "missing", "problem")
        else:
            yield _version(need, "not installed (optional)", "ok")


def _version(need: Requirement, absent: str, state: State) -> Fact:
    tested = ",".join(sorted(map(str, need.specifier), reverse=True))
    wanted = f"pip install '{need.name}{tested}'"
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Fact(need.name, absent, state, wanted if state == "problem" else "")
    if not tested:
        return Fact(need.name, found)
    if need.specifier.contains(found, prereleases=True):
        return Fact(need.name, f"{found} (tested {tested})")
    return Fact(need.name, f"{found}, outside the tested {tested}", "note", wanted)


def _device() -> Iterator[Fact]:
    import torch

    from selectune.models import choose_device, choose_precision, cpu_has_fast_bf16

    device = choose_device("auto")
    precision = choose_precision("auto", device)
    if device.type == "cuda":
        card = cast(Any, torch.cuda.get_device_properties(device))  # pyright: ignore[reportUnknownMemberType]
        yield Fact("device", f"cuda: {card.name}, {card.total_memory / _GIB:.0f} GiB")
        in_hardware = torch.cuda.is_bf16_supported()
    else:
        yield Fact("device", f"cpu: {_cpu_name()}")
        in_hardware = cpu_has_fast_bf16()
    share = _bf16_share(device.type)
    yield Fact(
        "bfloat16",
        f"{'in hardware' if in_hardware else 'not in hardware'}; "
        f"a matrix product takes {share:.2f} of its float32 time",
    )
    why = "fast here, and half the memory" if precision == "bfloat16" else "bfloat16 is emulated"
    yield Fact("model.dtype auto", f"{precision}: {why}")


def _bf16_share(device: str) -> float:
    """Return the time of a bf16 matrix product as a share of the fp32 one's, here and now."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype, device=device)
        # `item` waits until a GPU has really computed.
        return min(_timed(lambda: (a @ a)[0, 0].item()) for _ in range(20))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _threads() -> Iterator[Fact]:
    import torch

    n_threads = torch.get_num_threads()
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    too_many = n_threads > (n_cores or n_threads)
    yield Fact(
        "threads",
        f"{n_threads} of torch on {n_cores} cores",
        "note" if too_many else "ok",
        f"set OMP_NUM_THREADS={n_cores}: more threads than cores wait for each other"
        if too_many
        else "",
    )


def _room(folder: Path) -> Iterator[Fact]:
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit, lower than the machine's
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
        free = min(free, total)
    yield Fact(
        "memory",
        f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB",
        "note" if free < _FEW_GIB else "ok",
        "a 135M model needs about 2 GiB; `selectune plan` says what yours needs"
        if free < _FEW_GIB
        else "",
    )
    disk = shutil.disk_usage(folder)
    yield Fact(
        "disk",
        f"{disk.free / _GIB:.1f} GiB free in {folder.resolve()}",
        "note" if disk.free < _FEW_GIB else "ok",
        "a run stops when the disk is full; nothing finished is lost" * (disk.free < _FEW_GIB),
    )
    if not os.access(folder, os.W_OK):
        yield Fact("folder", f"{folder.resolve()} cannot be written", "problem", "set output=...")


def _network() -> Iterator[Fact]:
    from huggingface_hub import constants

    yield Fact(
        "hub",
        "offline (HF_HUB_OFFLINE): local folders and what is cached"
        if constants.is_offline_mode()
        else "allowed: names that are no local path are looked up on the Hugging Face Hub",
    )
    yield Fact(
        "telemetry",
        "off" if constants.HF_HUB_DISABLE_TELEMETRY else "on, as HF_HUB_DISABLE_TELEMETRY asks",
    )


def _noise(noise: float) -> Fact:
    text = f"{noise:.1e} relative, batch against one by one (float32, tiny Llama)"
    if noise <= NOISE_LIMIT:
        return Fact("gradient noise", text)
    return Fact(
        "gradient noise",
        text,
        "problem",
        f"expected at most {NOISE_LIMIT:.0e}: switch TF32 and other reduced precision off, "
        "or report it with this table",
    )


def _cpu_info() -> str:
    file = Path("/proc/cpuinfo")  # Linux; elsewhere platform must do
    return file.read_text() if file.is_file() else ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", _cpu_info(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
