"""selectune: find out from gradients which examples are worth training on, and train on those.

scores = selectune.score("gist", model, pool, target)
picks = selectune.select(scores, budget=0.05)
SFTTrainer(model, args, train_dataset=picks.examples(pool)).train()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectune.api import score, select
    from selectune.errors import SelectuneError
    from selectune.methods.data_layer.gast import GAST
    from selectune.methods.data_layer.greats import GREATS
    from selectune.methods.layers.ist import IST
    from selectune.methods.layers.lisa import LISA
    from selectune.methods.layers.ows import OWS
    from selectune.methods.layers.rst import RST
    from selectune.selection import Scores, Selection

# Names are looked up on first use: `selectune --help` imports this package, and must not wait for
# torch.
_HOMES = {
    "score": "selectune.api",
    "select": "selectune.api",
    "Scores": "selectune.selection",
    "Selection": "selectune.selection",
    "SelectuneError": "selectune.errors",
    "GAST": "selectune.methods.data_layer.gast",
    "GREATS": "selectune.methods.data_layer.greats",
    "IST": "selectune.methods.layers.ist",
    "LISA": "selectune.methods.layers.lisa",
    "OWS": "selectune.methods.layers.ows",
    "RST": "selectune.methods.layers.rst",
}
__all__ = [
    "GAST",
    "GREATS",
    "IST",
    "LISA",
    "OWS",
    "RST",
    "Scores",
    "Selection",
    "SelectuneError",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'selectune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
