"""The chosen entries of one weight: optimizers see a vector `values`.

What the values are, and how they act, is the form's: see `in_place` and `compose`.
"""

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from selectune.errors import TrainingError
from selectune.gradients.kernels import Pattern
from selectune.training.sparse.routes import Chosen, Routes
from selectune.weights.delta import Sealed, Stored

DecayTo: TypeAlias = Literal["zero", "base"]
Form: TypeAlias = Literal["in_place", "compose"]
# Sees the gradient of a whole weight in each backward pass of it: (how to form it, how to read it
# at other entries than those that train).
Observer: TypeAlias = Callable[[Callable[[], Tensor], Callable[[Chosen], Tensor]], None]
_log = logging.getLogger(__name__)
_PATIENCE = 3  # steps of an optimizer without the values before it is taken for a mistake


class Entries(ABC):
    """The chosen entries of one weight.

    Args:
        name: of the weight in the bare base.
        shape: of the weight.
        index: the chosen places, flat and ascending, on its device.
        routes: how gradients reach the values.
        input_axis: of a matrix that inputs are multiplied by, the axis of the inputs.
        strengths: where its module keeps how much of the change acts, ...
        key: ... and under which name.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        index: Int[Tensor, " k"],
        *,
        routes: Routes,
        input_axis: int | None,
        strengths: dict[str, float],
        key: str,
    ) -> None:
        self.name, self.shape, self.index, self.routes = name, shape, index, routes
        self.input_axis = input_axis
        # 1 but for passes that measure how the loss responds to the change.
        self._strengths, self._key = strengths, key
        strengths[key] = 1.0
        self.channels: Int[Tensor, " c"] | None = None
        self.observer: Observer | None = None
        self._pattern: Pattern | None = None
        self.n_steps = self.n_missed = 0
        _watch(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out who observes the original."""
        return {**self.__dict__, "observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies are watched like originals."""
        vars(self).update(state)
        _watch(self)

    @property
    @abstractmethod
    def values(self) -> nn.Parameter:
        """What trains."""

    @property
    @abstractmethod
    def weight(self) -> Tensor | None:
        """The tensor that stands where the weight does, None where nothing of that name does."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The type of the weight, as it stands in files."""

    @abstractmethod
    def sync(self) -> None:
        """Bring the weight up to date, at no cost where nothing has happened."""

    @abstractmethod
    def write(self) -> None:
        """Bring the weight up to date."""

    @abstractmethod
    def deltas(self) -> Float[Tensor, " k"]:
        """Return how far the chosen weights are from the base, unrounded."""

    @abstractmethod
    def sealed(self, dtype: Stored = "float32") -> Sealed:
        """Return the deltas to store, and what it costs to make the live values equal to them."""

    @abstractmethod
    def take(self, deltas: Float[Tensor, " k"]) -> None:
        """Make these the deltas."""

    @abstractmethod
    def n_moved(self) -> int:
        """Return how many entries differ from the base."""

    @abstractmethod
    def let_go(self, *, to_base: bool) -> None:
        """Leave the weight as training or, with `to_base`, the base has it."""

    @abstractmethod
    def _leave(self) -> None:
        """Give the entries back to the base, before others are chosen."""

    @abstractmethod
    def _arrive(self) -> Float[Tensor, " k"]:
        """Return the values that the entries start from."""

    @torch.no_grad()
    def choose(self, index: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Let other entries of the weight train, as many as before.

        Entries that go get the bits of the base back; those that come start from it.

        Args:
            index: flat and ascending.

        Returns:
            For each of them the place it had before among the values, -1 for none.
        """
        self._leave()
        old, values = self.index, self.values
        index = index.to(old)
        place = torch.searchsorted(old, index).clamp_(max=old.numel() - 1)
        came_from = torch.where(old[place] == index, place, -1)
        self.index, self._pattern = index, None
        values.copy_(torch.where(came_from >= 0, values[place], self._arrive()))
        if values.grad is not None:
            kept = values.grad[place].masked_fill_(came_from < 0, 0)
            values.grad.copy_(kept)  # in place: DDP keeps gradients in memory of its own
        self._find_channels()
        self.write()
        return came_from

    def observe(self, observer: Observer | None) -> None:
        """Show the gradient of the whole weight to an observer, from the next forward pass on."""
        self.observer = observer
        self._find_channels()

    def _find_channels(self) -> None:
        """Look whether whole channels are chosen, which a form may have a product for."""
        self.channels = None

    def gradient(self, rows: Float[Tensor, "t i"], dy: Float[Tensor, "t o"]) -> Float[Tensor, " k"]:
        """Return the gradient of the values of a matrix.

        Args:
            rows: the inputs; where the route takes columns, the chosen channels of them.
            dy: the gradient of what they are mapped to.
        """
        left, right = (dy, rows) if self.input_axis == 1 else (rows, dy)
        if self.observer is not None:
            self.observer(
                lambda: left.mT @ right, lambda chosen: self.routes.product(chosen, left, right)
            )
        return self.routes.product(self, left, right)

    def pattern(self) -> Pattern:
        """Return the entries of a matrix as compressed rows."""
        if self._pattern is None:
            n_rows, n_cols = self.shape
            self._pattern = Pattern.of(self.index, (n_rows, n_cols))
        return self._pattern

    def move(self, device: torch.device) -> None:
        """Go along when the module went to another device."""
        if self.index.device != device:
            self.index, self._pattern = self.index.to(device), None

    def after_step(self, held: Mapping[int, object]) -> None:
        """Hear that an optimizer has stepped that holds the parameters of these ids."""
        if id(self.values) in held:
            self.write()
            self.n_steps += 1
            self.n_missed = 0
        elif id(self.weight) in held and self.values.grad is not None:
            self.n_missed += 1
            if self.n_missed == _PATIENCE and self.n_steps == 0:
                raise TrainingError(
                    f"the optimizer does not hold the chosen entries of {self.name}",
                    why="it was made before `sparsify`, which freezes the weight itself",
                    do="make the optimizer after `sparsify`, from model.parameters()",
                )


_entries: "weakref.WeakSet[Entries]" = weakref.WeakSet()
_steps = [0]  # of all optimizers of the process
_hooks: list[object] = []


def _watch(entries: Entries) -> None:
    _entries.add(entries)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def steps_so_far() -> int:
    """Return how many steps all optimizers of the process have done."""
    return _steps[0]


def every_entries() -> dict[int, Entries]:
    """Return all chosen entries of the process by the id of their values."""
    return {id(entries.values): entries for entries in list(_entries)}


def unwatch(entries: Entries) -> None:
    """Forget entries that train no longer."""
    _entries.discard(entries)


def _after_step(optimizer: Optimizer, *_: object) -> None:
    _steps[0] += 1
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    idle: list[str] = []
    n_first = 0
    for entries in list(_entries):
        is_first = entries.n_steps == 0 and id(entries.values) in held
        entries.after_step(held)
        if is_first and entries.values.requires_grad:
            n_first += 1
            if entries.values.grad is None:
                idle.append(entries.name)
    if idle:
        _log.warning(
            "the first step had no gradient for the chosen entries of %d of %d tensors, first: %s",
            len(idle), n_first, min(idle),
        )  # fmt: skip
