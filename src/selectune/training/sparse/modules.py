"""Modules of which single entries train: their class is swapped for one that adds to it.

In place, the weight stays where it is and never requires a gradient. Beside it stands a parameter
`<name>_values`, which everything that looks for parameters finds: optimizers, clipping, DDP, loss
scaling, training methods. Whoever reads the weight gets it up to date and, where a graph is being
made, hanging on the values; a fused head that never calls its module is served like any other.
Linear modules have a product of their own, in which no dense gradient need exist.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from selectune.errors import TrainingError
from selectune.gradients.kernels import Call, Rows, SparseRows, Swapped, gradient_kernel, kernel_of
from selectune.training.sparse.entries import Entries
from selectune.training.sparse.in_place import InPlace
from selectune.training.sparse.routes import Chosen

VALUES = "_values"


class _Attached(torch.autograd.Function):
    """A weight that hangs on its chosen values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, entries: InPlace) -> Tensor:  # noqa: ANN401
        ctx.entries = entries
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's own decorator)
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> Any:  # noqa: ANN401
        entries: InPlace = ctx.entries

        def at(chosen: Chosen) -> Tensor:
            return entries.routes.gathered(chosen, lambda: grads[0])

        if entries.observer is not None:
            entries.observer(lambda: grads[0], at)
        return at(entries), None, None


class _Product(torch.autograd.Function):
    """A linear map whose backward pass gives gradients of chosen entries alone."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        entries: InPlace,
    ) -> Tensor:
        kind = x.device.type
        ctx.entries, ctx.dtype, ctx.shape = entries, x.dtype, x.shape
        used = weight
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            # What autocast itself does to a linear map, so that the input is kept as it was used.
            half = torch.get_autocast_dtype(kind)
            x, used = x.to(half), weight.to(half)
            bias = None if bias is None else bias.to(half)
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(kind, enabled=False):
            if entries.input_axis == 1:
                y = linear(x, used, bias)
            else:
                y = rows @ used if bias is None else torch.addmm(bias, rows, used)
                y = y.view(*x.shape[:-1], used.shape[1])
        channels = entries.channels
        is_few = channels is not None and entries.routes.takes_columns(entries)
        ctx.save_for_backward(rows[:, channels] if is_few else rows, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's own decorator)
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> Any:  # noqa: ANN401
        entries: InPlace = ctx.entries
        rows, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        for_x, for_values, _, for_bias, _ = ctx.needs_input_grad
        is_linear = entries.input_axis == 1
        dx = dv = None
        if for_x:
            used = weight.to(dy.dtype)
            dx = (dy @ (used if is_linear else used.mT)).view(ctx.shape).to(ctx.dtype)
        if for_values:
            dv = entries.gradient(rows, dy)
        return dx, dv, None, dy.sum(0) if for_bias else None, None


class Copied(Swapped):
    """A swapped module that can be copied and pickled; its class has no place in any file."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Say what the class is made of, in place of its name."""
        return _made, (*vars(type(self))["made_of"],), dict(vars(self))


