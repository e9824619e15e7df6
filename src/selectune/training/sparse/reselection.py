"""Entries that are chosen anew while they train: the session that exchanges them.

At the end of a phase a share of each weight's entries goes, those with the smallest |delta|, and as
many others come. Which ones come is the method's own: a `Grower`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selectune.errors import ConfigError
from selectune.training.method import Scene, refuse_other_state
from selectune.training.sparse.entries import Entries
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.saving import SparseModel
from selectune.training.sparse.schedule import Schedule


@runtime_checkable
class Grower(Protocol):
    """Says which entries come, from what it has seen in a phase."""

    def begin(self) -> None:
        """Begin a phase."""
        ...

    def count_step(self) -> None:
        """Hear that an optimizer step is done."""
        ...

    def grow(self, name: str, entries: Entries, count: int) -> int:
        """Exchange at most so many entries of a weight.

        Returns:
            How many.
        """
        ...

    def end(self) -> None:
        """End a phase."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that a resumed run needs."""
        ...

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on where another one stopped."""
        ...

    def close(self) -> None:
        """Leave the model alone; a second call does nothing."""
        ...


class Reselection:
    """A session that exchanges the entries of a sparse model.

    Args:
        sparse: its entries.
        schedule: when, and how many.
        grower: which.
        name: of the method, as it stands in a delta.
        about: the options, as they stand in a saved state.
    """

    def __init__(
        self,
        sparse: Sparse,
        schedule: Schedule,
        grower: Grower,
        *,
        name: str,
        about: Mapping[str, Any],
    ) -> None:
        self._sparse, self._schedule, self._grower = sparse, schedule, grower
        self._name, self._about = name, dict(about)
        self._step: int | None = None
        grower.begin()

    def begin_step(self, step: int) -> None:
        """Remember the number."""
        self._step = step

    def expect(self, labels: Tensor, ids: object = ()) -> None:
        """Need nothing: gradients say it all."""

    def end_step(self) -> dict[str, Any]:
        """Exchange entries where it is due, and return how many."""
        assert self._step is not None
        t, schedule, facts = self._step + 1, self._schedule, dict[str, Any]()
        self._grower.count_step()
        if schedule.begins(t):
            self._grower.begin()
        if schedule.ends(t):
            if t <= schedule.n_steps:
                facts["reselected"] = self._exchange(t)
            self._grower.end()
        return facts

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that a resumed run needs beside the model and the optimizer."""
        facts, tensors = self._grower.state()
        return {**self._identity(), **facts}, tensors

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where another session stopped; the model was loaded before.

        Raises:
            IncompatibleRunError: it worked on other entries, or with other options.
        """
        refuse_other_state(facts, self._identity())
        self._grower.load_state(facts, tensors)

    def close(self) -> None:
        """Leave the model alone, with the entries that train now."""
        self._grower.close()

    def _exchange(self, t: int) -> dict[str, Any]:
        n_exchanged = 0
        for name, entries in self._sparse.entries.items():
            count = self._schedule.count(t, entries.index.numel())
            if count:
                n_exchanged += self._grower.grow(name, entries, count)
        about = self._sparse.about
        about["n_exchanged"] = about.get("n_exchanged", 0) + n_exchanged
        about["reselected_by"] = self._name
        return {
            "share": self._schedule.share(t),
            "entries": n_exchanged,
            "of": self._sparse.n_chosen,
        }

    def _identity(self) -> dict[str, Any]:
        sizes = {name: e.index.numel() for name, e in self._sparse.entries.items()}
        return {"options": self._about, "entries": sizes}


def highest(scores: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Return the places of the k highest scores, ascending; ties go to the earlier place."""
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    last = scores.topk(k).values[-1]
    is_in = scores > last
    ties = (scores == last).nonzero().flatten()[: k - int(is_in.sum())]
    is_in[ties] = True
    return is_in.nonzero().flatten()


def smallest(entries: Entries, count: int) -> Int[Tensor, " n"]:
    """Return the entries with the smallest |delta|, smallest first; ties go to the earlier one."""
    return entries.index[entries.deltas().abs().sort(stable=True).indices[:count]]


def ready(scene: Scene, kind: type[torch.optim.Optimizer], *, name: str) -> Sparse:
    """Return the chosen entries of the scene's model, after a look at its optimizer.

    Args:
        scene: what the method is put to work on.
        kind: of optimizer that can go along with an exchange.
        name: of the method.

    Raises:
        ConfigError: the model has no chosen entries, or the optimizer is another one.
    """
    model = scene.model
    if isinstance(model, DistributedDataParallel):
        model = cast("nn.Module", model.module)
    if not isinstance(model, SparseModel):
        raise ConfigError(
            f"{name} needs a model of which single weights train",
            where=type(model).__name__,
            why="it exchanges these for others",
            do="sparsify the model with a random mask first, in a recipe "
            "`tune: {weights: {method: random}}`",
        )
    optimizer = scene.optimizer
    if not isinstance(optimizer, kind):
        raise ConfigError(
            f"{name} needs the optimizer {kind.__name__}",
            where="no optimizer" if optimizer is None else type(optimizer).__name__,
            why="what an optimizer keeps about an entry must change when the entry does",
            do=f"from selectune.training.sparse import {kind.__name__}; give a Trainer "
            f'optimizer_cls_and_kwargs=({kind.__name__}, {{"lr": 1e-4}})',
        )
    sparse = model.sparse
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, e in sparse.entries.items() if id(e.values) not in held]
    if missing:
        raise ConfigError(
            f"the optimizer lacks the chosen entries of {len(missing)} weights",
            where=", ".join(missing[:3]),
            why="it was made before `sparsify`, or of some parameters only",
            do="make it of model.parameters(), after `sparsify`",
        )
    decays = {held[id(e.values)]["weight_decay"] for e in sparse.entries.values()} - {0.0}
    if decays and sparse.decay_to == "zero":
        raise ConfigError(
            f'{name} with a weight decay of {max(decays)} needs decay_to="base"',
            where="weight_decay",
            why="its decay is one of deltas; this one would pull weights to zero",
            do='use sparsify(model, mask, decay_to="base"), or weight_decay=0',
        )
    return sparse
