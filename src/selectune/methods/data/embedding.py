"""Embedding: the examples whose mean hidden state is most like a target's.

    h = mean over an example's tokens of h_t      S = max_j cos(h_n, h_j)

Paper  A baseline of GIST (arXiv 2602.18584). Ours: the base itself embeds, by the state that its LM
  head reads; prompt and completion together.
Cost   Time: one forward pass over pool and targets, the same as that of `rds`. Memory: that of
  inference.
Fails  As `rds`; and a plain mean is mostly the prompt where prompts are long.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from selectune.methods.data.rds import ranked
from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOptions:
    """How cosines to several targets become one score."""

    aggregate: Annotated[
        Literal["max", "mean"], Field(description="over targets: the best, or their mean")
    ] = "max"


@data_scorer("embedding", options=EmbeddingOptions, needs={"hidden_states"})
def score(evidence: Evidence, options: EmbeddingOptions) -> Scores:
    """Rank the pool by cosine of plain means of hidden states."""
    states = evidence.states
    assert states is not None
    return ranked("embedding", evidence, states.mean, options.aggregate)
