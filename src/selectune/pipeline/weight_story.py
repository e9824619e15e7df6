"""What a run tells in its report about single weights: results turned into plain values."""

from collections.abc import Mapping
from itertools import combinations
from math import prod
from typing import Any

from selectune.evaluation.transfer import Transfer
from selectune.report.weight_facts import (
    ChosenWeights,
    SharedWeights,
    TransferFacts,
    WeightFacts,
    WeightPlane,
)
from selectune.weights.delta import SparseDelta
from selectune.weights.mask import WeightMask
from selectune.weights.overlap import overlap


def tell_weights(
    masks: Mapping[str, WeightMask],
    *,
    plane: Mapping[str, Any] | None = None,
    moved: Mapping[str, int] | None = None,
    deltas: Mapping[str, SparseDelta] | None = None,
    transfers: Mapping[str, Transfer] | None = None,
) -> WeightFacts | None:
    """Return what the page tells about the weights that arms trained; None where there are none.

    Args:
        masks: by arm, the most important first, all of one base.
        plane: plain values of what `plane_of` counted, with masks under the names of the arms.
        moved: by arm, chosen weights whose stored bits training changed: `model.sparse.moved()`.
        deltas: by arm, what training changed; two of them tell whether weights moved alike.
        transfers: by arm or other method.

    Raises:
        SelectionError: the masks belong to different base models.
    """
    if not masks and not transfers:
        return None
    moved, deltas = moved or {}, deltas or {}
    chosen = [
        ChosenWeights(
            arm=arm,
            eligible={name: prod(shape) for name, shape in mask.shapes.items()},
            chosen={name: index.numel() for name, index in mask},
            about=mask.about,
            n_moved=moved.get(arm),
        )
        for arm, mask in masks.items()
    ]
    shared: list[SharedWeights] = []
    for (a, mask), (b, other) in combinations(masks.items(), 2):
        total = overlap(mask, other).total
        is_told = a in deltas and b in deltas
        shared.append(
            SharedWeights(
                first=a,
                second=b,
                n_eligible=total.n_eligible,
                n_first=total.n_first,
                n_second=total.n_second,
                n_both=total.n_both,
                sign_agreement=overlap(deltas[a], deltas[b]).total.sign_agreement
                if is_told
                else None,
            )
        )
    return WeightFacts(
        chosen=chosen,
        plane=None if plane is None else WeightPlane.of(plane),
        shared=shared,
        transfers=[TransferFacts.of(arm, t.to_json()) for arm, t in (transfers or {}).items()],
    )
