"""What offsite tuning won, told of one run: the models at hand, and how far they are apart.

ZS              the original, untouched      FT     the original, tuned in the open
emulator ZS     the emulator, untouched      EFT    the emulator with what was tuned on it
PI              the original with what was tuned on the emulator
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selectune.evaluation import Evaluation, Interval, Metric, compare_paired, together
from selectune.tables import aligned, signed

Who = Literal["zs", "ft", "emulator", "eft", "pi"]
Answers = Mapping[Who, Mapping[str, Evaluation]]  # and by task
Difference = Literal["delta", "gain", "lost"]

TITLES: Mapping[Who, str] = {
    "zs": "ZS",
    "ft": "FT",
    "emulator": "emulator ZS",
    "eft": "EFT",
    "pi": "PI",
}
_PAIRS: Mapping[Difference, tuple[Who, Who]] = {
    "delta": ("pi", "eft"),
    "gain": ("pi", "zs"),
    "lost": ("pi", "ft"),
}


@dataclass(frozen=True, slots=True)
class Standing:
    """The answers of all models at hand, and their differences over all questions.

    Attributes:
        answers: by model, then task.
        differences: delta (PI - EFT), gain (PI - ZS) and lost (PI - FT), as far as both models
            are at hand, by metric. Delta stands only beside ZS: a bad emulator buys it cheaply.
    """

    answers: Answers
    differences: Mapping[Difference, Mapping[Metric, Interval]]

    @property
    def is_harmed(self) -> bool:
        """Whether the plugged model is surely worse than the untouched one, by answer loss."""
        gain = self.differences.get("gain")
        return gain is not None and gain["answer_loss"].low > 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "answers": {
                who: {task: one.to_json() for task, one in by_task.items()}
                for who, by_task in self.answers.items()
            },
            "differences": {
                name: {metric: one.to_json() for metric, one in by_metric.items()}
                for name, by_metric in self.differences.items()
            },
            "is_harmed": self.is_harmed,
        }

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        body = [
            (TITLES[who], task, f"{one.answer_loss:.3f}", _share(one.accuracy), str(one.n))
            for who in TITLES
            for task, one in self.answers.get(who, {}).items()
        ]
        lines = aligned(("model", "task", "answer loss", "accuracy", "n"), body)
        for name, by_metric in self.differences.items():
            one, other = (TITLES[who] for who in _PAIRS[name])
            title = "Δ = PI − EFT" if name == "delta" else f"{one} − {other}"
            told = [
                f"{'answer loss' if metric == 'answer_loss' else 'accuracy'} "
                f"{signed(found.mean_difference, found.low, found.high)}"
                for metric, found in by_metric.items()
            ]
            lines.append(f"{title:<13}{'; '.join(told)}")
        missing = [TITLES[who] for who in TITLES if who not in self.answers]
        if missing:
            lines.append(f"not at hand: {', '.join(missing)}")
        if self.is_harmed:
            lines.append("PI is worse than ZS: what was tuned on this emulator harms the model")
        return lines


def standing(answers: Answers, *, n_boot: int = 10_000, seed: int = 0) -> Standing:
    """Return where a plugged model stands.

    Args:
        answers: of the models at hand, to the same questions.
        n_boot: bootstrap draws behind an interval.
        seed: of the draws.

    Raises:
        DataError: two models that are compared were asked different questions.
    """
    joined = {who: together(by_task) for who, by_task in answers.items()}
    differences: dict[Difference, dict[Metric, Interval]] = {}
    for name, (one, other) in _PAIRS.items():
        if not {one, other, "zs"} <= joined.keys():
            continue
        metrics: list[Metric] = ["answer_loss"]
        if joined[one].accuracy is not None:
            metrics.append("correct_norm")
        differences[name] = {
            metric: compare_paired(
                joined[one], joined[other], n_boot=n_boot, seed=seed, metric=metric
            )
            for metric in metrics
        }
    return Standing(answers, differences)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
