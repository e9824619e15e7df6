"""Which single weights train: an immutable value that prints, compares, combines and saves."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from selectune.errors import CorruptFileError, IncompatibleRunError, SelectionError
from selectune.files import open_dir, staged

KIND = "weight mask"
_FORMAT = 1
_LONG = 2**31  # tensors of this many entries need int64 indices


@dataclass(frozen=True, slots=True, eq=False)
class WeightMask:
    """Chosen entries of a base model's weights.

    Args:
        indices: per parameter, by its name in the bare base, the chosen entries: places in the
            flattened tensor, ascending, int32 (int64 for tensors of 2^31 entries and more).
            Parameters without a chosen entry may be left out.
        shapes: of every parameter whose entries could have been chosen.
        base: fingerprint of the base weights; see `base.base_fingerprint`.
        about: plain facts: method, options, scope, budget, seed, what the data was.

    Raises:
        SelectionError: indices are out of range, out of order or of unknown parameters.
    """

    indices: Mapping[str, Int[Tensor, " _"]]
    shapes: Mapping[str, tuple[int, ...]]
    base: str = ""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuse indices that stand for nothing."""
        for name, shape in self.shapes.items():
            if any(size < 0 for size in shape):
                raise SelectionError(f"{name} cannot have the shape {list(shape)}")
        for name, index in self.indices.items():
            if name not in self.shapes:
                raise SelectionError(f'"{name}" is no parameter that could have been chosen from')
            numel = prod(self.shapes[name])
            if index.numel() == 0:
                continue
            if int(index[0]) < 0 or int(index[-1]) >= numel or bool((index.diff() <= 0).any()):
                raise SelectionError(
                    f"the chosen entries of {name} are not places in a tensor of {numel}",
                    why="they are ascending, each once, from 0",
                )
        kept = {
            name: self.indices[name].cpu().to(index_dtype(prod(self.shapes[name])))
            for name in sorted(self.indices)
            if self.indices[name].numel()
        }
        object.__setattr__(self, "indices", kept)

    @property
    def n_chosen(self) -> int:
        """How many entries train."""
        return sum(index.numel() for index in self.indices.values())

    @property
    def n_eligible(self) -> int:
        """How many could have been chosen."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """The share that trains of what could."""
        return self.n_chosen / max(1, self.n_eligible)

    def densities(self) -> dict[str, float]:
        """Return the share of chosen entries of every parameter that could be chosen from."""
        return {
            name: (self.indices[name].numel() if name in self.indices else 0) / max(1, prod(shape))
            for name, shape in self.shapes.items()
        }

    def __repr__(self) -> str:
        method = self.about.get("method", "weights")
        return (
            f"WeightMask({method}, {self.n_chosen:,} of {self.n_eligible:,} weights, "
            f"{self.density:.3%}, in {len(self.indices)} of {len(self.shapes)} tensors)"
        )

    def __len__(self) -> int:
        return self.n_chosen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        return (
            self.base == other.base
            and dict(self.shapes) == dict(other.shapes)
            and self.indices.keys() == other.indices.keys()
            and all(torch.equal(index, other.indices[n]) for n, index in self.indices.items())
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash that follows their content

    def __or__(self, other: "WeightMask") -> "WeightMask":
        return self._with(other, lambda a, b: torch.cat([a, b]).unique())

    def __and__(self, other: "WeightMask") -> "WeightMask":
        return self._with(other, lambda a, b: a[torch.isin(a, b)])

    def __sub__(self, other: "WeightMask") -> "WeightMask":
        return self._with(other, lambda a, b: a[~torch.isin(a, b)])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.indices.items())

    def complement(self) -> "WeightMask":
        """Return everything that could have been chosen and was not."""
        found: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            is_free = torch.ones(prod(shape), dtype=torch.bool)
            if name in self.indices:
                is_free[self.indices[name].long()] = False
            found[name] = is_free.nonzero().flatten()
        return WeightMask(found, self.shapes, self.base, {"method": "complement"})

    def save(self, path: str | Path, *, fingerprint: str = "") -> Path:
        """Write the mask to a folder; what stood there is replaced at once.

        Args:
            path: the folder.
            fingerprint: of what the mask was made from, for a run that looks for finished work.

        Raises:
            StorageError: the folder cannot be written.
        """
        meta = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "base": self.base,
            # A list keeps the order of the model.
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "about": dict(self.about),
        }
        with staged(Path(path), kind=KIND, meta=meta) as stage:
            stage.write_tensors("mask.safetensors", dict(self.indices))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "WeightMask":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: a byte is not what was written.
            IncompatibleRunError: a newer version wrote it.
        """
        opened = open_dir(Path(path), kind=KIND)
        meta = opened.meta
        if meta.get("format") != _FORMAT:
            raise IncompatibleRunError(
                f"the mask has format {meta.get('format')}, this version reads {_FORMAT}",
                where=str(path),
                do="update selectune",
            )
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in meta["shapes"]}
            return cls(opened.read_torch("mask.safetensors"), shapes, meta["base"], meta["about"])
        except (KeyError, AttributeError, TypeError, ValueError, SelectionError) as error:
            raise CorruptFileError(
                "the mask does not fit its own description", where=str(path), why=str(error)
            ) from error

    def _with(
        self, other: "WeightMask", combine: Callable[[Tensor, Tensor], Tensor]
    ) -> "WeightMask":
        if self.base != other.base:
            raise SelectionError(
                "the two masks were made for different base models",
                why=f"their fingerprints are {self.base} and {other.base}",
            )
        for name in self.shapes.keys() & other.shapes.keys():
            if self.shapes[name] != other.shapes[name]:
                raise SelectionError(
                    f"the two masks give {name} different shapes",
                    why=f"they are {list(self.shapes[name])} and {list(other.shapes[name])}",
                )
        shapes = {**self.shapes, **other.shapes}
        nothing = torch.zeros(0, dtype=torch.int64)
        found: dict[str, Tensor] = {}
        for name in sorted({*self.indices, *other.indices}):
            mine, theirs = (m.indices.get(name, nothing).long() for m in (self, other))
            found[name] = combine(mine, theirs)
        return WeightMask(found, shapes, self.base, {"method": "combined"})


def index_dtype(numel: int) -> torch.dtype:
    """Return the type of indices into a tensor of so many entries."""
    return torch.int64 if numel >= _LONG else torch.int32
