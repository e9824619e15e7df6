"""TracIn: the examples whose training steps would have lowered the target's loss the most.

    S = mean_j sum_t lr_t <g_n, v_j>      at each checkpoint t

Paper  "Estimating Training Data Influence by Tracing Gradient Descent", arXiv 2002.08484 (NeurIPS
  2020), section 3.2 (TracInCP). Ours: the mean over targets, and the learning rate's mean over an
  epoch.
Cost   Time: 4 epochs of warm-up on 5 % of the pool and one gradient pass at each of 4 checkpoints;
  shares passes with `gist` and `grad_cosine` where the checkpoint is theirs. Memory: as GIST.
Fails  A product of gradients grows with both: short answers and examples that the model gets badly
  wrong come first, whatever they are about. `less` takes cosines for that reason.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from selectune.gradients.view import View
from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class TracinOptions:
    """How influences on several targets become one score."""

    aggregate: Annotated[
        Literal["mean", "max"], Field(description="over targets: their mean, or the best")
    ] = "mean"
    epochs: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="checkpoints, one at the end of each epoch of the warm-up; null: all "
            "warmup.schedule_epochs"
        ),
    ] = None

    @property
    def view(self) -> View:
        """Plain gradients, in the space of all trainable parameters."""
        return View()


@data_scorer("tracin", options=TracinOptions, needs={"checkpoints"})
def score(evidence: Evidence, options: TracinOptions) -> Scores:
    """Rank the pool by inner products with target gradients, weighted by learning rates."""
    first = evidence.checkpoints[0].gradients
    rates = [c.learning_rate for c in evidence.checkpoints]
    dots = [c.gradients.dots.astype(np.float64) for c in evidence.checkpoints]
    norms = [c.gradients.norms.astype(np.float64) for c in evidence.checkpoints]
    by_target = np.sum([lr * a for lr, a in zip(rates, dots, strict=True)], axis=0)
    main = by_target.max(1) if options.aggregate == "max" else by_target.mean(1)
    columns: dict[str, Any] = {"norm": np.mean(norms, axis=0)}
    columns |= {f"to:{j}": by_target[:, k] for k, j in enumerate(first.target_ids)}
    best = tuple(first.target_ids[k] for k in by_target.argmax(1))
    about = {"n_targets": len(first.target_ids), "learning_rates": rates}
    return Scores("tracin", evidence.ids, main, columns, best, about)
