"""Progress on a terminal: one bar per phase, with rate and time left."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from selectune.progress import Advance


class _RateColumn(ProgressColumn):
    """How many units a second, as rich measures it over the last half minute."""

    def render(self, task: Task) -> Text:
        """Return the rate, once there is one."""
        if task.speed is None:
            return Text("")
        return Text(f"{rate(task.speed)} {task.fields['unit']}/s")


def rate(per_second: float) -> str:
    """Return a rate with two or three digits that mean something."""
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"


def duration(seconds: float) -> str:
    """Return a time as a person says it: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@dataclass
class Bars:
    """Bars that vanish when their phase is done and leave one line behind.

    Args:
        console: the terminal they are drawn on.
    """

    console: Console
    _bars: Progress = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the columns."""
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> "Bars":
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Clear what is still drawn."""
        self._bars.stop()

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Generator[Advance]:
        """Show a bar while the phase lasts."""
        start = time.monotonic()
        bar = self._bars.add_task(escape(name), total=total, unit=unit)
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self._bars.advance(bar, n)

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)
            self._bars.refresh()  # or the next line printed would draw the old bar once more
        seconds = time.monotonic() - start
        counted = f": {done} {unit}" if done else ""
        speed = f" ({rate(done / seconds)} {unit}/s)" if done and seconds > 1 else ""
        self.note(f"{name}{counted} in {duration(seconds)}{speed}")

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(text, markup=False, highlight=False)
