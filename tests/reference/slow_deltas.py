"""Gap coding, merging and overlap once more, in plain loops over single entries."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from selectune.weights.delta import SparseDelta


def read_gaps(data: Sequence[int], n_entries: int) -> list[int]:
    """Return the indices that a gap-coded stream holds, bit by bit."""
    b, stream = data[0], "".join(f"{byte:08b}" for byte in data[1:])
    n_low = -(-n_entries * b // 8) * 8
    low, unary = stream[:n_low], stream[n_low:]
    found: list[int] = []
    place, at = -1, 0
    for entry in range(n_entries):
        bits = low[entry * b : (entry + 1) * b]  # the lowest first
        gap = sum(1 << i for i, bit in enumerate(bits) if bit == "1")
        while unary[at] == "0":
            gap += 1 << b
            at += 1
        at += 1
        place += gap + 1
        found.append(place)
    return found


def merged_weights(
    base: Mapping[str, Tensor], parts: Sequence[tuple[SparseDelta, float]]
) -> dict[str, Tensor]:
    """Return what several deltas make of a base, in the given order, one entry at a time."""
    found: dict[str, Tensor] = {}
    for name, weight in base.items():
        row = weight.detach().clone().flatten()
        for i in range(row.numel()):
            total = row[i].to(torch.promote_types(row.dtype, torch.float32))
            is_touched = False
            for delta, scale in parts:
                places = delta.indices[name].tolist() if name in delta.indices else []
                if i in places:
                    total = total + scale * delta.deltas[name][places.index(i)].to(total)
                    is_touched = True
            if is_touched:
                row[i] = total.to(row.dtype)
        found[name] = row.view(weight.shape)
    return found


def shared(first: SparseDelta, second: SparseDelta) -> tuple[int, int, int, int]:
    """Return how many entries the first has, the second, both, and how many both moved alike."""
    sets = [
        {(n, i): d for n in c.indices for i, d in zip(c.indices[n].tolist(), c.deltas[n].tolist(),
         strict=True)}
        for c in (first, second)
    ]  # fmt: skip
    both = sets[0].keys() & sets[1].keys()
    alike = [key for key in both if sets[0][key] * sets[1][key] > 0]
    return len(sets[0]), len(sets[1]), len(both), len(alike)
