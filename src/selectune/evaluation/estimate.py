"""A number with its interval."""

from dataclasses import asdict, dataclass

LEVELS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is beyond the noise of questions and seeds."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)
