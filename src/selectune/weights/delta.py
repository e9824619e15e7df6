"""What tuning changed in single weights: an immutable value that saves, loads and checks itself.

    weight = cast(fp32(base) + scale * delta)

is the one formula of everything here. A difference of two rounded numbers does not always add back
to the second one, so `seal` rewrites live weights by this formula before they are saved: what is
loaded is then what was live, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selectune.errors import IncompatibleRunError, SelectionError, TrainingError
from selectune.weights.base import base_fingerprint, base_weights, linear_maps
from selectune.weights.mask import WeightMask

Stored: TypeAlias = Literal["float32", "bfloat16"]
Indices: TypeAlias = Literal["plain", "gaps"]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of weights that a delta can be added to.
TYPES = {**STORED, "float16": torch.float16, "float64": torch.float64}
# Of weights that have fewer bits and scales beside them: a delta acts beside them.
QUANTISED = "quantised"


@dataclass(frozen=True, slots=True, eq=False)
class SparseDelta:
    """Differences of chosen weights from those of a base model.

    Args:
        indices: per parameter, by its name in the bare base, the changed entries: places in the
            flattened tensor, ascending, int32 (int64 for tensors of 2^31 entries and more).
        deltas: per parameter, what is added to these entries, float32 or bfloat16.
        shapes: of these parameters.
        dtypes: of these parameters in the base, such as "bfloat16".
        base: fingerprint of the base weights; see `base.base_fingerprint`.
        about: plain facts: method, options, density, seed, what the data was.

    Raises:
        SelectionError: indices, deltas, shapes and types do not belong together.
        TrainingError: a delta is not a finite number.
    """

    indices: Mapping[str, Int[Tensor, " _"]]
    deltas: Mapping[str, Float[Tensor, " _"]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    base: str = ""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuse what does not fit together; leave out parameters without a changed entry."""
        indices = WeightMask(self.indices, self.shapes).indices
        deltas = {n: d.detach().cpu() for n, d in sorted(self.deltas.items()) if d.numel()}
        if indices.keys() != deltas.keys() or not indices.keys() <= self.dtypes.keys():
            odd = sorted(indices.keys() ^ deltas.keys() or indices.keys() - self.dtypes.keys())
            raise SelectionError(
                f"{odd[0]} has no indices, no deltas or no type",
                why="each changed parameter has all three",
            )
        for name, delta in deltas.items():
            if any(size < 0 for size in self.shapes[name]):
                raise SelectionError(f"{name} cannot have the shape {self.shapes[name]}")
            if self.dtypes[name] not in (*TYPES, QUANTISED):
                raise SelectionError(
                    f"{name} is of the type {self.dtypes[name]:.80}",
                    why=f"deltas are of weights of the types {', '.join((*TYPES, QUANTISED))}",
                )
            if delta.dtype not in STORED.values() or delta.shape != indices[name].shape:
                raise SelectionError(
                    f"the deltas of {name} do not fit its indices",
                    why=f"they are {delta.dtype} of shape {tuple(delta.shape)} for "
                    f"{indices[name].numel()} entries, not float32 or bfloat16, one for each",
                )
            if not bool(delta.isfinite().all()):
                raise TrainingError(
                    f"a delta of {name} is not a finite number",
                    why="training went astray, or a value does not fit the base's type",
                    do="lower the learning rate, or save an earlier checkpoint",
                )
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "deltas", deltas)
        object.__setattr__(self, "shapes", {n: tuple(self.shapes[n]) for n in indices})
        object.__setattr__(self, "dtypes", {n: self.dtypes[n] for n in indices})

    @property
    def n_entries(self) -> int:
        """How many weights differ from the base, or may."""
        return sum(index.numel() for index in self.indices.values())

    def mask(self) -> WeightMask:
        """Return which weights these are."""
        return WeightMask(self.indices, self.shapes, self.base, self.about)

    def check(self, model: nn.Module, *, where: str = "") -> None:
        """See that a model is the base that the delta was made on; its weights are hashed once.

        Args:
            model: with the weights of the bare base.
            where: the delta's folder, for the message.

        Raises:
            IncompatibleRunError: it is another one.
        """
        self.check_shapes(model, where=where)
        found = base_fingerprint(model)
        if found != self.base:
            raise IncompatibleRunError(
                "the delta was made on another base model",
                where=where,
                why=f"it expects the fingerprint {self.base}, the model has {found}; names, "
                "shapes and types fit, so some of the weights differ",
                do="load the base that was trained, without an adapter merged into it",
            )

    def check_shapes(self, model: nn.Module, *, where: str = "", any_type: bool = False) -> None:
        """See that every changed parameter is there, with its shape and type.

        Args:
            model: with the weights of the bare base.
            where: the delta's folder, for the message.
            any_type: let the types differ.

        Raises:
            IncompatibleRunError: one is not.
        """
        held = {n: (tuple(p.shape), type_name(p.dtype)) for n, p in base_weights(model).items()}
        for name, linear in linear_maps(model).items():
            if linear.is_quantised:
                held[name] = (linear.shape, QUANTISED)
        missing = [n for n in self.indices if n not in held]
        odd = [n for n in self.indices if n in held and held[n][0] != self.shapes[n]]
        if missing or odd:
            first = (missing or odd)[0]
            told = "none" if missing else str(held[first][0])
            raise IncompatibleRunError(
                "the delta was made on another base model",
                where=where,
                why=f"{len(missing)} of its tensors are missing and {len(odd)} have another shape: "
                f"{first} is {self.shapes[first]} in the delta and {told} in the model",
                do=f"load the base with the fingerprint {self.base}",
            )
        if any_type:
            return
        for name, dtype in self.dtypes.items():
            found = held[name][1]
            if found != dtype:
                is_loaded_so = dtype != QUANTISED
                raise IncompatibleRunError(
                    f"the delta was made on {dtype} weights, the model holds {found}",
                    where=where,
                    why=f"it expects the fingerprint {self.base}, which types are part of: "
                    f"{name} would round otherwise"
                    if is_loaded_so
                    else f"it was trained beside the rounding of {name}",
                    do=f"load the base with dtype=torch.{dtype}"
                    if is_loaded_so
                    else "load the quantised base, or take it for what it is elsewhere: "
                    "merge(..., other_base=True)",
                )

    def save(
        self, path: str | Path, *, dtype: Stored | None = None, indices: Indices = "plain"
    ) -> Path:
        """Write the delta; a folder of nothing else is replaced at once.

        Args:
            path: the folder. Where other files stand in it, as a tokenizer's, they stay.
            dtype: of the stored deltas, their own when None: float32 (exact) or bfloat16. Rounding
                them makes the reloaded weights differ from live ones that were sealed without.
            indices: plain takes 4 bytes per entry, gaps about 1 (at a density of 1 %).

        Raises:
            StorageError: the folder cannot be written.
        """
        from selectune.weights.delta_files import write

        return write(self, Path(path), dtype, indices)

    @classmethod
    def load(cls, path: str | Path) -> "SparseDelta":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: it is missing, or a byte is not what was written.
            IncompatibleRunError: a newer version wrote it.
        """
        from selectune.weights.delta_files import read

        return read(Path(path))

    def __len__(self) -> int:
        return self.n_entries

    def __repr__(self) -> str:
        total = sum(prod(shape) for shape in self.shapes.values())
        return (
            f"SparseDelta({self.about.get('method', 'weights')}, {self.n_entries:,} of "
            f"{total:,} weights in {len(self.indices)} tensors)"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDelta):
            return NotImplemented
        mine = (self.base, dict(self.shapes), dict(self.dtypes))
        return (
            mine == (other.base, dict(other.shapes), dict(other.dtypes))
            and all(torch.equal(index, other.indices[n]) for n, index in self.indices.items())
            and all(
                d.dtype == other.deltas[n].dtype and torch.equal(d, other.deltas[n])
                for n, d in self.deltas.items()
            )
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash that follows their content


def add(
    base: Float[Tensor, " k"], delta: Float[Tensor, " k"], scale: float | int = 1.0
) -> Float[Tensor, " k"]:
    """Return the weights that a delta makes of base weights, in the base's type."""
    return (wide(base) + scale * delta.to(wide(base))).to(base.dtype)


