"""How the gradient of a weight reaches its chosen entries, and which way is the faster one.

    gather    the dense gradient is formed, read at the chosen entries and freed
    sampled   a product of inputs and output gradients at the chosen entries alone
    columns   where whole input channels are chosen: a small dense product

The choice depends on shape, type, density, tokens and device, so it is measured: the first
backward pass of each case does both and keeps the clock's answer. A resumed run is told the
answers of the first one, as the two ways round differently.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectune.gradients.kernels import Pattern, exact

Route: TypeAlias = Literal["auto", "gather", "sampled", "columns"]
# Where both ways take about as long, the one without a dense gradient is the better.
_IN_FAVOUR = 1.1


@runtime_checkable
class Chosen(Protocol):
    """The chosen entries of one weight, as far as gradients go."""

    @property
    def index(self) -> Int[Tensor, " k"]:
        """Flat places, ascending."""
        ...

    @property
    def channels(self) -> Int[Tensor, " c"] | None:
        """The input channels, where whole ones are chosen and nothing else."""
        ...

    @property
    def input_axis(self) -> int | None:
        """Which axis of the matrix the inputs lie on."""
        ...

    def pattern(self) -> Pattern:
        """The entries as compressed rows."""
        ...


@dataclass(slots=True)
class Routes:
    """Which way the gradients of one model take.

    Args:
        asked: a way for all linear modules, or auto. Other modules always gather.
        chosen: the answers so far, by case.
        clock: seconds; counts up.
    """

    asked: Route = "auto"
    chosen: dict[str, str] = field(default_factory=dict[str, str])
    clock: Callable[[], float] = time.perf_counter
    n_dense: int = 0  # gradients of whole weights that were formed
    n_alive: int = 0
    most_alive: int = 0  # at once

    def takes_columns(self, entries: Chosen) -> bool:
        """Tell whether only the chosen channels of the inputs are needed."""
        return entries.channels is not None and self.asked in ("auto", "columns")

    def gathered(self, entries: Chosen, dense: Callable[[], Tensor]) -> Float[Tensor, " k"]:
        """Read a dense gradient at the chosen entries; it lives no longer than that."""
        with self.dense():
            flat = dense().reshape(-1)
            return exact(flat[entries.index.to(flat.device)])

    @contextmanager
    def dense(self) -> Generator[None]:
        """Count a dense gradient for as long as it lives."""
        self.n_dense += 1
        self.n_alive += 1
        self.most_alive = max(self.most_alive, self.n_alive)
        try:
            yield
        finally:
            self.n_alive -= 1

    def product(
        self, entries: Chosen, left: Float[Tensor, "t r"], right: Float[Tensor, "t c"]
    ) -> Float[Tensor, " k"]:
        """Return the chosen entries of left^T right, by the way that was asked for.

        Args:
            entries: of the matrix [r, c].
            left: a row for each token; with `takes_columns` and input axis 0, the chosen channels.
            right: the same, with input axis 1.
        """
        if self.takes_columns(entries):
            return exact((left.mT @ right).flatten())
        ways: dict[str, Callable[[], Tensor]] = {
            "sampled": lambda: entries.pattern().sampled(left, right),
            "gather": lambda: self.gathered(entries, lambda: left.mT @ right),
        }
        if self.asked in ways:
            return ways[self.asked]()
        case = _case(entries, left, right)
        if case not in self.chosen:
            self.chosen[case] = self._faster(ways, left.device)
        return ways[self.chosen[case]]()

    def _faster(self, ways: dict[str, Callable[[], Tensor]], device: torch.device) -> str:
        seconds: dict[str, float] = {}
        for name, way in ways.items():
            way()  # the first call pays for what later ones find done
            _wait(device)
            start = self.clock()
            way()
            _wait(device)
            seconds[name] = self.clock() - start
        return "sampled" if seconds["sampled"] <= _IN_FAVOUR * seconds["gather"] else "gather"


def _case(entries: Chosen, left: Tensor, right: Tensor) -> str:
    n_rows, n_cols = left.shape[1], right.shape[1]
    density = entries.index.numel() / (n_rows * n_cols)
    kind = str(left.dtype).removeprefix("torch.")
    return (
        f"{n_rows}x{n_cols} {kind} on {left.device.type}, "
        f"{_power(density)} of its entries, {_power(left.shape[0])} tokens"
    )


def _power(value: float | int) -> str:
    """Return the next power of two: cases within a factor of two are one."""
    return f"2^{ceil(log2(value))}" if value > 0 else "0"


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