class SparseModule(Copied):
    """What every module with chosen entries has."""

    sparse_entries: dict[str, Entries]  # by the name of the weight in the module
    # By the name of the values: 1 unless it is measured how the loss responds to them.
    sparse_strengths: dict[str, float]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseModule":
        """Move and cast the weights; the values stay as exact as they are."""
        own = [e.values for e in self.sparse_entries.values()]
        kept = {id(t) for v in own for t in (v, v.grad) if t is not None}

        def apart(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in kept and moved.dtype != t.dtype else moved

        super()._apply(apart, recurse)
        self.follow()
        return self

    def follow(self) -> None:
        """Go along with parameters that were moved, cast or loaded."""
        raise NotImplementedError

    def rows_of(self, call: Call, name: str) -> Rows | None:
        """Return what each example asks of the whole of a parameter, as if all of it trained."""
        kernel = kernel_of(self.swapped_from)
        return None if kernel is None else kernel(call, name)


class SparseWeight(SparseModule):
    """A module whose weights hold their chosen entries."""

    def attached(self, key: str) -> Tensor:
        """Return a weight up to date, hanging on its values where a graph is being made."""
        table: dict[str, Any] = vars(self)["_parameters"]
        entries, held, values = self._in_place(key), table[key], table[key + VALUES]
        if held is entries.weight:
            entries.sync()
        elif isinstance(held, nn.Parameter):
            raise TrainingError(
                f"{entries.name} is another tensor than when its entries were chosen",
                why="something replaced the parameters of the model: FSDP, offloading, resizing",
                do="`sparsify` after that; where weights are to be sharded, give `sparsify` "
                'form="compose"',
            )
        # What stands there for a while (a lent copy, an argument of a functional call) stays.
        if held.requires_grad or not values.requires_grad or not torch.is_grad_enabled():
            return held
        return _Attached.apply(values, held, entries)  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]

    def _in_place(self, key: str) -> InPlace:
        entries = self.sparse_entries[key]
        assert isinstance(entries, InPlace)
        return entries

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the module with one node for each weight, however often it reads the weight."""
        table: dict[str, Any] = vars(self)["_parameters"]
        lent = {key: table[key] for key in self.sparse_entries}
        table.update({key: self.attached(key) for key in lent})
        try:
            return super().forward(*args, **kwargs)
        finally:
            table.update(lent)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter, not what hangs on it."""
        with torch.no_grad():
            return super().get_parameter(target)

    def follow(self) -> None:
        """Go along with parameters that were moved, cast or loaded."""
        table: dict[str, Any] = vars(self)["_parameters"]
        for key in self.sparse_entries:
            self._in_place(key).follow(table[key], table[key + VALUES])


class SparseProduct(SparseWeight):
    """A Linear or Conv1D whose matrix has chosen entries."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the module's output."""
        table: dict[str, Any] = vars(self)["_parameters"]
        entries, values = self._in_place("weight"), table["weight" + VALUES]
        weight = table["weight"]
        if weight is not entries.weight or not values.requires_grad or not torch.is_grad_enabled():
            return super().forward(input)
        entries.sync()
        bias: Any = self.bias
        return _Product.apply(input, values, weight, bias, entries)  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]


def input_axis(module: nn.Module, key: str) -> int | None:
    """Return the axis of the inputs where a weight is the matrix of a plain linear module."""
    if key == "weight" and type(module).forward is nn.Linear.forward:
        return 1
    return 0 if key == "weight" and type(module).forward is Conv1D.forward else None


def _reader(key: str) -> property:
    def read(module: SparseWeight) -> Tensor:
        return module.attached(key)

    return property(read)


@cache
def swapped(
    kinds: tuple[type[Swapped], ...], plain: type[nn.Module], keys: tuple[str, ...]
) -> type[nn.Module]:
    """Return the class that stands in for another; it bears the other's name.

    Args:
        kinds: what is added.
        plain: the class of the module.
        keys: the names of the weights with chosen entries.
    """
    body = {
        "swapped_from": plain,
        "made_of": (kinds, plain, keys),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        **{key: _reader(key) for key in keys},
    }
    return type(plain.__name__, (*kinds, plain), body)


def _made(
    kinds: tuple[type[Swapped], ...], plain: type[nn.Module], keys: tuple[str, ...]
) -> nn.Module:
    return object.__new__(swapped(kinds, plain, keys))


@gradient_kernel(SparseModule)
def sparse_values(call: Call, name: str) -> Rows | None:
    """Rows of chosen values: those of the whole weight, read at the chosen entries."""
    module = call.module
    assert isinstance(module, SparseModule)
    entries = module.sparse_entries.get(name.removesuffix(VALUES))
    if entries is None or not name.endswith(VALUES):
        return module.rows_of(call, name)
    rows = module.rows_of(call, name.removesuffix(VALUES))
    if rows is None:
        return None
    is_matrix = entries.input_axis is not None
    return SparseRows(rows, entries.index, entries.pattern() if is_matrix else None)
