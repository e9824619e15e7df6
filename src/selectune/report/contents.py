"""What a report is made of: plain values and arrays; any part but the title may be missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from selectune.report.weight_facts import WeightFacts

SELECTED, RANDOM, BASE = "selected", "random", "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the run found.

    Args:
        text: plain sentences; the first is the headline.
        code: `evaluation.verdict`'s code; it decides the colour, an unknown one is neutral.
        advice: what to try next, one sentence each.
    """

    text: str
    code: str
    advice: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One cell of the evaluation: how one arm did on one task's held-out examples.

    Args:
        arm: "selected", "random", "base" or the name of another control.
        task: the target task.
        metric: "answer_loss", "correct_raw", "correct_norm" (shares of 1), or any other name.
        n: held-out examples behind the number.
        value: the mean.
        low: lower end of its 95 % interval; None where there is none.
        high: upper end.
    """

    arm: str
    task: str
    metric: str
    n: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference: mean over held-out examples of (arm - against).

    Args:
        arm: usually "selected".
        against: usually "random" or "base".
        task: the target task.
        metric: as in `Level`.
        n: pairs behind it.
        value: the mean difference; for answer_loss below 0 is better.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    arm: str
    against: str
    task: str
    metric: str
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolTable:
    """One row per pool example, in any order that all columns share (lengths are checked).

    Args:
        ids: the examples.
        sources: where each comes from.
        n_tokens: length of each in tokens, after truncation.
        scores: what ranked them, per target task ("" where one score serves all tasks).
        energy: captured energy in 0..1, per target task; empty for methods without gradients.
    """

    ids: Sequence[str]
    sources: Sequence[str]
    n_tokens: Int[np.ndarray, " _"]
    scores: Mapping[str, Float[np.ndarray, " _"]]
    energy: Mapping[str, Float[np.ndarray, " _"]] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuse columns of different lengths: a join went wrong before."""
        columns: dict[str, Sequence[Any] | np.ndarray] = {
            "sources": self.sources,
            "n_tokens": self.n_tokens,
            **{f"scores of {task!r}": column for task, column in self.scores.items()},
            **{f"energy of {task!r}": column for task, column in self.energy.items()},
        }
        for name, column in columns.items():
            if len(column) != len(self.ids):
                raise ValueError(f"{name}: {len(column)} values for {len(self.ids)} examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpectrum:
    """The directions of one task's target gradients.

    Args:
        task: the target task.
        eigenvalues: of the Gram matrix, descending: squared lengths along each direction.
        rank: how many directions the scores use.
    """

    task: str
    eigenvalues: Sequence[float]
    rank: int


Part = tuple[str, str]  # (role, text), such as ("prompt", "Question: ...")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownExample:
    """A pool example worth reading, and the target that it matches best.

    Args:
        id: its id.
        source: its source.
        origin: file and line, such as "pool.jsonl:12".
        parts: its text, by role; `parts_of` makes them from canonical content.
        score: what ranked it.
        energy: captured energy, None where the method has none.
        is_selected: it was chosen.
        target_task: task of the matched target, "" where no target is matched.
        target_id: id of that target.
        target_parts: its text, by role.
        note: why it was chosen or dropped, in a few words.
    """

    id: str
    source: str
    origin: str
    parts: Sequence[Part]
    score: float
    energy: float | None = None
    is_selected: bool = False
    target_task: str = ""
    target_id: str = ""
    target_parts: Sequence[Part] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenMap:
    """The tokens of one example, and how far each helps a task.

    Args:
        id: of the example.
        task: the target task.
        source: of the example.
        place: among the examples looked at, 1 for the best.
        n: how many these are.
        form: "loss" or "position", how its score was split.
        score: what its tokens add up to.
        tokens: their texts, in order.
        scores: one per token, None where a token has none.
    """

    id: str
    task: str
    source: str
    place: int
    n: int
    form: str
    score: float
    tokens: Sequence[str]
    scores: Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What one step of the run cost.

    Args:
        name: such as "score".
        seconds: wall-clock time.
        peak_bytes: most memory in use during it; None where it was not measured.
        pool_epochs: compute, in forward+backward passes over the whole pool; None: none to speak
            of, or not counted.
        note: such as "reused from an earlier run".
    """

    name: str
    seconds: float
    peak_bytes: int | None = None
    pool_epochs: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingFacts:
    """What a training method did in one arm, step by step.

    A record holds, of "active", "importance", "alignment_mean", "alignment_std", "max_z",
    "target_cosine", "tokens", "picks" and "examples", what applies to its step; the rest is absent.
    Lists have one value per layer, null where the layer was not active.

    Args:
        arm: name of the arm.
        n_layers: layers that train.
        records: step and its facts.
        n_tokens: target tokens of each example, by id; empty where they are not known.
        layers: number of each layer in the model, ascending; empty for 0, 1, ..
        note: what is missing from the records, "" for nothing.
    """

    arm: str
    n_layers: int
    records: Sequence[tuple[int, Mapping[str, Any]]]
    n_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    layers: Sequence[int] = ()
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse lists of another length and layers that nobody named."""
        if self.layers and len(self.layers) != self.n_layers:
            raise ValueError(f"{len(self.layers)} names for {self.n_layers} layers")
        known = set(self.layers or range(self.n_layers))
        for step, facts in self.records:
            for key in PER_LAYER:
                if facts.get(key) is not None and len(facts[key]) != self.n_layers:
                    raise ValueError(
                        f"{key} of step {step}: {len(facts[key])} values for {self.n_layers} layers"
                    )
            if strange := indices_in(facts) - known:
                raise ValueError(f"step {step} names layers {sorted(strange)} that do not train")
            if len({len(picked) for picked in (facts.get("picks") or {}).values()}) > 1:
                raise ValueError(f"picks of step {step}: layers saw different numbers of examples")


PER_LAYER = (
    "importance", "alignment_mean", "alignment_std", "max_z", "target_cosine", "tokens"
)  # fmt: skip


def indices_in(facts: Mapping[str, Any]) -> set[int]:
    """Return the layers that the facts of one step name by number."""
    return {*(facts.get("active") or ()), *map(int, facts.get("picks") or {})}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportData:
    """Everything on the page. Empty parts are left out, and the page says what that means.

    Args:
        title: name of the run.
        pool: the pool and its scores.
        selected_ids: the chosen examples.
        recipe_yaml: the resolved recipe.
        verdicts: per target task ("" for all); empty where nothing was evaluated.
        facts: short facts under the title, label to text (base model, method, seed, ..).
        method: name of the scorer.
        method_summary: one sentence on it, from the registry.
        levels: the evaluation, one row per arm, task and metric.
        differences: paired differences between arms.
        primary_metric: the metric that the verdict speaks of.
        spectra: one per target task; empty for methods without gradients.
        best: the examples with the highest scores, best first.
        worst: those with the lowest, worst first.
        token_maps: examples whose tokens are drawn, task by task; empty where none were scored.
        loss_curves: arm to (step, training loss in nats per token).
        training: what the training method did, one per arm; empty for plain training.
        weights: which single weights were trained; None where whole matrices were.
        phases: in order of time.
        left_out: pool rows that could not be chosen, reason to number.
        warnings: one sentence each.
        replay_command: what repeats the run.
        run: the contents of run.json.
    """

    title: str
    pool: PoolTable
    selected_ids: Sequence[str]
    recipe_yaml: str
    verdicts: Mapping[str, Verdict] = field(default_factory=dict[str, Verdict])
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    method: str = ""
    method_summary: str = ""
    levels: Sequence[Level] = ()
    differences: Sequence[Difference] = ()
    primary_metric: str = "answer_loss"
    spectra: Sequence[TargetSpectrum] = ()
    best: Sequence[ShownExample] = ()
    worst: Sequence[ShownExample] = ()
    token_maps: Sequence[TokenMap] = ()
    loss_curves: Mapping[str, Sequence[tuple[int, float]]] = field(
        default_factory=dict[str, Sequence[tuple[int, float]]]
    )
    training: Sequence[TrainingFacts] = ()
    weights: WeightFacts | None = None
    phases: Sequence[Phase] = ()
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    warnings: Sequence[str] = ()
    replay_command: str = "selectune run config.yaml output=another-folder"
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])


def parts_of(content: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return (role, text) of canonical content: text, prompt + completion, or messages."""
    if "messages" in content:
        return tuple((str(m["role"]), str(m["content"])) for m in content["messages"])
    return tuple((role, str(text)) for role, text in content.items())
