"""What the page of a comparison shows, as plain values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from selectune.offsite.table import OffsiteTable
from selectune.report.weight_facts import TransferFacts

Ends = tuple[float, float, float]  # a value and the ends of its 95 % interval
ALL_TASKS = "mean"
BASE, RANDOM = "base", "random"


def tone_of(against_random: Ends | None) -> str:
    """Return whether a difference in loss leaves no doubt: good below zero, bad above, else even.

    Args:
        against_random: answer loss less that of random; None where there is none.
    """
    if against_random is None:
        return "even"
    _, low, high = against_random
    return "good" if high < 0 else "bad" if low > 0 else "even"


def won_lost(against_random: Iterable[Ends | None]) -> tuple[int, int]:
    """Return on how many tasks a method is better than random beyond doubt, and on how many worse.

    Args:
        against_random: answer loss less that of random, task by task.
    """
    tones = [tone_of(ends) for ends in against_random]
    return tones.count("good"), tones.count("bad")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCell:
    """One method on one task, over all seeds.

    Args:
        task: the task, or "mean" for all of them together.
        method: its name; "base" for the untouched base.
        losses: held-out answer loss of each seed, nats per token.
        accuracy: share of held-out questions, mean over seeds; None without options.
        against_random: answer loss less that of random; None for base and random.
        accuracy_against_random: the same for accuracy.
        over_base: answer loss less that of the base; None for the base.
        learning_rate: as used; None for the base, or where tasks differ.
        epochs: likewise.
        seconds: to choose the examples and train one model, mean over seeds; None for the base.
    """

    task: str
    method: str
    losses: Sequence[float]
    accuracy: float | None = None
    against_random: Ends | None = None
    accuracy_against_random: Ends | None = None
    over_base: Ends | None = None
    learning_rate: float | None = None
    epochs: int | None = None
    seconds: float | None = None

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return sum(self.losses) / len(self.losses)

    @property
    def tone(self) -> str:
        """Return whether it is better than random as far as can be told: good, bad or even."""
        return tone_of(self.against_random)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """What training did to plain text.

    Args:
        method: "base" for the untouched base.
        nats_per_token: of its models, mean.
        over_base: the same less the base's; None for the base.
        against_random: less random's; None for base and random.
    """

    method: str
    nats_per_token: float
    over_base: Ends | None = None
    against_random: Ends | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFacts:
    """A comparison.

    Args:
        title: what it is called.
        seeds: of its runs.
        cells: by task, then by method.
        transfers: what tuning on one task did to the others, where that was asked for.
        texts: what it did to plain text, likewise.
        tried: answer loss on the targets held aside, by method, tasks, learning rate and epochs;
            None where training failed.
        cells_folder: where each cell's recipe lies.
        notes: on the settings, such as how alike the ranks of cheaper gradient passes are.
        offsite: what tuning on emulators won, a table per metric.
    """

    title: str
    seeds: Sequence[int]
    cells: Sequence[GridCell]
    transfers: Sequence[TransferFacts] = ()
    texts: Sequence[TextFacts] = ()
    tried: Sequence[tuple[str, str, float, int, float | None]] = ()
    cells_folder: str = ""
    notes: Sequence[str] = ()
    offsite: Sequence[OffsiteTable] = ()

    def at(self, task: str, method: str) -> GridCell:
        """Return one cell.

        Raises:
            KeyError: there is none.
        """
        return {(cell.task, cell.method): cell for cell in self.cells}[task, method]

    @property
    def tasks(self) -> list[str]:
        """The tasks, all of them together last."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def main_task(self) -> str:
        """The task that the verdict is about: all together, where there are several."""
        return self.tasks[-1]

    @property
    def methods(self) -> list[str]:
        """Every row but the base, random first."""
        return [m for m in dict.fromkeys(cell.method for cell in self.cells) if m != BASE]

    @property
    def rivals(self) -> list[str]:
        """The methods that are compared with random."""
        found = {cell.method for cell in self.cells if cell.against_random is not None}
        return [method for method in self.methods if method in found]
