"""What the page tells of single weights: plain values; any part may be missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChosenWeights:
    """Which weights one arm trained.

    Args:
        arm: its name.
        eligible: weights of each tensor that could be chosen, in the order of the model.
        chosen: chosen ones of each tensor; tensors without any may be left out.
        about: what the mask says of itself: method, scope, budget, n_zero, silent, n_examples.
        n_moved: chosen weights whose stored bits training changed; None where it is not known.
    """

    arm: str
    eligible: Mapping[str, int]
    chosen: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    n_moved: int | None = None

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        for name, n in self.chosen.items():
            if name not in self.eligible or not 0 <= n <= self.eligible[name]:
                raise ValueError(
                    f"{name}: {n} weights chosen of {self.eligible.get(name, 'none')} eligible"
                )
        if self.n_moved is not None and not 0 <= self.n_moved <= self.n_chosen:
            raise ValueError(f"{self.n_moved} of {self.n_chosen} chosen weights moved")

    @property
    def n_chosen(self) -> int:
        """Weights that train."""
        return sum(self.chosen.values())

    @property
    def n_eligible(self) -> int:
        """Weights that could."""
        return sum(self.eligible.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightPlane:
    """Weights counted in cells of |weight| (rows) by |gradient| (columns).

    Args:
        statistic: what stands for the gradient, such as "mean_gradient".
        magnitude: exponents of ten at the edges of the rows; the first row holds exact zeros.
        gradient: those of the columns, alike.
        eligible: all weights that could be chosen.
        chosen: those that each arm trained.
        outside: weights of each arm that are not counted here.
    """

    statistic: str
    magnitude: Sequence[float]
    gradient: Sequence[float]
    eligible: Int[np.ndarray, "m g"]
    chosen: Mapping[str, Int[np.ndarray, "m g"]]
    outside: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        """Refuse tables that do not fit their axes, and more chosen than there are."""
        shape = (len(self.magnitude), len(self.gradient))  # edges: one more than cells, plus zeros
        for name, counts in {"eligible": self.eligible, **self.chosen}.items():
            if counts.shape != shape or bool((counts < 0).any() | (counts > self.eligible).any()):
                raise ValueError(f"{name}: counts do not fit {shape[0]} by {shape[1]} cells")

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "WeightPlane":
        """Return the plane that plain values describe."""
        return cls(
            statistic=found["statistic"],
            magnitude=found["magnitude"],
            gradient=found["gradient"],
            eligible=np.asarray(found["eligible"], np.int64),
            chosen={arm: np.asarray(c, np.int64) for arm, c in found["chosen"].items()},
            outside=found["outside"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """What the choices of two arms have in common.

    Args:
        first: name of an arm.
        second: name of another.
        n_eligible: weights that could be chosen.
        n_first: chosen by the first.
        n_second: chosen by the second.
        n_both: chosen by both.
        sign_agreement: share of these that training moved in the same direction; None: not known.
    """

    first: str
    second: str
    n_eligible: int
    n_first: int
    n_second: int
    n_both: int
    sign_agreement: float | None = None

    @property
    def jaccard(self) -> float:
        """Of what any of the two chose, the share that both did; 1 where neither chose any."""
        either = self.n_first + self.n_second - self.n_both
        return self.n_both / either if either else 1.0

    @property
    def by_chance(self) -> float:
        """How many two blind choices of these sizes would share."""
        return self.n_first * self.n_second / max(1, self.n_eligible)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferFacts:
    """What tuning on one task did to the others, averaged over a round-robin of tasks.

    Args:
        arm: name of the method.
        scoring: how answers were judged: "generated" or "likelihood".
        n_seeds: models tuned on each task.
        base: accuracy of the untouched base, by task.
        estimates: value and ends of its 95 % interval by metric; None where it is undefined.
        by_task: values by the task trained on and metric.
        n_undefined: trained tasks without a forget ratio.
    """

    arm: str
    scoring: str
    n_seeds: int
    base: Mapping[str, float]
    estimates: Mapping[str, tuple[float, float, float] | None]
    by_task: Mapping[str, Mapping[str, float | None]]
    n_undefined: int = 0

    @classmethod
    def of(cls, arm: str, found: Mapping[str, Any]) -> "TransferFacts":
        """Return the facts that plain values describe."""
        return cls(
            arm=arm,
            scoring=found["scoring"],
            n_seeds=found["n_seeds"],
            base=found["base"],
            estimates={
                metric: None if e is None else (e["value"], e["low"], e["high"])
                for metric, e in found["estimates"].items()
            },
            by_task=found["by_task"],
            n_undefined=found["n_undefined"],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightFacts:
    """Everything that the page tells of single weights.

    Args:
        chosen: what each arm trained, the most important first.
        plane: where the chosen weights stand among all.
        shared: what pairs of arms have in common.
        transfers: what each method did to other tasks.
    """

    chosen: Sequence[ChosenWeights] = ()
    plane: WeightPlane | None = None
    shared: Sequence[SharedWeights] = ()
    transfers: Sequence[TransferFacts] = ()
