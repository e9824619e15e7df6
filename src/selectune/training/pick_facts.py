"""What the layers picked in one optimizer step, kept for the record."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_STATS = ("alignment_mean", "alignment_std", "max_z")


@dataclass(slots=True, eq=False)
class Seen:
    """What one layer did in one step; tensors stay on the device until the step ends."""

    picked: list[Bool[Tensor, " _"]] = field(default_factory=list[Tensor])
    stats: list[Float[Tensor, "3"]] = field(default_factory=list[Tensor])  # mean, std, max |z|
    tokens: list[Int[Tensor, " _"]] = field(default_factory=list[Tensor])


def pick_facts(seen: dict[int, Seen], places: Sequence[int], *, is_scored: bool) -> dict[str, Any]:
    """Return a step's facts as plain values, None for layers that were not active.

    Args:
        seen: what each active layer did, by its index.
        places: indices of all layers, in order.
        is_scored: whether the picks looked at alignments.
    """
    done = {i: seen[i] for i in places if i in seen and seen[i].picked}
    facts: dict[str, Any] = {"active": sorted(done)}
    stats = {i: torch.stack(s.stats).mean(0).tolist() for i, s in done.items()}
    for k, key in enumerate(_STATS if is_scored else ()):
        facts[key] = [stats[i][k] if i in stats else None for i in places]
    facts["tokens"] = [
        int(sum(t.sum() for t in done[i].tokens)) if i in done else None for i in places
    ]
    facts["picks"] = {
        str(i): "".join("1" if x else "0" for x in torch.cat(s.picked).tolist())
        for i, s in done.items()
    }
    return facts