@dataclass(frozen=True, slots=True)
class Sealed:
    """Live weights that the formula gives exactly.

    Args:
        delta: to store.
        values: fp32 masters; the weight is `values.to(base.dtype)`.
        n_changed: how many stored weights differ from what they were.
        largest_change: of a stored weight.
    """

    delta: Float[Tensor, " k"]
    values: Float[Tensor, " k"]
    n_changed: int
    largest_change: float


def seal(
    values: Float[Tensor, " k"], base: Float[Tensor, " k"], *, dtype: Stored = "float32"
) -> Sealed:
    """Return the delta to store, and what the live values have to become to equal it.

    Args:
        values: masters of the chosen weights, fp32.
        base: what these weights were before training, in the type of the weight.
        dtype: of the stored delta. With bfloat16 more weights change, and by more.
    """
    held, before = values.detach(), base.detach()
    delta = (held.to(wide(before)) - wide(before)).to(STORED[dtype])
    weight, live = add(before, delta), held.to(before.dtype)
    sealed = wide(before) + delta.to(wide(before))
    gaps = (wide(weight) - wide(live)).abs()
    return Sealed(
        delta,
        sealed.to(torch.float32),
        int((gaps != 0).sum()),
        float(gaps.max()) if gaps.numel() else 0.0,
    )


def wide(weight: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return weights in the type that sums are formed in: fp32, or their own if that is wider."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def type_name(dtype: torch.dtype) -> str:
    """Return a type as it is written in files and messages."""
    return str(dtype).removeprefix("torch.")
