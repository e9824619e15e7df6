"""When entries are chosen anew while they train, and how many.

    after step t (counted from 1)     a phase begins when (t + 1) mod every = 0, ends when
                                      t mod every = accumulate; the first begins before step 1
    at the end of a phase             a share of the entries is exchanged: all at the first, else
                                      rate * (1 - t / n_steps)

Source  The release of SpIEL, arXiv 2401.16405.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from selectune.errors import ConfigError
from selectune.training.method import Method, Scene

Fall: TypeAlias = Literal["linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """When entries are exchanged, and how many.

    Attributes:
        every: steps from one exchange to the next.
        accumulate: steps after a multiple of `every` at which one happens.
        rate: share of the entries where training begins.
        fall: how the share falls to 0.
        n_steps: of the training.
    """

    every: int
    accumulate: int
    rate: float
    fall: Fall
    n_steps: int

    def begins(self, t: int) -> bool:
        """Tell whether a phase begins after t steps."""
        return (t + 1) % self.every == 0

    def ends(self, t: int) -> bool:
        """Tell whether a phase ends after t steps."""
        return t % self.every == self.accumulate

    def share(self, t: int) -> float:
        """Return which share of the entries goes after t steps."""
        if t == self.accumulate:
            return 1.0  # what was drawn at random gives way to what gradients say
        done = min(1.0, t / self.n_steps)
        if self.fall == "cosine":
            return self.rate / 2 * (1 + math.cos(math.pi * done))
        return self.rate * (1 - done)

    def count(self, t: int, k: int) -> int:
        """Return how many of k entries go after t steps."""
        # 0.2 * (1 - 3 / 4) * 20 is a little less than 1.
        return math.floor(self.share(t) * k + 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanging(Method):
    """The options of methods that exchange entries; a subclass gives `start`."""

    every: Annotated[int, Field(ge=3, description="steps from one exchange to the next")] = 20
    accumulate: Annotated[
        int, Field(ge=1, description="steps after a multiple of `every` at which one happens")
    ] = 5
    rate: Annotated[
        float, Field(ge=0, le=1, description="share exchanged, falling to 0 at the last step")
    ] = 0.2
    fall: Annotated[Fall, Field(description="how the share falls")] = "linear"
    steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="optimizer steps in all; null: as the trainer says"),
    ] = None

    def __post_init__(self) -> None:
        """Refuse phases that would overlap.

        Raises:
            ConfigError: `accumulate` is too long.
        """
        if self.accumulate > self.every - 2:
            raise ConfigError(
                f"accumulate={self.accumulate} does not fit into every={self.every}",
                where=type(self).__name__,
                why="a phase begins one step before a multiple of `every`, after the last one's "
                "end",
                do=f"use accumulate={self.every - 2} or less, or a larger every",
            )

    def schedule(self, scene: Scene) -> Schedule:
        """Return when entries are exchanged, and how many.

        Raises:
            ConfigError: neither the options nor the trainer say how long training is.
        """
        n_steps = scene.n_steps if self.steps is None else self.steps
        if n_steps is None:
            raise ConfigError(
                f"{type(self).__name__} does not know how long training is",
                where="steps",
                why="the share of entries that it exchanges falls to 0 at the end",
                do="give it steps=, the number of optimizer steps",
            )
        return Schedule(self.every, self.accumulate, self.rate, self.fall, n_steps)
