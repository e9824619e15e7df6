"""What a step cost: seconds and peak memory of the process, and of the accelerator."""

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Measured:
    """A context that measures; read it after it has closed.

    Where Linux lets a process reset its high-water mark, `peak_bytes` is of the step alone;
    elsewhere it is of the process so far.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0

    def __enter__(self) -> "Measured":
        with suppress(OSError):
            _CLEAR.write_text("5")  # resets VmHWM
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = peak_rss()
        if torch.cuda.is_available():
            self.device_peak_bytes = torch.cuda.max_memory_allocated()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "device_peak_bytes": self.device_peak_bytes,
        }


def peak_rss() -> int:
    """Return the most resident memory of this process since its mark was last reset, in bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
