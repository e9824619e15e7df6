"""How a long step tells what it is doing, without knowing who listens."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

Advance = Callable[[int], None]


@runtime_checkable
@runtime_checkable
class Progress(Protocol):
    """Where the steps of a run report to."""

    def phase(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """Open one phase; the value it yields is called with the number of units just done.

        Args:
            name: what is being done, such as "score pool".
            total: how many units there are; None when nobody knows.
            unit: what is counted, in the plural, such as "examples".
        """
        ...

    def note(self, text: str) -> None:
        """Say one line worth knowing."""
        ...


class Silent:
    """A progress that says nothing: for libraries, tests and pipes."""

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Generator[Advance]:
        """Count nothing."""
        yield _ignore

    def note(self, text: str) -> None:
        """Say nothing."""


def _ignore(n: int) -> None:
    """Take the count and drop it."""
