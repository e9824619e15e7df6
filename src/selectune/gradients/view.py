"""How pool gradients are looked at before they are compared with the targets'."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class View:
    """What the inner products of one gradient pass are taken of.

    Args:
        adam: pool gradients as they are ("none"), or what Adam would make of each; targets stay
            as they are.
        projection: "none" for the space of all trainable numbers, else "rademacher:k" or
            "hadamard:k".
    """

    adam: Literal["none", "release", "textbook"] = "none"
    projection: str = "none"

    @property
    def is_plain(self) -> bool:
        """Whether this is what GIST's store holds."""
        return self == View()
