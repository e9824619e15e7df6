"""LESS: the examples whose Adam step points along the target's gradient, all through a training.

    A[n, j] = sum_t (lr_t / sum lr) cos(R adam_t(g_n), R v_j)     at each checkpoint t
    S = max over subtasks of the mean of A[n, j] over the subtask's targets j

Paper  "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv 2402.04333 (ICML
  2024), section 3, and its release (princeton-nlp/LESS): the end of each of 4 epochs, Adam with eps
  inside the root and no correction, R Rademacher to 8192. Ours: no projection as default, which is
  what R stands in for where features have to be kept; adam "textbook" and "none"; "hadamard";
  "cosine_of_mean", which averages the targets first, as GIST's release does.
Cost   Time: 4 epochs of warm-up on 5 % of the pool and one gradient pass at each of 4 checkpoints;
  "rademacher:k" adds 2 k operations per trainable number and example. Memory: as GIST, with Adam's
  two moments; with "rademacher:k" up to 1 GB of gradients that wait for it.
Fails  Few targets, as `grad_cosine`. Answers of one length: their gradients are alike. Examples
  that Adam has hardly seen: their step is mostly the momentum of others.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from selectune.gradients.facts import CheckpointFacts, GradientFacts
from selectune.gradients.view import View
from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class LessOptions:
    """What LESS compares, where and in which space."""

    aggregate: Annotated[
        Literal["mean_of_cosines", "cosine_of_mean"],
        Field(description="of a subtask's targets: mean cosine (paper), or cosine to their mean"),
    ] = "mean_of_cosines"
    adam: Annotated[
        Literal["release", "textbook", "none"],
        Field(
            description="pool gradients as Adam's step: the release's form, the bias-corrected "
            "one, or plain gradients"
        ),
    ] = "release"
    projection: Annotated[
        str,
        Field(
            pattern=r"^(none|(rademacher|hadamard):[1-9]\d{0,6})$",
            description='"none" is exact; "rademacher:8192" (paper) or "hadamard:8192"',
        ),
    ] = "none"
    epochs: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="checkpoints, one at the end of each epoch of the warm-up; null: all "
            "warmup.schedule_epochs (paper: 4)"
        ),
    ] = None

    @property
    def view(self) -> View:
        """How pool gradients are looked at."""
        return View(self.adam, self.projection)


@data_scorer("less", options=LessOptions, needs={"checkpoints"})
def score(evidence: Evidence, options: LessOptions) -> Scores:
    """Rank the pool by cosines between Adam's steps and target gradients, summed over epochs."""
    first = evidence.checkpoints[0].gradients
    weights = _shares(evidence.checkpoints)
    by_target = _summed(weights, [c.gradients.cosines for c in evidence.checkpoints])
    names, members = _subtasks(first)
    if options.aggregate == "mean_of_cosines":
        by_subtask = np.stack([by_target[:, js].mean(1) for js in members], 1)
    else:
        merged = [_means(c.gradients, members).cosines for c in evidence.checkpoints]
        by_subtask = _summed(weights, merged)
    columns: dict[str, Any] = {
        "norm": _summed(weights, [c.gradients.norms for c in evidence.checkpoints])
    }
    if len(names) > 1:
        columns |= {f"subtask:{name}": by_subtask[:, k] for k, name in enumerate(names)}
    columns |= {f"to:{j}": by_target[:, k] for k, j in enumerate(first.target_ids)}
    best = tuple(first.target_ids[k] for k in by_target.argmax(1))
    about = {
        "n_targets": len(first.target_ids),
        "learning_rates": [c.learning_rate for c in evidence.checkpoints],
    }
    return Scores("less", evidence.ids, by_subtask.max(1), columns, best, about)


def _shares(checkpoints: tuple[CheckpointFacts, ...]) -> list[float]:
    """Return the checkpoints' weights: their learning rates, as shares of the sum."""
    rates = [c.learning_rate for c in checkpoints]
    return [rate / sum(rates) for rate in rates]


def _subtasks(facts: GradientFacts) -> tuple[list[str], list[list[int]]]:
    """Return the names of the subtasks, and the columns of the targets of each."""
    names = sorted(set(facts.groups))
    return names, [[j for j, g in enumerate(facts.groups) if g == name] for name in names]


def _means(facts: GradientFacts, members: list[list[int]]) -> GradientFacts:
    """Return the facts that the means of some targets' gradients would have had."""
    share = np.zeros((len(facts.gram), len(members)))
    for k, js in enumerate(members):
        share[js, k] = 1 / len(js)
    names = tuple(str(k) for k in range(len(members)))
    return GradientFacts(
        facts.dots @ share, facts.norms, share.T @ facts.gram @ share, names, names
    )


def _summed(weights: list[float], values: list[Float[np.ndarray, "*_"]]) -> Float[np.ndarray, "*_"]:
    return np.sum([w * v for w, v in zip(weights, values, strict=True)], axis=0)
