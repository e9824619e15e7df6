"""What several benchmarks share."""

import time
from collections.abc import Generator
from contextlib import contextmanager

from selectune.progress import Advance


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
