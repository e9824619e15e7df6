"""What several benchmarks share."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selectune.progress import Advance

# glibc keeps what is freed, and its habits would be measured in place of ours.
_ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def child(script: str, *words: str) -> dict[str, Any]:
    """Measure memory in a process of its own: the script's last line, as JSON."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(times: list[float], to: list[float]) -> float:
    """Return the median ratio of neighbours, so that a busy machine slows both."""
    return round(statistics.median(a / b for a, b in zip(times, to, strict=True)), 3)


def look_trained(model: nn.Module) -> None:
    """Fill what peft leaves at 0 in new LoRA factors, where no gradient would reach the others."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)


class Stopwatch:
    """A progress that remembers when each phase began, by `time.perf_counter`."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Generator[Advance]:
        """Note the start of one phase."""
        self.began[name] = time.perf_counter()
        yield lambda n: None

    def note(self, text: str) -> None:
        """Say nothing."""
