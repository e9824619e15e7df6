"""Which layers of a model its data owner trains, and which an emulator stands in for."""

from collections.abc import Sequence
from dataclasses import dataclass

from selectune.errors import SelectionError

# What Offsite-Tuning trains at either end (arXiv 2302.04870).
_ENDS = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """The split of a model's layers; made by `of`, which checks it.

    Attributes:
        n_layers: of the original.
        adapters: original indices of the layers that train, sorted.
    """

    n_layers: int
    adapters: tuple[int, ...]

    @classmethod
    def of(cls, n_layers: int, adapters: Sequence[int] | None = None) -> "Layout":
        """Return the layout with these layers as adapter.

        Args:
            n_layers: decoder blocks of the original.
            adapters: their indices, negative ones counted from the end; None for the first two and
                the last two.

        Raises:
            SelectionError: an index is out of range or named twice, none is named, or no layer is
                left for the emulator.
        """
        if adapters is None:
            if n_layers <= 2 * _ENDS:
                raise SelectionError(
                    f"a model of {n_layers} layers has no middle between its first {_ENDS} and "
                    f"last {_ENDS}",
                    where="adapters",
                    why="the emulator stands in for the layers between them",
                    do="name the layers that train, such as adapters=[0, -1]",
                )
            adapters = (*range(_ENDS), *range(-_ENDS, 0))
        return cls(n_layers, _checked(n_layers, adapters))

    @property
    def middle(self) -> tuple[int, ...]:
        """Original indices of the layers that an emulator stands in for, sorted."""
        trained = set(self.adapters)
        return tuple(j for j in range(self.n_layers) if j not in trained)


def _checked(n_layers: int, adapters: Sequence[int]) -> tuple[int, ...]:
    where = f"adapters={list(adapters)}"
    place: dict[int, int] = {}
    for index in adapters:
        if not -n_layers <= index < n_layers:
            raise SelectionError(
                f"there is no layer {index}",
                where=where,
                why=f"the model has {n_layers} layers",
                do=f"use indices from 0 to {n_layers - 1}, or from {-n_layers} to -1",
            )
        at = index % n_layers
        if at in place:
            raise SelectionError(
                f"layer {at} is named twice",
                where=where,
                why=f"{place[at]} and {index} are the same layer"
                if place[at] != index
                else "a layer trains or does not",
                do=f"name layer {at} once",
            )
        place[at] = index
    if not place:
        raise SelectionError(
            "no layer is named as adapter",
            where=where,
            why="the data owner would have nothing to train",
            do="name at least one, or leave `adapters` out for the first and last two",
        )
    if len(place) == n_layers:
        raise SelectionError(
            f"all {n_layers} layers are named as adapter",
            where=where,
            why="no layer would be left for the emulator: the whole model would be handed over",
            do="leave out the layers that must not leave the house",
        )
    return tuple(sorted(place))
