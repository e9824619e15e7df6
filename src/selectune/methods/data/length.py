"""Length: the examples with the most target tokens.

    S = number of tokens that count in the loss

Paper  "Long Is More for Alignment", arXiv 2402.04833; a baseline of GIST. Ours: target tokens, not
  all tokens.
Cost   None beyond reading the pool.
Fails  Where the target's answers are short: it picks the other tasks.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """Which end comes first."""

    order: Annotated[Literal["long", "short"], Field(description="longest or shortest first")] = (
        "long"
    )


@data_scorer("length", options=LengthOptions)
def score(evidence: Evidence, options: LengthOptions) -> Scores:
    """Rank the pool by the number of target tokens."""
    n = evidence.n_target_tokens.astype(np.float64)
    return Scores("length", evidence.ids, n if options.order == "long" else -n)
