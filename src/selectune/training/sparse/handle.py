"""What a model knows about its chosen entries: `model.sparse`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selectune.errors import IncompatibleRunError
from selectune.training.sparse.entries import DecayTo, Entries, Form
from selectune.training.sparse.exchange import Exchange, exchange, mask_digest
from selectune.training.sparse.routes import Routes
from selectune.weights.delta import Sealed, SparseDelta, Stored
from selectune.weights.mask import WeightMask


@dataclass(slots=True, eq=False)
class Sparse:
    """The chosen entries of a model while they train.

    Args:
        start: which these were when training began.
        base: fingerprint of the weights before training.
        decay_to: what weight decay pulls to.
        entries: by name of the weight in the bare base.
        route: how gradients reach the entries, and what was measured about it.
        form: whether the entries stand in their weights or act beside them.
        trained: which parameters of the base required a gradient before.
        about: plain facts that whoever exchanges entries adds to the mask's.
    """

    start: WeightMask
    base: str
    decay_to: DecayTo
    entries: Mapping[str, Entries]
    route: Routes
    form: Form = "in_place"
    trained: list[nn.Parameter] = field(default_factory=list[nn.Parameter])
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    _mask: WeightMask | None = None  # once entries have been exchanged

    @property
    def mask(self) -> WeightMask:
        """Which entries train now."""
        if not self.is_exchanged:
            return self.start
        if self._mask is None:
            found = {name: e.index.cpu() for name, e in self.entries.items()}
            about = {**self.start.about, **self.about}
            self._mask = WeightMask(found, self.start.shapes, self.start.base, about)
        return self._mask

    @property
    def is_exchanged(self) -> bool:
        """Whether other entries train than when training began."""
        return "started_from" in self.about

    @property
    def routes(self) -> dict[str, str]:
        """The ways that were measured to be the faster ones, by case."""
        return self.route.chosen

    @property
    def n_chosen(self) -> int:
        """How many entries train."""
        return self.start.n_chosen

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the values: all have to ask for what is told."""
        return any(isinstance(e.values, DTensor) for e in self.entries.values())

    def replace(self, name: str, drop: Int[Tensor, " d"], grow: Int[Tensor, " g"]) -> Exchange:
        """Let other entries of a weight train: `drop` goes back to the base, `grow` starts there.

        The values stay one vector of the same length, in the order of the entries: bring along
        what an optimizer keeps about each of them with `Exchange.carry`.

        Args:
            name: of the weight in the bare base.
            drop: entries that train, flat.
            grow: as many that do not.

        Raises:
            SelectionError: no entry of the weight trains, or `drop` and `grow` are not that.
        """
        found = exchange(self.entries, name, drop, grow)
        self._tell_exchanged()
        return found

    def choose(self, indices: Mapping[str, Int[Tensor, " _"]], about: Mapping[str, Any]) -> None:
        """Let exactly these entries train, as many of each weight as before.

        Args:
            indices: of every weight with chosen entries.
            about: what was told about them.
        """
        for name, entries in self.entries.items():
            entries.choose(indices[name])
        self._mask, self.about = None, dict(about)

    def _tell_exchanged(self) -> None:
        self._mask = None
        self.about.setdefault("started_from", mask_digest(self.start))

    def parameters(self) -> list[nn.Parameter]:
        """Return the vectors of values, for an optimizer of one's own."""
        return [e.values for e in self.entries.values()]

    def sync(self) -> None:
        """Bring every weight up to date. Modules do so by themselves whenever they are used."""
        for entries in self.entries.values():
            entries.sync()

    def moved(self) -> int:
        """Return how many chosen entries are stored with other bits than in the base."""
        return sum(entries.n_moved() for entries in self.entries.values())

    def __repr__(self) -> str:
        told = "sharded" if self.is_sharded else f"{self.moved():,} moved"
        return f"Sparse({self.mask!r}, {told})"

    def delta(self) -> SparseDelta:
        """Return what training has changed so far; the model stays as it is."""
        return self._delta({name: e.sealed() for name, e in self.entries.items()})

    def seal(self, dtype: Stored = "float32") -> tuple[SparseDelta, int, float]:
        """Make the live weights equal what their delta will give when it is loaded.

        Args:
            dtype: of the stored deltas.

        Returns:
            The delta, how many stored weights changed for it, and the largest change.
        """
        sealed = {name: e.sealed(dtype) for name, e in self.entries.items()}
        delta = self._delta(sealed)  # before anything changes: it refuses what is not finite
        for name, entries in self.entries.items():
            entries.take(sealed[name].delta)
        return (
            delta,
            sum(part.n_changed for part in sealed.values()),
            max(part.largest_change for part in sealed.values()),
        )

    def load(self, delta: SparseDelta) -> None:
        """Take the values of a saved delta; its entries too, where training exchanged some.

        Raises:
            IncompatibleRunError: it is of another base, or of other entries.
        """
        origin = delta.about.get("started_from")
        is_heir = origin is not None and origin == mask_digest(self.start)
        if (
            is_heir
            and delta.base == self.base
            and _sizes(delta.indices) == _sizes(self.start.indices)
        ):
            self.choose(delta.indices, {k: v for k, v in delta.about.items() if k not in _OWN})
        mine, theirs = self.mask.indices, delta.indices
        is_same = mine.keys() == theirs.keys() and all(
            torch.equal(index, theirs[name].to(index)) for name, index in mine.items()
        )
        if delta.base != self.base or not is_same:
            raise IncompatibleRunError(
                "the delta is of other weights than those that train here",
                where="sparse.load",
                why=f"it was made on base {delta.base}, this is {self.base}"
                if delta.base != self.base
                else f"it has {delta.n_entries:,} entries, of which not all are among the "
                f"{self.n_chosen:,} here",
                do="sparsify the base that it was made on with its own mask, `delta.mask()`",
            )
        for name, entries in self.entries.items():
            entries.take(delta.deltas[name])

    def _delta(self, sealed: Mapping[str, Sealed]) -> SparseDelta:
        return SparseDelta(
            indices=self.mask.indices,
            deltas={name: part.delta for name, part in sealed.items()},
            shapes={name: e.shape for name, e in self.entries.items()},
            dtypes={name: e.dtype for name, e in self.entries.items()},
            base=self.base,
            about={
                "density": self.mask.density,
                **self.mask.about,
                "n_chosen": self.n_chosen,
                "n_moved": self.moved(),
                "decay_to": self.decay_to,
                **self._formed(),
                **self._scored(),
            },
        )

    def identity(self) -> dict[str, Any]:
        """Return what values are worthless without: base, first mask, and what they mean."""
        digest = mask_digest(self.start)
        return {"base": self.base, "mask": digest, "decay_to": self.decay_to, **self._formed()}

    def _formed(self) -> dict[str, Any]:
        return {} if self.form == "in_place" else {"form": self.form}

    def _scored(self) -> dict[str, Any]:
        is_own = self.start.base in ("", self.base)
        return {} if is_own else {"scored_on": self.start.base}


# What deltas say about themselves.
_OWN = ("density", "n_chosen", "n_moved", "decay_to", "form", "scored_on")


def _sizes(indices: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: index.numel() for name, index in indices.items()}
