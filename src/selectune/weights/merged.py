"""What deltas overwrote in a model, and how its weights go from one set of deltas to another."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from selectune.errors import ConfigError, CoverageError
from selectune.weights.base import base_weights, flat
from selectune.weights.delta import SparseDelta, wide

_HANDLE = "merged_deltas"


@dataclass(frozen=True, slots=True)
class Part:
    """One delta that is merged, and by how much."""

    delta: SparseDelta
    scale: float


@dataclass(slots=True)
class Merged:
    """What is merged into a model; kept on it as `model.merged_deltas`.

    Args:
        base: fingerprint of the weights without any delta.
        parts: by a hash of the delta's content, in that order.
        overwritten: per parameter, the entries that deltas touch, and what the base has there.
    """

    base: str
    parts: dict[str, Part] = field(default_factory=dict[str, Part])
    overwritten: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[Tensor, Tensor]]
    )


def merged(model: nn.Module) -> Merged | None:
    """Return what is merged into a model, None for a bare base."""
    return vars(model).get(_HANDLE)


@torch.no_grad()
def change(model: nn.Module, handle: Merged, parts: Mapping[str, Part]) -> None:
    """Have exactly these parts merged; after an error, those that were."""
    before = handle.parts
    names = _names(part for k, part in before.items() if parts.get(k) is not part)
    names += _names(part for k, part in parts.items() if before.get(k) is not part)
    weights = base_weights(model)
    rows = {name: _row(name, weights[name]) for name in dict.fromkeys(names)}
    done: list[str] = []
    try:
        handle.parts = {key: parts[key] for key in sorted(parts)}
        for name, row in rows.items():
            done.append(name)
            _rewrite(name, row, handle)
    except BaseException:
        handle.parts = before
        for name in done:
            _rewrite(name, rows[name], handle)
        raise
    if handle.parts:
        setattr(model, _HANDLE, handle)
    elif merged(model) is not None:
        # The next merge hashes the weights again: by then they may have been trained.
        delattr(model, _HANDLE)


def _names(parts: Iterable[Part]) -> list[str]:
    return [name for part in parts for name in part.delta.indices]


def _row(name: str, weight: Tensor) -> Tensor:
    try:
        return flat(weight)
    except RuntimeError as error:
        raise CoverageError(
            f"{name} cannot be changed in place",
            why="its entries do not lie one after another",
            do=f"make it contiguous first: model.get_parameter({name!r}).data = "
            "its .contiguous() copy",
        ) from error


def _rewrite(name: str, row: Tensor, handle: Merged) -> None:
    """Bring one parameter to its base, then to the sum of the parts that touch it."""
    if name in handle.overwritten:
        places, values = handle.overwritten[name]
        row[places.to(row.device).long()] = values.to(row.device)
    parts = [part for part in handle.parts.values() if name in part.delta.indices]
    if not parts:
        handle.overwritten.pop(name, None)
        return
    indices = [part.delta.indices[name] for part in parts]
    union = indices[0] if len(parts) == 1 else torch.cat(indices).unique()
    places = union.to(row.device).long()
    values = row[places]
    handle.overwritten[name] = (union, values.cpu())
    # A copy: in fp32 the sum would otherwise grow in what is kept of the base.
    total = wide(values).clone()
    for part, index in zip(parts, indices, strict=True):
        delta = part.scale * part.delta.deltas[name].to(total)
        is_alone = len(parts) == 1
        total[... if is_alone else torch.searchsorted(union, index).to(row.device)] += delta
    weight = total.to(row.dtype)
    if not bool(weight.isfinite().all()):
        raise ConfigError(
            f"a weight of {name} would not be a finite number of type {row.dtype}",
            where="scale",
            why=f"the scales are {', '.join(str(part.scale) for part in parts)}",
            do="use a smaller scale",
        )
    row[places] = weight


def n_moved(model: nn.Module) -> int:
    """Return how many weights differ in a stored bit from the base below the merged deltas."""
    handle, weights = merged(model), base_weights(model)
    if handle is None:
        return 0
    moved = 0
    for name, (places, values) in handle.overwritten.items():
        live = flat(weights[name]).cpu()[places.long()]
        n_bytes = live.element_size()
        # As bytes: -0 equals 0, and is another weight all the same.
        is_same = live.view(torch.uint8) == values.view(torch.uint8)
        moved += int((~is_same.view(-1, n_bytes).all(1)).sum())
    return moved
