"""A layer's autograd gate: what each example asks of a layer, before the layer's gradient exists.

A forward pre-hook on a decoder block passes its hidden states through an identity node, the *gate*,
that also takes the block's trainable parameters as inputs. Inside the block every trainable module
runs with detached weights and a tap on its output. In backward the gate's node runs when all taps
of its layer have, so it holds the rows of the whole layer: it asks for the gradients to deliver,
and returns them as the gradients of the parameters.

The plain weight gradient is never formed, and what is delivered reaches `.grad` through autograd:
accumulation, DDP's reduction, loss scaling and clipping see it like any other. Writing `.grad`
before the optimizer step would come after all of these.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selectune.errors import CoverageError
from selectune.gradients.capture import tap
from selectune.gradients.kernels import (
    Call,
    DenseRows,
    JointRows,
    LinearRows,
    Rows,
    SparseRows,
    folded,
    is_flat,
    kernel_for,
    thin,
)
from selectune.training.layers import Layer

Pass = TypeVar("Pass")
# (layer, the forward pass it belongs to, rows by parameter) -> gradient by parameter
Deliver = Callable[[Layer, Pass, Mapping[str, Rows]], Mapping[str, Tensor]]

# Where transformers keeps a block's checkpointing function, with its options.
_CHECKPOINT = "_gradient_checkpointing_func"


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        deliver: Callable[[], list[Tensor | None]],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.deliver = deliver
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        return grads[0], None, *ctx.deliver()


class _Visit:
    """One forward pass through one layer: how often each parameter was used, and the rows so far.

    Checkpointing runs a block's forward twice. Where the block's hooks run twice too, there are two
    visits, and the one whose nodes backward reaches counts. Where they do not, the same visit is
    made once more.
    """

    def __init__(self, of: object, n: int) -> None:
        self.of, self.n, self.t = of, n, 0
        self.is_over = False  # what comes now is recomputed
        self.is_dry = False  # checkpointing of the reentrant kind: no graph until recomputed
        self.uses: dict[str, int] = {}
        self.rows: dict[str, list[Rows]] = {}
        self.declined: set[str] = set()


class Gates(Generic[Pass]):
    """Gates on the layers of one model.

    Args:
        layers: to put gates on; one without a trainable parameter at the time of a forward pass is
            passed through untouched, at no cost.
        current: the forward pass that is going on and how many examples it holds; None while gates
            are to stand open, as in evaluation.
        deliver: called in backward once per layer and forward pass; gives the gradients.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        current: Callable[[], tuple[Pass, int] | None],
        deliver: Deliver[Pass],
    ) -> None:
        self._current, self._deliver = current, deliver
        self._handles: list[RemovableHandle] = []
        # torch runs no hook after an interrupt: what a forward pass was lent comes back by these.
        self._undo: list[Callable[[], None]] = []
        self.peak_rows = 0  # elements of rows and dense gradients held at once, at most
        for layer in layers:
            self._install(layer)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for give_back in self._undo:
            give_back()
        self._undo.clear()

    def _install(self, layer: Layer) -> None:
        visits: list[_Visit] = []  # the visit going on, if any
        lent: list[Any] = []  # the block's own checkpointing function, during a visit

        def enter(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            visits.clear()
            current = self._current()
            training = {name: p for name, p in layer.parameters.items() if p.requires_grad}
            if current is None or not training or not torch.is_grad_enabled():
                return None
            visit = _Visit(current[0], current[1])
            visits.append(visit)
            if (checkpoint := vars(block).get(_CHECKPOINT)) is not None:
                lent.append(checkpoint)
                vars(block)[_CHECKPOINT] = _revisiting(checkpoint, visit, visits)
            names = list(training)

            def deliver() -> list[Tensor | None]:
                return self._open(layer, visit, training)

            def gated(hidden: Tensor) -> Tensor:
                visit.t = hidden.shape[1]
                return _Gate.apply(hidden, deliver, *(training[name] for name in names))  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]

            for k, value in enumerate(args):
                if _is_hidden(value):
                    return (*args[:k], gated(value), *args[k + 1 :]), kwargs
            for key, value in kwargs.items():
                if _is_hidden(value):
                    return args, {**kwargs, key: gated(value)}
            raise CoverageError(
                f"{layer.name} is called without hidden states",
                where=type(block).__name__,
                why="its gate stands on the floating-point tensor that the block is given",
                do="use a causal LM whose decoder blocks take hidden states",
            )

        def leave(block: nn.Module, *_: object) -> None:
            for visit in visits:
                visit.is_over = True
            visits.clear()
            if lent:
                vars(block)[_CHECKPOINT] = lent.pop()

        def give_back() -> None:
            visits.clear()
            while lent:
                vars(layer.block)[_CHECKPOINT] = lent.pop()

        self._undo.append(give_back)
        handles = self._handles
        handles.append(layer.block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.block.register_forward_hook(leave, always_call=True))
        own = {id(p): name for name, p in layer.parameters.items()}
        for module in layer.block.modules():
            owned = {
                key: own[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in own
            }
            if owned and kernel_for(module) is not None:
                self._watch(module, owned, visits)

    def _watch(self, module: nn.Module, owned: Mapping[str, str], visits: list[_Visit]) -> None:
        kernel = kernel_for(module)
        assert kernel is not None
        # torch's own table: setting an attribute to a plain tensor would need the parameter's
        # place in it to be given up, and with it the order that optimizers count by.
        weights: dict[str, Any] = vars(module)["_parameters"]
        lent: list[dict[str, Any]] = []

        def before(*_: object) -> None:
            # A weight that asks for no gradient spares autograd the product with the inputs.
            held = {key: weights[key] for key in owned if weights[key].requires_grad}
            lent.append(held if visits else {})
            if visits:
                for key, p in held.items():
                    weights[key] = p.detach()
            elif held and torch.is_grad_enabled() and self._current() is not None:
                raise CoverageError(
                    f"{len(held)} parameters are used outside of their layer's forward pass",
                    where=", ".join(owned[key] for key in held),
                    why="what the layer picks would not reach them (a prefix that all layers get "
                    "from one place, for one)",
                    do="freeze these parameters, or train another kind of adapter",
                )

        def after(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,  # noqa: ANN401
        ) -> Tensor | None:
            # Another hook may have raised before ours.
            held = lent.pop() if lent else {}
            weights.update(held)
            # Without an output the forward pass has raised; a call on something else than the
            # batch (DoRA measures a norm with one) gives no rows.
            if not held or not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            visit = visits[0]
            if output.shape[:1] != (visit.n,) and not is_flat(output, visit.n, visit.t):
                return None
            if not torch.is_grad_enabled():
                visit.is_dry = True
                return None
            if visit.is_dry or not visit.is_over:
                for key in held:
                    visit.uses[owned[key]] = visit.uses.get(owned[key], 0) + 1

            def receive(call: Call) -> None:
                if is_flat(call.D, visit.n, visit.t):
                    call = folded(call, visit.n, visit.t)
                for key in held:
                    rows = kernel(call, key)
                    name = owned[key]
                    if rows is None:
                        visit.declined.add(name)
                    else:
                        visit.rows.setdefault(name, []).append(thin(rows))

            return tap(module, args, kwargs, output, receive)

        def give_back() -> None:
            while lent:
                weights.update(lent.pop())

        self._undo.append(give_back)
        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(
            module.register_forward_hook(after, with_kwargs=True, always_call=True)
        )

    def _open(
        self, layer: Layer, visit: _Visit, training: Mapping[str, nn.Parameter]
    ) -> list[Tensor | None]:
        missing = [n for n, uses in visit.uses.items() if len(visit.rows.get(n, [])) != uses]
        if missing or visit.declined:
            names = sorted({*missing, *visit.declined})
            raise CoverageError(
                f"{len(names)} parameters would get no gradient per example",
                where=", ".join(names[:3]),
                why="their module is fed by something else than the block's hidden states, or is "
                "called with a shape that its kernel does not cover",
                do="freeze these parameters",
            )
        rows = {
            name: parts[0] if len(parts) == 1 else JointRows(parts)
            for name, parts in visit.rows.items()
        }
        self.peak_rows = max(self.peak_rows, sum(_size(r) for r in rows.values()))
        visit.rows = {}
        found = self._deliver(layer, cast("Pass", visit.of), rows)
        return [found[name].to(p.dtype) if name in found else None for name, p in training.items()]


def _revisiting(checkpoint: "partial[Any]", visit: _Visit, visits: list[_Visit]) -> "partial[Any]":
    """Return a checkpointing function that recomputes within the same visit.

    transformers 5.24 recomputes a block's forward without the block's hooks, which would open one.
    """

    def lend(run: Callable[..., Any], *args: Any, **options: Any) -> Any:  # noqa: ANN401
        def visited(*inner: Any) -> Any:  # noqa: ANN401
            before = list(visits)
            visits[:] = [visit]
            try:
                return run(*inner)
            finally:
                visits[:] = before

        return checkpoint.func(visited, *args, **options)

    return partial(lend, *checkpoint.args, **checkpoint.keywords)


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3


def _size(rows: Rows) -> int:
    match rows:
        case DenseRows():
            return rows.G.numel()
        case LinearRows():
            return rows.X.numel() + rows.D.numel()
        case JointRows():
            return sum(_size(part) for part in rows.parts)
        case SparseRows():
            return _size(rows.whole)
        case _:
            return rows.n
