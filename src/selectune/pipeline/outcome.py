"""What any step of a run, or of an owner's recipe, has to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found: plain values for a program, sentences for a person."""

    facts: Mapping[str, Any]
    text: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dict(self.facts)

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        return list(self.text)
