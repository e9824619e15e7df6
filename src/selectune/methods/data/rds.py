"""RDS+: the examples whose hidden states are most like a target's.

    h = sum_t (t / sum t) h_t over an example's tokens      S = max_j cos(h_n, h_j)

Paper  "Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807, and its release
  (hamishivi/automated-instruction-selection). It lets targets take turns: select.rule round_robin.
  Ours: the state that the LM head reads, prompt and completion together, the untouched base.
Cost   Time: one forward pass over pool and targets. Memory: that of inference.
Fails  States know the form and the subject of a text, not whether training on it helps.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class RdsOptions:
    """How cosines to several targets become one score."""

    aggregate: Annotated[
        Literal["max", "mean"], Field(description="over targets: the best, or their mean")
    ] = "max"


@data_scorer("rds", options=RdsOptions, needs={"hidden_states"})
def score(evidence: Evidence, options: RdsOptions) -> Scores:
    """Rank the pool by cosine of hidden states in which late tokens count more."""
    states = evidence.states
    assert states is not None
    return ranked("rds", evidence, states.weighted, options.aggregate)


def ranked(
    method: str,
    evidence: Evidence,
    similarity: Float[np.ndarray, "n m"],
    aggregate: Literal["max", "mean"],
) -> Scores:
    """Return the scores that similarities to each target amount to."""
    states = evidence.states
    assert states is not None
    by_target = similarity.astype(np.float64)
    main = by_target.max(1) if aggregate == "max" else by_target.mean(1)
    columns = {f"to:{j}": by_target[:, k] for k, j in enumerate(states.target_ids)}
    best = tuple(states.target_ids[k] for k in by_target.argmax(1))
    return Scores(method, evidence.ids, main, columns, best, {"n_targets": len(states.target_ids)})
