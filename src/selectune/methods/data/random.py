"""Random: a draw by hashed id, the control that every selection must beat.

    S = hash(seed, id) in [0, 1)

Paper  The baseline of every paper of the field. Ours: hashing, so that pool order, process count
  and library version do not change the draw.
Cost   Nothing.
Fails  Never by much; that is the point.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomOptions:
    """No options; the run's seed decides."""


@data_scorer("random", options=RandomOptions)
def score(evidence: Evidence, options: RandomOptions) -> Scores:
    """Give each example a number drawn from the seed and its id."""
    _ = options
    digests = (hashlib.sha256(f"{evidence.seed}:{i}".encode()).digest() for i in evidence.ids)
    drawn = np.asarray([int.from_bytes(d[:6], "big") for d in digests], np.float64) / 2**48
    return Scores("random", evidence.ids, drawn)
