"""One plain sentence on whether the selection was worth it, and what to try when it was not.

Judged by the answer loss on held-out examples, in nats per token, lower is better: it moves long
before the accuracy of a hundred questions does. Accuracy stands beside it where examples have
options, and a contradiction between the two is said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from selectune.evaluation.intervals import Interval, Metric, compare_seeds
from selectune.evaluation.options import Evaluation

Code = Literal[
    "better_than_random",
    "no_better_than_random",
    "worse_than_random",
    "no_better_than_base",
    "worse_than_base",
    "no_control",
]

_HEADLINES: Mapping[Code, str] = {
    "better_than_random": "Better than random",
    "no_better_than_random": "No better than random",
    "worse_than_random": "Worse than random",
    "no_better_than_base": "No better than not tuning",
    "worse_than_base": "Worse than not tuning",
    "no_control": "Not compared with random",
}

_ADVICE: Mapping[Code, tuple[str, ...]] = {
    "better_than_random": (),
    "no_better_than_random": (
        "Look at the composition of the selection in the report: if its sources mirror the pool's, "
        "the score found nothing that tells the target apart.",
        "Give more target examples, or ones that look more like the held-out questions.",
        "Try another `select.budget`: with little of the pool left out, any selection is much like "
        "a random one; with very little kept, chance decides.",
        "Try another scorer: `selectune methods` lists them, `selectune compare` sets them side by "
        "side.",
        "If the pool holds little that helps this task, random examples will do, and cost nothing.",
    ),
    "worse_than_random": (
        "Read the best-scored examples in the report: if they are near-copies of each other, set "
        "`select.near_duplicates=0.8`.",
        "Keep the selection broad: `select.rule=round_robin`, or `select.quotas` per source.",
        "Raise `select.budget`: a narrow selection is learnt by heart in few epochs.",
        "Try another scorer: `selectune methods` lists them. Until one wins, use random examples.",
    ),
    "no_better_than_base": (
        "Look at the loss curve in the report: if it is still falling at the end, raise "
        "`tune.epochs` or `tune.learning_rate`; if it never falls, the rate is too low.",
        "Raise `select.budget`: there may be too few examples to learn from.",
        "Check that pool rows are written the way held-out rows are: `selectune plan` shows some.",
    ),
    "worse_than_base": (
        "Lower `tune.learning_rate` by a factor of 3 to 10, or set `tune.epochs=1`: a training "
        "loss near zero beside a rising answer loss means learning by heart.",
        "Check that pool rows are written the way held-out rows are (same prompt style, same space "
        "before the answer): `selectune plan` shows some of them with their loss mask.",
        "Raise `select.budget`, or lower `adapter.rank`: fewer weights forget less.",
        "Until this is solved, use the base model as it is.",
    ),
    "no_control": (
        "Run the same command again with `tune.controls=[random] --allow tune.controls`: only a "
        "random choice of the same size shows what the selection adds.",
    ),
}

# Beyond this many held-out examples the difference is too small to be worth proving.
_MOST_EXAMPLES = 100_000

Answers = Evaluation | Sequence[Evaluation]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out.

    Args:
        text: a headline and its numbers, in full sentences.
        code: the same for programs.
        advice: what to try next, most promising first; may be empty.
        intervals: selected minus other, by "random/answer_loss", "base/correct_norm" and so on.
    """

    text: str
    code: Code
    advice: list[str]
    intervals: dict[str, Interval] = field(default_factory=dict[str, Interval])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "text": self.text,
            "code": self.code,
            "advice": self.advice,
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
        }


