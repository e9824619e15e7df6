"""Deltas in the weights of a base, and out again: bit for bit, in any order.

What a merge overwrites is kept, so that taking a delta out writes back instead of subtracting:
up to a third of bf16 weights would not survive a subtraction. Where several deltas touch the same
entry, their sum is formed in fp32 in an order that depends on the deltas alone:

    weight = cast(fp32(base) + scale_1 * delta_1 + scale_2 * delta_2 + ...)
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from selectune.errors import ConfigError, CoverageError, IncompatibleRunError, SelectionError
from selectune.weights.base import base_fingerprint, linear_maps
from selectune.weights.delta import TYPES, SparseDelta
from selectune.weights.merged import Merged, Part, change, merged
from selectune.weights.merged_files import load_unmerged

Delta: TypeAlias = SparseDelta | str | Path


def merge(
    model: nn.Module | str | Path,
    delta: Delta | Sequence[Delta],
    *,
    scale: float | int | Sequence[float | int] = 1.0,
    other_base: bool = False,
) -> nn.Module:
    """Add one or several deltas to the weights of their base, in place.

    Args:
        model: the base, or where to load it from; may hold deltas already.
        delta: deltas, or the folders they are saved in.
        scale: what each is multiplied by; one number is for all.
        other_base: take deltas that were made on other values or types of weights with the same
            names and shapes, such as those that their base was quantised from. What comes out is
            then close to what was trained, not the same.

    Returns:
        The model. `unmerge` gives it back its own weights.

    Raises:
        IncompatibleRunError: a delta was made on another base.
        SelectionError: a delta is merged already.
        ConfigError: there is no delta or no scale for one, or a weight would not be finite.
        CoverageError: a weight cannot be changed in place, as quantised ones cannot.
    """
    deltas: list[Delta] = [delta] if isinstance(delta, SparseDelta | str | Path) else list(delta)
    scales = [scale] * len(deltas) if isinstance(scale, float | int) else list(scale)
    if not deltas or len(scales) != len(deltas):
        raise ConfigError(
            f"there are {len(scales)} scales for {len(deltas)} deltas",
            where="merge",
            do="give at least one delta, and one scale for all or for each",
        )
    loaded = [read(d) for d in deltas]
    held = load_base(model, loaded[0]) if isinstance(model, str | Path) else model
    places = ["" if isinstance(d, SparseDelta) else str(d) for d in deltas]
    handle = merged(held)
    base = handle.base if handle else ""
    for made, place in zip(loaded, places, strict=True):
        base = _check(held, made, base, place, other_base=other_base)
    parts = dict(handle.parts) if handle else {}
    for made, factor in zip(loaded, scales, strict=True):
        key = identity(made)
        if key in parts:
            raise SelectionError(
                f"{made!r} is merged already",
                why="a delta is added once",
                do="unmerge it first, or merge it with scale=2",
            )
        parts[key] = Part(made, float(factor))
    change(held, handle or Merged(base), parts)
    return held


def unmerge(model: nn.Module | str | Path, delta: Delta | None = None) -> nn.Module:
    """Take a delta out of the weights, or all of them: what it overwrote is written back.

    Args:
        model: that deltas were merged into, or the folder that `save_merged` wrote.
        delta: which; None for all. A folder knows only the base and the sum.

    Raises:
        SelectionError: it is not merged.
    """
    if isinstance(model, str | Path):
        if delta is not None:
            raise SelectionError(
                "one delta alone cannot be taken out of a saved model",
                where=str(model),
                why="the folder keeps what the base had, not the deltas",
                do="unmerge all, then merge what should stay",
            )
        return load_unmerged(model)
    handle = _merged(model)
    parts = {} if delta is None else _without(handle, read(delta))
    change(model, handle, parts)
    return model


def switch(model: nn.Module, old: Delta, new: Delta, *, scale: float | int = 1.0) -> nn.Module:
    """Replace one merged delta by another; only the entries of these two are touched.

    Args:
        model: that `old` was merged into.
        old: to take out.
        new: to put in.
        scale: what `new` is multiplied by.

    Raises:
        IncompatibleRunError: `new` was made on another base.
        SelectionError: `old` is not merged, or `new` is.
    """
    handle, made = _merged(model), read(new)
    parts = _without(handle, read(old))
    _check(model, made, handle.base, "" if isinstance(new, SparseDelta) else str(new))
    key = identity(made)
    if key in parts:
        raise SelectionError(f"{made!r} is merged already", do="unmerge the old delta instead")
    change(model, handle, {**parts, key: Part(made, float(scale))})
    return model


def read(delta: Delta) -> SparseDelta:
    """Return a delta, loaded if it is named by its folder."""
    return delta if isinstance(delta, SparseDelta) else SparseDelta.load(delta)


def identity(delta: SparseDelta) -> str:
    """Return a hash of what a delta does, by which it is found again and put in order."""
    digest = hashlib.sha256(delta.base.encode())
    for name, index in delta.indices.items():
        held = delta.deltas[name]
        digest.update(f"{name}:{held.dtype}:{len(index)}".encode())
        for tensor in (index, held):
            content: Any = tensor.contiguous().view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()


def load_base(path: str | Path, delta: SparseDelta) -> nn.Module:
    """Load the base of a delta, in the type that it was made on."""
    from transformers import AutoModelForCausalLM

    kinds = set(delta.dtypes.values())
    dtype = TYPES.get(kinds.pop(), "auto") if len(kinds) == 1 else "auto"
    try:
        return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'the base "{path}" cannot be loaded',
            where=str(path),
            why=str(error).strip().split("\n", 1)[0],
            do="give a folder that `save_pretrained` wrote, or a name on the Hub",
        ) from error


def _merged(model: nn.Module) -> Merged:
    handle = merged(model)
    if handle is None:
        raise SelectionError(
            "no delta is merged into this model",
            why="only what `merge` put in can be taken out",
            do="call selectune.merge first",
        )
    return handle


def _without(handle: Merged, delta: SparseDelta) -> dict[str, Part]:
    key = identity(delta)
    if key not in handle.parts:
        raise SelectionError(
            f"{delta!r} is not merged into this model",
            why=f"merged are {', '.join(repr(part.delta) for part in handle.parts.values())}",
        )
    return {k: part for k, part in handle.parts.items() if k != key}


def _check(
    model: nn.Module, delta: SparseDelta, base: str, place: str, *, other_base: bool = False
) -> str:
    """See that a delta fits, and return the fingerprint of the base; "" for not known yet."""
    if not base:
        _refuse_sparse(model)
    _refuse_quantised(model, delta)
    if other_base:
        delta.check_shapes(model, where=place, any_type=True)
        return base or base_fingerprint(model)
    if not base:
        delta.check(model, where=place)
        return delta.base
    delta.check_shapes(model, where=place)
    if delta.base != base:
        raise IncompatibleRunError(
            "the delta was made on another base model",
            where=place,
            why=f"it expects the fingerprint {delta.base}, the model has {base} below the deltas "
            "that are merged into it",
            do="merge only deltas of one base",
        )
    return base


def _refuse_quantised(model: nn.Module, delta: SparseDelta) -> None:
    linears = linear_maps(model)
    quantised = [n for n in delta.indices if n in linears and linears[n].is_quantised]
    if quantised:
        raise CoverageError(
            "no delta can be added to quantised weights",
            where=quantised[0],
            why=f"{len(quantised)} of the {len(delta.indices)} weights that it changes are stored "
            "in steps that are larger than what it adds",
            do='let it act beside them: sparsify(model, delta.mask(), form="compose"), then '
            "model.sparse.load(delta); or merge it into the base that they were quantised from, "
            "with other_base=True",
        )


def _refuse_sparse(model: nn.Module) -> None:
    """Refuse a model whose chosen weights train: the next step would write over the merge."""
    for name, module in model.named_modules():
        keys = dict(module.named_parameters(recurse=False))
        for key in keys:
            if f"{key}_values" in keys:
                raise SelectionError(
                    "the weights of this model are being trained in place",
                    where=f"{name}.{key}",
                    why="the next step of training would overwrite what is merged",
                    do="merge into a base that was loaded anew",
                )
