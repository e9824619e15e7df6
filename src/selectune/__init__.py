"""selectune: find out from gradients which examples are worth training on, and train on those.

scores = selectune.score("gist", model, pool, target)
picks = selectune.select(scores, budget=0.05)
SFTTrainer(model, args, train_dataset=picks.examples(pool)).train()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectune import weights
    from selectune.api import rescore, score, select
    from selectune.errors import SelectuneError
    from selectune.methods.data_layer.gast import GAST
    from selectune.methods.data_layer.greats import GREATS
    from selectune.methods.layers.ist import IST
    from selectune.methods.layers.lisa import LISA
    from selectune.methods.layers.ows import OWS
    from selectune.methods.layers.rst import RST
    from selectune.methods.sparse.spiel_ag import SpielAG
    from selectune.methods.sparse.spiel_ma import SpielMA
    from selectune.offsite.emulate import emulate
    from selectune.offsite.loading import Emulator
    from selectune.offsite.plugin import plug
    from selectune.selection import Scores, Selection
    from selectune.training.sparse import sparsify
    from selectune.weights.merging import merge, unmerge

# Names are looked up on first use: `selectune --help` imports this package, and must not wait for
# torch.
_HOMES = {
    "emulate": "selectune.offsite.emulate",
    "merge": "selectune.weights.merging",
    "plug": "selectune.offsite.plugin",
    "rescore": "selectune.api",
    "score": "selectune.api",
    "select": "selectune.api",
    "sparsify": "selectune.training.sparse",
    "unmerge": "selectune.weights.merging",
    "Emulator": "selectune.offsite.loading",
    "Scores": "selectune.selection",
    "Selection": "selectune.selection",
    "SelectuneError": "selectune.errors",
    "GAST": "selectune.methods.data_layer.gast",
    "GREATS": "selectune.methods.data_layer.greats",
    "IST": "selectune.methods.layers.ist",
    "LISA": "selectune.methods.layers.lisa",
    "OWS": "selectune.methods.layers.ows",
    "RST": "selectune.methods.layers.rst",
    "SpielAG": "selectune.methods.sparse.spiel_ag",
    "SpielMA": "selectune.methods.sparse.spiel_ma",
}
__all__ = [
    "GAST",
    "GREATS",
    "IST",
    "LISA",
    "OWS",
    "RST",
    "Emulator",
    "Scores",
    "Selection",
    "SelectuneError",
    "SpielAG",
    "SpielMA",
    "emulate",
    "merge",
    "plug",
    "rescore",
    "score",
    "select",
    "sparsify",
    "unmerge",
    "weights",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    import importlib

    if name == "weights":
        return importlib.import_module("selectune.weights")
    if name not in _HOMES:
        raise AttributeError(f"module 'selectune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
