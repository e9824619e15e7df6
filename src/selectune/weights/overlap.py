"""How much two choices of weights have in common, beside what chance alone would give.

chance = k_a * k_b / n    jaccard = |A & B| / |A | B|    signs: share of A & B that moved alike
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from selectune.errors import SelectionError
from selectune.weights.delta import SparseDelta
from selectune.weights.mask import WeightMask

Chosen: TypeAlias = WeightMask | SparseDelta
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class Shared:
    """What two choices share in some part of a model.

    Args:
        n_eligible: weights that could be chosen.
        n_first: chosen by the first.
        n_second: chosen by the second.
        n_both: chosen by both.
        n_alike: of these, moved in the same direction by both; None where masks are compared.
            Weights that either delta leaves where they are count as not alike.
    """

    n_eligible: int
    n_first: int
    n_second: int
    n_both: int
    n_alike: int | None = None

    @property
    def jaccard(self) -> float:
        """Of what any of the two chose, the share that both did; 1 where neither chose any."""
        either = self.n_first + self.n_second - self.n_both
        return self.n_both / either if either else 1.0

    @property
    def by_chance(self) -> float:
        """How many both would be expected to choose if they chose blindly."""
        return self.n_first * self.n_second / max(1, self.n_eligible)

    @property
    def sign_agreement(self) -> float | None:
        """The share of what both chose that moved in the same direction; None where unknown."""
        return self.n_alike / self.n_both if self.n_both and self.n_alike is not None else None

    def __add__(self, other: "Shared") -> "Shared":
        alike = (self.n_alike, other.n_alike)
        return Shared(
            self.n_eligible + other.n_eligible,
            self.n_first + other.n_first,
            self.n_second + other.n_second,
            self.n_both + other.n_both,
            None if alike[0] is None or alike[1] is None else alike[0] + alike[1],
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "n_eligible": self.n_eligible,
            "n_first": self.n_first,
            "n_second": self.n_second,
            "n_both": self.n_both,
            "by_chance": self.by_chance,
            "jaccard": self.jaccard,
            "sign_agreement": self.sign_agreement,
        }


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two choices share: of all weights, per layer, and per type of module.

    Args:
        total: of everything that could be chosen.
        layers: by the number in a parameter's name; "outside" for those without.
        modules: by the module's own name, such as "q_proj".
    """

    total: Shared
    layers: Mapping[str, Shared]
    modules: Mapping[str, Shared]

    def __repr__(self) -> str:
        t = self.total
        signs = "" if t.sign_agreement is None else f", {t.sign_agreement:.1%} of them alike"
        return (
            f"Overlap({t.n_both:,} of {t.n_first:,} and {t.n_second:,}, {t.by_chance:,.1f} by "
            f"chance, Jaccard {t.jaccard:.3f}{signs})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "total": self.total.to_json(),
            "layers": {name: shared.to_json() for name, shared in self.layers.items()},
            "modules": {name: shared.to_json() for name, shared in self.modules.items()},
        }


def overlap(first: Chosen, second: Chosen) -> Overlap:
    """Compare two masks, two deltas, or one of each.

    Args:
        first: what one method chose, or what one training changed.
        second: what the other did. Chance counts the tensors that either could choose from; a
            delta knows only those that it changes.

    Raises:
        SelectionError: they belong to different base models.
    """
    shapes = {**first.shapes, **second.shapes}
    odd = [n for n in first.shapes if first.shapes[n] != shapes[n]]
    if first.base != second.base or odd:
        raise SelectionError(
            "the two choices were made for different base models",
            why=f"the shapes of {odd[0]} differ"
            if odd
            else f"their fingerprints are {first.base} and {second.base}",
        )
    total, layers, modules = Shared(0, 0, 0, 0, 0), dict[str, Shared](), dict[str, Shared]()
    for name, shape in shapes.items():
        here = _shared(first, second, name, prod(shape))
        total += here
        for table, key in ((layers, _layer(name)), (modules, _module(name))):
            table[key] = table[key] + here if key in table else here
    return Overlap(total, layers, modules)


def _shared(first: Chosen, second: Chosen, name: str, n_eligible: int) -> Shared:
    nothing = torch.zeros(0, dtype=torch.int64)
    a, b = (c.indices[name].long() if name in c.indices else nothing for c in (first, second))
    # Both ascend, each once: a place of `a` is in `b` where it would be put in.
    at = torch.searchsorted(b, a).clamp(max=max(0, len(b) - 1))
    is_both = b[at] == a if len(b) else torch.zeros(len(a), dtype=torch.bool)
    alike: int | None = None
    if isinstance(first, SparseDelta) and isinstance(second, SparseDelta):
        alike = 0
        if bool(is_both.any()):
            signs: list[Tensor] = [
                first.deltas[name][is_both].sign(),
                second.deltas[name][at[is_both]].sign(),
            ]
            alike = int((signs[0].float() * signs[1].float() > 0).sum())
    return Shared(n_eligible, len(a), len(b), int(is_both.sum()), alike)


def _layer(name: str) -> str:
    found = _NUMBER.search(name)
    return found[1] if found else "outside"


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name
