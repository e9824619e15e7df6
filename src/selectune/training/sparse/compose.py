"""Chosen entries that act beside their matrix, which stays what it is.

    y = module(x) + x Delta^T       Delta: the values at the chosen entries, nothing elsewhere

The matrix is not read, so it may be quantised, and the module is asked for its parameters in every
pass anew, so these may be sharded (`fully_shard`) after the entries were chosen.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from selectune.errors import TrainingError
from selectune.gradients.kernels import Call, LinearRows, Rows, exact
from selectune.training.sparse.entries import Entries
from selectune.training.sparse.modules import VALUES, SparseModule
from selectune.training.sparse.routes import Routes
from selectune.weights.base import flat
from selectune.weights.delta import QUANTISED, STORED, Sealed, Stored, add, type_name
from selectune.weights.linear import LinearMap

_KEY = "weight" + VALUES


class Beside(Entries):
    """Entries whose values are deltas that act beside the matrix.

    Args:
        name: of the matrix in the bare base.
        linear: the module that multiplies by it.
        index: the chosen places, flat and ascending.
        routes: how gradients reach the values.
    """

    input_axis: int

    def __init__(
        self, name: str, linear: LinearMap, index: Int[Tensor, " k"], *, routes: Routes
    ) -> None:
        self._linear = linear
        strengths: dict[str, float] = vars(linear.module).setdefault("sparse_strengths", {})
        super().__init__(
            name,
            linear.shape,
            index.to(linear.device),
            routes=routes,
            input_axis=linear.input_axis,
            strengths=strengths,
            key=_KEY,
        )
        held = linear.weight
        is_double = held is not None and held.dtype == torch.float64
        start = self.index.new_zeros(
            self.index.shape, dtype=torch.float64 if is_double else torch.float32
        )
        linear.module.register_parameter(_KEY, nn.Parameter(start))
        vars(linear.module).setdefault("sparse_entries", {})["weight"] = self

    @property
    def values(self) -> nn.Parameter:
        """What trains; of sharded ones the part of this process."""
        return vars(self._linear.module)["_parameters"][_KEY]

    @property
    def weight(self) -> Tensor | None:
        """The tensor that stands where an unquantised matrix does."""
        return self._linear.weight

    @property
    def dtype(self) -> str:
        """The type of the matrix, as it stands in files."""
        weight = self.weight
        if weight is None or self._linear.is_quantised:
            return QUANTISED
        return type_name(weight.dtype)

    def sync(self) -> None:
        """Do nothing: whoever uses the module reads the values."""

    def write(self) -> None:
        """Do nothing: whoever uses the module reads the values."""

    def _leave(self) -> None:
        if isinstance(self.values, DTensor):
            raise TrainingError(
                f"the chosen entries of {self.name} cannot be exchanged for others",
                why="their values are sharded over processes",
                do="train in one process or under DDP, or with a mask that stays",
            )

    def _arrive(self) -> Float[Tensor, " k"]:
        return torch.zeros_like(self.values)

    @torch.no_grad()
    def deltas(self) -> Float[Tensor, " k"]:
        """Return the values; of sharded ones all, which every process has to ask for."""
        values = self.values.detach()
        return values.full_tensor() if isinstance(values, DTensor) else values

    def sealed(self, dtype: Stored = "float32") -> Sealed:
        """Return the deltas to store, and what it costs to make the live values equal to them."""
        values = self.deltas()
        delta = values.to(STORED[dtype])
        gaps = (delta.to(values) - values).abs()
        return Sealed(
            delta,
            delta.float(),
            int((gaps != 0).sum()),
            float(gaps.max()) if gaps.numel() else 0.0,
        )

    @torch.no_grad()
    def take(self, deltas: Float[Tensor, " k"]) -> None:
        """Make these the deltas."""
        values = self.values
        found = deltas.to(values.device, values.dtype)
        if isinstance(values, DTensor):
            found = distribute_tensor(found, values.device_mesh, values.placements)
        values.copy_(found)

    def n_moved(self) -> int:
        """Return how many deltas are not zero."""
        return int(self.deltas().count_nonzero())

    @torch.no_grad()
    def let_go(self, *, to_base: bool) -> None:
        """Add the deltas to the matrix or, with `to_base`, drop them."""
        if to_base:
            return
        assert self.weight is not None
        row = flat(self.weight)
        row[self.index] = add(row[self.index], self.deltas())

    def follow(self) -> None:
        """Go along when the module was moved, cast or loaded into."""
        self.move(self.values.device)

    def applied(self, values: Tensor, rows: Float[Tensor, "t _"], *, turned: bool) -> Tensor:
        """Return Delta times each row, in fp32 or fp64; `turned`, its transpose times each."""
        matrix = self.pattern().filled(exact(values))
        # A row of inputs is multiplied by [out, in]; Conv1D stores [in, out].
        used = matrix.mT if turned == (self.input_axis == 1) else matrix
        with torch.autocast(rows.device.type, enabled=False):
            return (used @ exact(rows).to(matrix.dtype).mT).mT


class _Change(torch.autograd.Function):
    """What chosen entries add to a linear map."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        values: Tensor,
        entries: Beside,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.entries, ctx.dtype, ctx.shape = entries, x.dtype, x.shape
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ctx.save_for_backward(rows, values)
        y = entries.applied(values, rows, turned=False).to(dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's own decorator)
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> Any:  # noqa: ANN401
        entries: Beside = ctx.entries
        rows, values = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = entries.applied(values, dy, turned=True).to(ctx.dtype).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            dv = entries.gradient(rows, dy)
        return dx, dv, None, None


class SparseSum(SparseModule):
    """A linear map with chosen entries beside its matrix."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return the module's output and what the chosen entries add to it."""
        y: Tensor = super().forward(input, *args, **kwargs)
        values = vars(self)["_parameters"][_KEY]
        entries = self.sparse_entries["weight"]
        change: Any = _Change.apply(input, values, entries, y.dtype)  # pyright: ignore[reportUnknownMemberType]
        strength = self.sparse_strengths[_KEY]
        return y + (change if strength == 1 else strength * change)

    def rows_of(self, call: Call, name: str) -> Rows | None:
        """Return what each example asks of the whole of a parameter, as if all of it trained."""
        entries = self.sparse_entries.get(name)
        if entries is None:
            return super().rows_of(call, name)
        if call.input.ndim != 3:
            return None
        is_linear = entries.input_axis == 1
        return LinearRows(call.input, call.D) if is_linear else LinearRows(call.D, call.input)

    def follow(self) -> None:
        """Go along with parameters that were moved, cast or loaded."""
        entries = self.sparse_entries["weight"]
        assert isinstance(entries, Beside)
        entries.follow()
