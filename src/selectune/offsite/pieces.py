"""What stands in for the middle of a model: values that say it, on the CPU, without modules.

    Mapping[int, MiddleLayer]      what became of each middle layer, by its index in the original

A middle layer that is left as it was is `CompressedLayer(original=j, pieces={})`. Tensors have the
dtype of the original weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Two factors in place of one Linear, or of some output features of a fused one."""

    first: Float[Tensor, "r i"]
    second: Float[Tensor, "o r"]
    bias: Float[Tensor, " o"] | None


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """One fused projection (GPT-2's c_attn): parts whose outputs stand one after another."""

    parts: tuple[LowRank, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Narrow:
    """A Linear or Conv1D with fewer inputs or outputs; its weight always in Linear's order."""

    weight: Float[Tensor, "o i"]
    bias: Float[Tensor, " o"] | None


Piece = LowRank | Fused | Narrow


@dataclass(frozen=True, slots=True, eq=False)
class CompressedLayer:
    """A middle layer of which some modules are replaced.

    Attributes:
        original: its index in the original.
        pieces: by module name inside the block, such as "self_attn.q_proj"; the others stay.
    """

    original: int
    pieces: Mapping[str, Piece]


@dataclass(frozen=True, slots=True)
class SameAs:
    """A position that runs the weights of another middle layer, frozen and shared (CRaSh).

    Attributes:
        original: index of that layer in the original.
    """

    original: int


@dataclass(frozen=True, slots=True)
class Absent:
    """A position that is gone (layer drop)."""


MiddleLayer = CompressedLayer | SameAs | Absent
