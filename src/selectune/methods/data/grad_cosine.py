"""Gradient cosine: the examples whose whole gradient points along a target's gradient.

    S = max_j <g, v_j> / (|g| |v_j|)

Paper  The full-space control of GIST (arXiv 2602.18584); LESS (arXiv 2402.04333) without Adam and
  without projection. Ours: the maximum over targets as default.
Cost   Time: free from the store of one gradient pass. Memory: as GIST.
Fails  Few targets: a cosine in a million dimensions is small and follows the answers' length.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from selectune.gradients.facts import near_targets
from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class GradCosineOptions:
    """How cosines to several targets become one score."""

    aggregate: Annotated[
        Literal["max", "mean"], Field(description="over targets: the best, or their mean")
    ] = "max"


@data_scorer("grad_cosine", options=GradCosineOptions, needs={"gradients"})
def score(evidence: Evidence, options: GradCosineOptions) -> Scores:
    """Rank the pool by cosine to the targets in the space of all trainable parameters."""
    facts = evidence.gradients
    assert facts is not None
    by_target = facts.cosines
    main = by_target.max(1) if options.aggregate == "max" else by_target.mean(1)
    columns = {"norm": facts.norms.astype(np.float64)}
    columns |= {f"to:{j}": by_target[:, k] for k, j in enumerate(facts.target_ids)}
    best = tuple(facts.target_ids[k] for k in by_target.argmax(1))
    near = near_targets(by_target, evidence.ids, facts.target_ids)
    about = {"n_targets": len(facts.gram), "near_targets": near}
    return Scores("grad_cosine", evidence.ids, main, columns, best, about)
