"""SpIEL-AG: weights whose delta stays small make room for those with the largest gradients.

    candidates    per weight, the k with the largest |g| in the first micro-batch of a phase
    sums          S1 = sum of g, S2 = sum of g^2, over the c micro-batches of the phase
    at its end    n of k go, those with the smallest |delta|, and get the base's bits back;
                  n candidates come, those with the largest |S1| that do not train, with delta 0
    their Adam    m = S1/c (1 - b1^a), v = S2/c (1 - b2^a), a = steps of the phase

Paper  "Scaling Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405, algorithm and
  constants as in its release. What would both go and come stays as it is, its delta too. Ours: ties
  go to the earlier entry; an entry's age counts the steps that its moments hold, where the release
  counts one less after growth; learning rate 1e-4 to 3e-6, decay 1 to 30 on deltas.
Cost   Time: one dense gradient per weight at the start of a phase, then a second sparse product
  while it lasts, in a quarter of all steps. Memory: one dense gradient at a time; 12 bytes per
  entry during a phase.
Fails  The first exchange replaces nearly all entries, and learning starts anew from them. With
  gradient accumulation the seeds are of micro-batches: smaller than a step's gradient. Static masks
  from the same gradients often do as well: run `sift` or `gallop` beside it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from selectune.errors import ConfigError, TrainingError
from selectune.registry import training_method
from selectune.training.method import Scene, Session
from selectune.training.ranks import world
from selectune.training.sparse.candidates import Candidates
from selectune.training.sparse.entries import Entries
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.optimizers import SpielAdamW
from selectune.training.sparse.reselection import (
    Reselection,
    highest,
    ready,
    smallest,
)
from selectune.training.sparse.schedule import Exchanging

_NAME = "spiel_ag"


@training_method(_NAME)
@dataclass(frozen=True, slots=True, kw_only=True)
class SpielAG(Exchanging):
    """Chosen weights change by accumulated gradients while they train."""

    @property
    def optimizer(self) -> type[SpielAdamW]:
        """The optimizer that it works with."""
        return SpielAdamW

    def start(self, scene: Scene) -> Session:
        """Begin to watch gradients.

        Raises:
            ConfigError: the model is not sparse, the optimizer is another one, several processes or
                float16 are used, or nobody knows how long training is.
        """
        _refuse(scene)
        sparse = ready(scene, SpielAdamW, name=_NAME)
        assert isinstance(scene.optimizer, SpielAdamW)
        return Reselection(
            sparse,
            self.schedule(scene),
            _ByGradient(sparse, scene.optimizer),
            name=_NAME,
            about=asdict(self),
        )


class _ByGradient:
    """Grows what had the largest sum of gradients."""

    def __init__(self, sparse: Sparse, optimizer: SpielAdamW) -> None:
        self._sparse, self._optimizer = sparse, optimizer
        self._seen: dict[str, Candidates] = {}  # during a phase
        self._n_steps = 0  # of the phase

    def begin(self) -> None:
        """Look for candidates in the next backward pass."""
        self.end()
        entries = self._sparse.entries.items()
        self._seen = {name: Candidates(e) for name, e in entries if e.values.requires_grad}

    def count_step(self) -> None:
        """Count the steps of a phase."""
        self._n_steps += 1

    def grow(self, name: str, entries: Entries, count: int) -> int:
        """Exchange entries for candidates."""
        if name not in self._seen or self._seen[name].n_seen == 0:
            return 0  # no gradient has reached it
        seen = self._seen[name]
        if not bool(seen.total.isfinite().all()):
            raise TrainingError(
                f"a gradient of {name} is not a number",
                where=_NAME,
                why="training went astray, or a loss is scaled beyond what its type holds",
                do="lower the learning rate, or train in float32 or bfloat16",
            )
        drop = smallest(entries, count)
        stays = entries.index[~torch.isin(entries.index, drop)]
        free = (~torch.isin(seen.index, stays)).nonzero().flatten()
        best = free[highest(seen.total[free].abs(), count)]
        # What would both go and come is left alone.
        drop, best = (
            drop[~torch.isin(drop, seen.index[best])],
            best[~torch.isin(seen.index[best], drop)],
        )
        moved = self._sparse.replace(name, drop[: best.numel()], seen.index[best])
        most = max(other.n_seen for other in self._seen.values())
        self._optimizer.follow(
            entries.values,
            moved,
            # Fewer where some backward passes do not reach the weight.
            age=self._n_steps * seen.n_seen / most,
            mean=seen.total[best] / seen.n_seen,
            mean_square=seen.squares[best] / seen.n_seen,
        )
        return best.numel()

    def end(self) -> None:
        """Forget the candidates."""
        for seen in self._seen.values():
            seen.close()
        self._seen, self._n_steps = {}, 0

    close = end

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what was seen in a phase that is not over."""
        tensors: dict[str, Tensor] = {}
        for name, seen in self._seen.items():
            if seen.n_seen:
                tensors[f"{name}.index"] = seen.index
                tensors[f"{name}.total"] = seen.total
                tensors[f"{name}.squares"] = seen.squares
        counts = {name: seen.n_seen for name, seen in self._seen.items()}
        return {"seen": counts, "phase_steps": self._n_steps}, tensors

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on in the same phase, or between two."""
        self.end()
        if facts["seen"]:
            self.begin()
        self._n_steps = facts["phase_steps"]
        for name, n_seen in facts["seen"].items():
            if n_seen:
                parts = (tensors[f"{name}.{part}"] for part in ("index", "total", "squares"))
                self._seen[name].load(n_seen, *parts)


def _refuse(scene: Scene) -> None:
    if world() > 1:
        raise ConfigError(
            f"{_NAME} runs in one process, and there are {world()}",
            where=_NAME,
            why="each would see other gradients, and grow other entries",
            do="use spiel_ma, which goes by what all processes share, or one process",
        )
    if scene.precision == "float16":
        raise ConfigError(
            f"{_NAME} cannot be used with float16",
            where="precision",
            why="losses are scaled there, and the moments of grown entries would be of scaled ones",
            do="use bfloat16 or float32",
        )
