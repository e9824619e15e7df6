"""Single weights: which of them train, their masks, and what becomes of them.

mask = selectune.weights.GaLLoP(density=0.01).score(model, data).select()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectune.methods.weights.fisher import Fisher
    from selectune.methods.weights.gallop import GaLLoP
    from selectune.methods.weights.high_magnitude import HighMagnitude
    from selectune.methods.weights.lota import LoTA
    from selectune.methods.weights.low_magnitude import LowMagnitude
    from selectune.methods.weights.random import Random, random_matched
    from selectune.methods.weights.s2ft import S2FT
    from selectune.methods.weights.saft import SAFT
    from selectune.methods.weights.sift import SIFT
    from selectune.methods.weights.snip import SNIP
    from selectune.methods.weights.trial import drift_mask, rosa
    from selectune.weights.delta import SparseDelta
    from selectune.weights.eligible import eligible_weights
    from selectune.weights.mask import WeightMask
    from selectune.weights.merging import merge, switch, unmerge
    from selectune.weights.scorer import WeightScorer
    from selectune.weights.scores import WeightScores
    from selectune.weights.shira import export_shira
    from selectune.weights.statistics import estimate

# Names are looked up on first use: importing selectune must not wait for torch.
_HOMES = {
    "Fisher": "selectune.methods.weights.fisher",
    "GaLLoP": "selectune.methods.weights.gallop",
    "HighMagnitude": "selectune.methods.weights.high_magnitude",
    "LoTA": "selectune.methods.weights.lota",
    "LowMagnitude": "selectune.methods.weights.low_magnitude",
    "Random": "selectune.methods.weights.random",
    "S2FT": "selectune.methods.weights.s2ft",
    "SAFT": "selectune.methods.weights.saft",
    "SIFT": "selectune.methods.weights.sift",
    "SNIP": "selectune.methods.weights.snip",
    "SparseDelta": "selectune.weights.delta",
    "WeightMask": "selectune.weights.mask",
    "WeightScorer": "selectune.weights.scorer",
    "WeightScores": "selectune.weights.scores",
    "drift_mask": "selectune.methods.weights.trial",
    "eligible_weights": "selectune.weights.eligible",
    "estimate": "selectune.weights.statistics",
    "export_shira": "selectune.weights.shira",
    "merge": "selectune.weights.merging",
    "random_matched": "selectune.methods.weights.random",
    "rosa": "selectune.methods.weights.trial",
    "switch": "selectune.weights.merging",
    "unmerge": "selectune.weights.merging",
}
__all__ = [
    "S2FT",
    "SAFT",
    "SIFT",
    "SNIP",
    "Fisher",
    "GaLLoP",
    "HighMagnitude",
    "LoTA",
    "LowMagnitude",
    "Random",
    "SparseDelta",
    "WeightMask",
    "WeightScorer",
    "WeightScores",
    "drift_mask",
    "eligible_weights",
    "estimate",
    "export_shira",
    "merge",
    "random_matched",
    "rosa",
    "switch",
    "unmerge",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'selectune.weights' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
