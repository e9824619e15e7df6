"""The chosen entries of one weight, and how the weight keeps up with them.

Optimizers see a vector `values`, the weight itself never changes but by `write`. When to write is
the hard part, as nothing tells for sure that an optimizer has moved a vector: fused kernels and
steps through `.data` leave its version counter alone (torch 2.13: fused AdamW does), and a copy
from a flat buffer is no step of an optimizer that holds it. Three signs together miss none:

    a step of an optimizer that holds the vector     the weight is written at once
    another version of the vector, another strength  it is written before its next use
    a step of any other optimizer                    it is compared before its next use
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from selectune.errors import TrainingError
from selectune.gradients.kernels import Pattern
from selectune.training.sparse.channels import matrix_shape, whole_channels
from selectune.training.sparse.routes import Chosen, Routes
from selectune.weights.base import flat
from selectune.weights.delta import wide

DecayTo: TypeAlias = Literal["zero", "base"]
# Sees the gradient of a whole weight in each backward pass of it: (how to form it, how to read it
# at other entries than those that train).
Observer: TypeAlias = Callable[[Callable[[], Tensor], Callable[[Chosen], Tensor]], None]
_log = logging.getLogger(__name__)
_PATIENCE = 3  # steps of an optimizer without the values before it is taken for a mistake


class Entries:
    """The chosen entries of one weight.

    Args:
        name: of the weight in the bare base.
        weight: the tensor; it never requires a gradient.
        index: the chosen places, flat and ascending.
        decay_to: zero: `values` are the chosen weights; base: their distance from the base.
        routes: how gradients reach the values.
        input_axis: of a matrix that inputs are multiplied by, the axis of the inputs.
        strengths: where its module keeps how much of the change acts, ...
        key: ... and under which name.
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        index: Int[Tensor, " k"],
        *,
        decay_to: DecayTo,
        routes: Routes,
        input_axis: int | None,
        strengths: dict[str, float],
        key: str,
    ) -> None:
        self.name, self.weight, self.decay_to, self.routes = name, weight, decay_to, routes
        self.index = index.to(weight.device)
        self.base = flat(weight)[self.index].clone()  # what training overwrites
        start = wide(self.base) if decay_to == "zero" else torch.zeros_like(wide(self.base))
        self.values = nn.Parameter(start.clone())
        # 1 but for passes that measure how the loss responds to the change.
        self._strengths, self._key = strengths, key
        strengths[key] = 1.0
        self.input_axis = input_axis
        self.channels = whole_channels(self.index, weight, input_axis)
        self.observer: Observer | None = None
        self._pattern: Pattern | None = None
        self._seen: tuple[int, float, int] = self._now()
        self.n_steps = self.n_missed = 0
        _watch(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out who observes the original."""
        return {**self.__dict__, "observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies are watched like originals."""
        self.__dict__.update(state)
        self._seen = (-1, 0.0, 0)  # a copy's versions start anew
        _watch(self)

    def _now(self) -> tuple[int, float, int]:
        return self.values._version, self._strengths[self._key], _steps[0]

    def sync(self) -> None:
        """Bring the weight up to date, at no cost where nothing has happened."""
        now = self._now()
        if now == self._seen or torch.compiler.is_compiling():
            return
        if now[:2] != self._seen[:2] or self._is_behind():
            self.write()
        self._seen = now

    def _is_behind(self) -> bool:
        # A graph may hold the weight: it must not look changed when it is not.
        return not torch.equal(flat(self.weight)[self.index], self.stored())

    @torch.no_grad()
    def write(self) -> None:
        """Put the chosen values into the weight."""
        flat(self.weight)[self.index] = self.stored()
        self._seen = self._now()

    @torch.no_grad()
    def choose(self, index: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Let other entries of the weight train, as many as before.

        Entries that go get the bits of the base back; those that come start from it.

        Args:
            index: flat and ascending.

        Returns:
            For each of them the place it had before among the values, -1 for none.
        """
        weight, old = flat(self.weight), self.index
        weight[old] = self.base
        index = index.to(old)
        place = torch.searchsorted(old, index).clamp_(max=old.numel() - 1)
        came_from = torch.where(old[place] == index, place, -1)
        self.index, self.base, self._pattern = index, weight[index], None
        start = wide(self.base) if self.decay_to == "zero" else torch.zeros_like(self.values)
        self.values.copy_(torch.where(came_from >= 0, self.values[place], start))
        if self.values.grad is not None:
            kept = self.values.grad[place].masked_fill_(came_from < 0, 0)
            self.values.grad.copy_(kept)  # in place: DDP keeps gradients in memory of its own
        self._find_channels()
        self.write()
        return came_from

    def observe(self, observer: Observer | None) -> None:
        """Show the gradient of the whole weight to an observer, from the next forward pass on."""
        self.observer = observer
        self._find_channels()

    def _find_channels(self) -> None:
        # Where channels are chosen, only their inputs are kept; an observer needs the others too.
        is_free = self.observer is None
        self.channels = (
            whole_channels(self.index, self.weight, self.input_axis) if is_free else None
        )

    @torch.no_grad()
    def deltas(self) -> Float[Tensor, " k"]:
        """Return how far the chosen weights are from the base, unrounded."""
        if self.decay_to == "base":
            return self.values.detach()
        return self.masters() - wide(self.base).to(self.values)

    @torch.no_grad()
    def masters(self) -> Float[Tensor, " k"]:
        """Return the chosen weights before they are rounded to the type of the weight."""
        if self.decay_to == "zero":
            return self.values.detach()
        return wide(self.base) + self.values.detach().to(wide(self.base))

    @torch.no_grad()
    def stored(self) -> Float[Tensor, " k"]:
        """Return what the weight holds, or is about to, at the chosen entries."""
        factor = self._strengths[self._key]
        if factor == 1:
            return self.masters().to(self.base.dtype)
        base = wide(self.base)
        return (base + factor * (self.masters().to(base) - base)).to(self.base.dtype)

    @torch.no_grad()
    def set_masters(self, masters: Float[Tensor, " k"]) -> None:
        """Make these the chosen weights."""
        base = wide(self.base)
        found = masters if self.decay_to == "zero" else masters.to(base) - base
        self.values.copy_(found)
        self.write()

    def n_moved(self) -> int:
        """Return how many entries are stored with other bits than in the base."""
        as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.base.element_size()]
        self.sync()
        held = flat(self.weight)[self.index]
        return int((held.view(as_bits) != self.base.view(as_bits)).sum())

    def pattern(self) -> Pattern:
        """Return the entries of a matrix as compressed rows."""
        if self._pattern is None:
            self._pattern = Pattern.of(self.index, matrix_shape(self.weight))
        return self._pattern

    def follow(self, weight: nn.Parameter, values: nn.Parameter) -> None:
        """Go along when the module was moved, cast or loaded into."""
        self.weight, self.values = weight, values
        if self.index.device != weight.device:
            self._pattern = None
        self.index = self.index.to(weight.device)
        if self.channels is not None:
            self.channels = self.channels.to(weight.device)
        self.base = self.base.to(weight)
        self.write()

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
