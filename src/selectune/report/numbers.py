"""How the report writes numbers: few digits, units in words, a true minus sign."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """What a column of the evaluation means.

    Args:
        label: heading.
        unit: unit of a level, "" where the number speaks for itself.
        sign: +1 if higher is better, -1 if lower is better, 0 if not known.
        is_share: a number in 0..1, written in percent.
    """

    label: str
    unit: str
    sign: int
    is_share: bool = False

    def level(self, value: float) -> str:
        """Return a level, such as "4.52" or "51.0 %"."""
        if not math.isfinite(value):
            return "not a number"
        return percent(value) if self.is_share else decimal(value)

    def interval(self, low: float, high: float) -> str:
        """Return the ends of an interval of levels."""
        if self.is_share:
            return f"[{100 * low:.1f}, {100 * high:.1f}]"
        return f"[{decimal(low)}, {decimal(high)}]"

    def change(self, value: float) -> str:
        """Return a difference in words: "0.214 lower", "3.0 points higher"."""
        size = f"{abs(100 * value):.1f} points" if self.is_share else f"{abs(value):.3f}"
        if float(size.split()[0]) == 0:
            return "no difference"
        return f"{size} {'higher' if value > 0 else 'lower'}"

    def change_interval(self, value: float, low: float, high: float) -> str:
        """Return the ends of an interval in the direction that `change` names.

        "0.214 lower" goes with [0.054, 0.374]: a negative end means the other direction.
        """
        scale, digits = (100, 1) if self.is_share else (1, 3)
        if value < 0:
            low, high = -high, -low
        ends = (f"{scale * end:.{digits}f}".replace("-", "−") for end in (low, high))
        return f"[{', '.join(ends)}]"


_METRICS = {
    "answer_loss": Metric("Answer loss", "nats per token", -1),
    "correct_raw": Metric("Accuracy, raw", "", 1, is_share=True),
    "correct_norm": Metric("Accuracy, length-normalised", "", 1, is_share=True),
}


def metric(name: str) -> Metric:
    """Return what is known of a metric; a strange one is shown without a judgement."""
    return _METRICS.get(name, Metric(name, "", 0))


def decimal(value: float) -> str:
    """Return a number with 2 decimals, or 3 digits where it is small or large."""
    if not math.isfinite(value):
        return "not a number"
    if value and (abs(value) < 0.01 or abs(value) >= 1e5):
        return f"{value:.2e}".replace("-", "−")
    return f"{value:.{0 if abs(value) >= 1000 else 2}f}".replace("-", "−")


def tick(value: float, step: int | float) -> str:
    """Return an axis label with the digits that `step` needs."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.0e}".replace("-", "−")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """Return a share of 0..1 in percent with one decimal."""
    return f"{100 * share:.1f}\u202f%"


def count(n: int, noun: str = "") -> str:
    """Return "1,050 examples", "1 example"."""
    return f"{n:,}" + (f" {noun}{'' if n == 1 else 's'}" if noun else "")


def duration(seconds: int | float) -> str:
    """Return seconds as a person says them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def size(n_bytes: int) -> str:
    """Return bytes in decimal units."""
    value = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return (
                f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"
            )
        value /= 1000
    return f"{value:,.1f} TB"


def ticks(low: int | float, high: int | float, about: int = 5) -> tuple[list[float], float]:
    """Return round numbers within [low, high] and their distance."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low], 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)], step
