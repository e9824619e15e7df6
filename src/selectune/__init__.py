"""selectune: find out from gradients which examples are worth training on, and train on those.

scores = selectune.score("gist", model, pool, target)
picks = selectune.select(scores, budget=0.05)
SFTTrainer(model, args, train_dataset=picks.examples(pool)).train()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectune.api import score, select
    from selectune.errors import SelectuneError
    from selectune.selection import Scores, Selection

# Names are looked up on first use: `selectune --help` imports this package, and must not wait for
# torch.
_HOMES = {
    "score": "selectune.api",
    "select": "selectune.api",
    "Scores": "selectune.selection",
    "Selection": "selectune.selection",
    "SelectuneError": "selectune.errors",
}
__all__ = ["Scores", "Selection", "SelectuneError", "score", "select"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'selectune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