def verdict(
    selected: Answers,
    random: Answers | None,
    base: Answers | None,
    *,
    n_boot: int = 10_000,
    seed: int = 0,
) -> Verdict:
    """Judge the model tuned on selected examples against random ones and against no tuning.

    Args:
        selected: answers of the model tuned on the selection; a sequence holds one per seed.
        random: those of the control, tuned on as many random examples; None if there is none.
            One that serves all seeds may be given alone.
        base: those of the model before tuning; None if it was not evaluated.
        n_boot: bootstrap draws behind each interval.
        seed: of the draws.

    Returns:
        "Worse than not tuning" when that is shown, whatever random did; then the result against
        random; "no better than not tuning" only when the selection beats random but not the base.
    """
    arms = _several(selected)
    intervals: dict[str, Interval] = {}
    for name, other in (("random", random), ("base", base)):
        if other is None:
            continue
        others = _several(other)
        pairs = list(zip(arms, others * len(arms) if len(others) == 1 else others, strict=True))
        metrics: list[Metric] = ["answer_loss"]
        if arms[0].accuracy is not None:
            metrics.append("correct_norm")
        for metric in metrics:
            interval = compare_seeds(pairs, n_boot=n_boot, seed=seed, metric=metric)
            intervals[f"{name}/{metric}"] = interval
    code = _code(intervals.get("random/answer_loss"), intervals.get("base/answer_loss"))
    texts = [f"{_HEADLINES[code]}."]
    compared = [name for name in ("random", "base") if f"{name}/answer_loss" in intervals]
    texts += [_sentence(name, intervals) for name in compared]
    return Verdict(" ".join(texts), code, _advice(code, intervals, len(arms)), intervals)


def _several(answers: Answers) -> list[Evaluation]:
    return [answers] if isinstance(answers, Evaluation) else list(answers)


def _code(random: Interval | None, base: Interval | None) -> Code:
    if base is not None and base.low > 0:
        return "worse_than_base"
    if random is None:
        return "no_control"
    if random.low > 0:
        return "worse_than_random"
    if random.high >= 0:
        return "no_better_than_random"
    if base is not None and base.high >= 0:
        return "no_better_than_base"
    return "better_than_random"


def _sentence(name: str, intervals: Mapping[str, Interval]) -> str:
    loss = intervals[f"{name}/answer_loss"]
    other = {"random": "random examples of the same budget", "base": "the base model"}[name]
    word = "lower" if loss.mean_difference < 0 else "higher"
    # Said as a positive number of nats "lower" or "higher", with its interval on the same side.
    sign = -1 if loss.mean_difference < 0 else 1
    low, high = sorted((sign * loss.low, sign * loss.high))
    seeds = f", {loss.n_seeds} seeds" if loss.n_seeds > 1 else ""
    text = (
        f"Against {other}, its answer loss is {abs(loss.mean_difference):.3f} nats per token "
        f"{word} [{low:.3f}, {high:.3f}] ({loss.n} held-out examples{seeds})"
    )
    accuracy = intervals.get(f"{name}/correct_norm")
    if accuracy is None:
        return text + "."
    points = [100 * x for x in (accuracy.mean_difference, accuracy.low, accuracy.high)]
    text += (
        f"; its accuracy differs by {points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}]"
    )
    if _contradict(loss, accuracy):
        text += ", which contradicts the loss"
    return text + "."


def _contradict(loss: Interval, accuracy: Interval) -> bool:
    # A lower loss should come with a higher accuracy: differences of one sign point apart.
    same_sign = loss.mean_difference * accuracy.mean_difference > 0
    return loss.excludes_zero and accuracy.excludes_zero and same_sign


def _advice(code: Code, intervals: Mapping[str, Interval], n_seeds: int) -> list[str]:
    advice = list(_ADVICE[code])
    compared = "base" if code == "no_better_than_base" else "random"
    loss = intervals.get(f"{compared}/answer_loss")
    if loss is not None and code.startswith("no_better") and loss.mean_difference < 0:
        half = (loss.high - loss.low) / 2
        needed = math.ceil(loss.n * (half / loss.mean_difference) ** 2)
        if loss.n < needed <= _MOST_EXAMPLES:
            advice.insert(
                0,
                f"The difference seen may be real but small: about {needed} held-out examples "
                f"would settle it; there were {loss.n}.",
            )
    if any(
        _contradict(intervals[f"{name}/answer_loss"], intervals[f"{name}/correct_norm"])
        for name in ("random", "base")
        if f"{name}/correct_norm" in intervals
    ):
        advice.append(
            "Loss and accuracy disagree: decide by the one your use needs, and read some answers."
        )
    if n_seeds == 1 and code in ("better_than_random", "worse_than_random"):
        advice.append(
            "This is one seed: the interval knows the noise of the questions, not that of "
            "training. `selectune compare` repeats it over several."
        )
    return advice
