"""Which layers an emulator has, in its own numbers and in those of the original."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from selectune.errors import SelectionError
from selectune.offsite.layout import Layout
from selectune.offsite.pieces import Absent, CompressedLayer, MiddleLayer, SameAs


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The layers of an emulator, first to last; made by `of`.

    Attributes:
        positions: for each, its place in the original.
        sources: for each, the layer of the original whose weights it runs; another than its
            position where it is shared.
        adapters: the emulator's indices of the layers that train.
    """

    positions: tuple[int, ...]
    sources: tuple[int, ...]
    adapters: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, middle: Mapping[int, MiddleLayer]) -> "Arrangement":
        """Return how the emulator of a layout is made up.

        Args:
            layout: which layers of the original train.
            middle: what became of each of the others.

        Raises:
            SelectionError: `middle` does not say it for exactly the middle layers, or a layer
                shares the weights of one that the emulator does not have.
        """
        if set(middle) != set(layout.middle):
            raise SelectionError(
                "what becomes of the middle is not said for exactly its layers",
                where=f"layers {sorted(middle)}",
                why=f"the middle is the layers {list(layout.middle)}",
            )
        trained = set(layout.adapters)
        held = {j: j for j in layout.adapters}
        for j, layer in middle.items():
            match layer:
                case CompressedLayer(original):
                    held[j] = original
                    if original != j:
                        raise _mixed(j, f"it is given what was made of layer {original}")
                case SameAs(original):
                    if not isinstance(middle.get(original), CompressedLayer):
                        raise _mixed(j, f"layer {original} is no middle layer that is kept")
                    held[j] = original
                case Absent():
                    pass
        positions = tuple(sorted(held))
        return cls(
            positions,
            tuple(held[j] for j in positions),
            tuple(i for i, j in enumerate(positions) if j in trained),
        )

    @property
    def places(self) -> dict[int, int]:
        """Index in the original -> index in the emulator, of the positions that it has."""
        return {j: i for i, j in enumerate(self.positions)}

    @property
    def shared(self) -> dict[int, int]:
        """Index of a layer -> of the one whose weights it runs, both in the emulator."""
        places = self.places
        pairs = enumerate(zip(self.positions, self.sources, strict=True))
        return {i: places[source] for i, (position, source) in pairs if source != position}

    def entries_of(self, values: Sequence[object]) -> list[object]:
        """Return the emulator's entries of a list with one for each layer of the original."""
        return [values[j] for j in self.sources]


def _mixed(j: int, why: str) -> SelectionError:
    return SelectionError(f"layer {j} cannot stand in the emulator", where="middle", why=why)
