"""Chosen entries that stand in their weight, and how the weight keeps up with the values.

The weight itself never changes but by `write`. When to write is the hard part, as nothing tells for
sure that an optimizer has moved a vector: fused kernels and steps through `.data` leave its version
counter alone (torch 2.13: fused AdamW does), and a copy from a flat buffer is no step of an
optimizer that holds it. Three signs together miss none:

    a step of an optimizer that holds the vector     the weight is written at once
    another version of the vector, another strength  it is written before its next use
    a step of any other optimizer                    it is compared before its next use
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selectune.training.sparse.channels import whole_channels
from selectune.training.sparse.entries import DecayTo, Entries, steps_so_far
from selectune.training.sparse.routes import Routes
from selectune.weights.base import flat
from selectune.weights.delta import Sealed, Stored, seal, type_name, wide


class InPlace(Entries):
    """Entries of which the weight always holds what the values say.

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
        super().__init__(
            name,
            tuple(weight.shape),
            index.to(weight.device),
            routes=routes,
            input_axis=input_axis,
            strengths=strengths,
            key=key,
        )
        self._weight, self.decay_to = weight, decay_to
        self._values = nn.Parameter(self._arrive().clone())
        self._find_channels()
        self._seen: tuple[int, float, int] = self._now()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies are watched like originals."""
        super().__setstate__(state)
        self._seen = (-1, 0.0, 0)  # a copy's versions start anew

    @property
    def values(self) -> nn.Parameter:
        """What trains."""
        return self._values

    @property
    def weight(self) -> nn.Parameter:
        """The tensor whose entries these are."""
        return self._weight

    @property
    def dtype(self) -> str:
        """The type of the weight, as it stands in files."""
        return type_name(self.base.dtype)

    def _now(self) -> tuple[int, float, int]:
        return self.values._version, self._strengths[self._key], steps_so_far()

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

    def _leave(self) -> None:
        flat(self.weight)[self.index] = self.base

    def _arrive(self) -> Float[Tensor, " k"]:
        self.base = flat(self.weight)[self.index].clone()  # what training overwrites
        base = wide(self.base)
        return base if self.decay_to == "zero" else torch.zeros_like(base)

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

    def sealed(self, dtype: Stored = "float32") -> Sealed:
        """Return the deltas to store, and what it costs to make the live values equal to them."""
        return seal(self.masters(), self.base, dtype=dtype)

    @torch.no_grad()
    def take(self, deltas: Float[Tensor, " k"]) -> None:
        """Make these the deltas."""
        base = wide(self.base)
        masters = base + deltas.to(base)
        self.values.copy_(masters if self.decay_to == "zero" else masters - base)
        self.write()

    def n_moved(self) -> int:
        """Return how many entries are stored with other bits than in the base."""
        as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.base.element_size()]
        self.sync()
        held = flat(self.weight)[self.index]
        return int((held.view(as_bits) != self.base.view(as_bits)).sum())

    @torch.no_grad()
    def let_go(self, *, to_base: bool) -> None:
        """Leave the weight as training or, with `to_base`, the base has it."""
        self.sync()
        if to_base:
            self._leave()

    def follow(self, weight: nn.Parameter, values: nn.Parameter) -> None:
        """Go along when the module was moved, cast or loaded into."""
        self._weight, self._values = weight, values
        self.move(weight.device)
        if self.channels is not None:
            self.channels = self.channels.to(weight.device)
        self.base = self.base.to(weight)
        self.write()
