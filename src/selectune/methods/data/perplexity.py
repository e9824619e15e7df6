"""Perplexity: the examples that the base model finds neither easy nor hopeless.

    S = -|loss - median loss|     ("mid"; "high" and "low" rank by the loss itself)

Paper  "When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale",
  arXiv 2309.04564; a baseline of GIST. Ours: "mid" as default, distance in nats to the median.
Cost   Time: one forward pass over the pool with the untouched base. Memory: that of inference.
Fails  It does not know the target. "high" collects wrong and garbled answers.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityOptions:
    """Which part of the range comes first."""

    order: Annotated[
        Literal["mid", "high", "low"], Field(description="middle, hardest or easiest first")
    ] = "mid"


@data_scorer("perplexity", options=PerplexityOptions, needs={"losses"})
def score(evidence: Evidence, options: PerplexityOptions) -> Scores:
    """Rank the pool by its loss under the base model."""
    losses = evidence.losses
    assert losses is not None
    values = losses.astype(np.float64)
    match options.order:
        case "mid":
            main = -np.abs(values - np.median(values))
        case "high":
            main = values
        case "low":
            main = -values
    return Scores("perplexity", evidence.ids, main, {"base_loss": values})
