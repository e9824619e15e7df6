"""Hooks that hand over the rows of one module at a time, and a check that none is missing.

A forward hook threads each output through an identity node of autograd, a *tap*. In the backward
pass the tap sees the output gradient `D` and the module's saved inputs `X`, makes `Rows` and hands
them to a consumer; then both are freed. Inputs are saved the way autograd saves its own tensors, so
activation checkpointing (both kinds) drops and recomputes them like all others.

All taps share one scalar, the *anchor*. A backward pass towards the anchor alone runs through every
tap but forms no weight gradient, which is why gradients per example cost no more than a plain step.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from selectune.errors import CoverageError
from selectune.gradients.kernels import Call, JointRows, Rows, folded, is_flat, kernel_for

Consumer = Callable[[str, Rows], None]
_Site = Callable[[Tensor, tuple[Tensor, ...]], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        anchor: Tensor | None,
        site: _Site,
        *saved: Tensor,
    ) -> Tensor:
        ctx.site, ctx.is_anchored = site, anchor is not None
        ctx.save_for_backward(*saved)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        saved = ctx.saved_tensors
        ctx.site(grads[0], saved)
        zero = torch.zeros((), device=grads[0].device) if ctx.is_anchored else None
        return grads[0], zero, None, *(None for _ in saved)


def tap(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    receive: Callable[[Call], None],
    *,
    anchor: Tensor | None = None,
) -> Tensor:
    """Return the output of a module, threaded through a node that hands over the call in backward.

    Args:
        module: whose forward hook this is called in.
        args: of its forward.
        kwargs: of its forward.
        output: what it returned.
        receive: called in the backward pass, as soon as the gradient of `output` is known.
        anchor: a leaf that draws backward passes towards it through the node; None where the output
            requires a gradient anyway.
    """
    plain = [*args, *kwargs.values()]
    is_saved = [isinstance(value, Tensor) for value in plain]
    # Under autocast a matrix product saves its input in half precision; so do we.
    kind = output.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    is_product = isinstance(module, nn.Linear | Conv1D) and half is not None
    saved = tuple(
        v.detach().to(half) if is_product and v.dtype == torch.float32 else v.detach()
        for v in plain
        if isinstance(v, Tensor)
    )
    # The closure must not hold tensors: they belong to autograd, which may recompute them.
    n_args, keys = len(args), list(kwargs)
    others = [None if isinstance(v, Tensor) else v for v in plain]

    def site(D: Tensor, tensors: tuple[Tensor, ...]) -> None:
        source = iter(tensors)
        values = [next(source) if keep else v for v, keep in zip(others, is_saved, strict=True)]
        named = dict(zip(keys, values[n_args:], strict=True))
        receive(Call(module, tuple(values[:n_args]), named, D, half))

    return _Tap.apply(output, anchor, site, *saved)  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by their first name; tied ones stand once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def set_aside_gradients(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Start with every `.grad` empty, and put back what stood there.

    Autograd adds in place: a `.grad` that is only remembered would be changed all the same.
    """
    kept = {p: p.grad for p in parameters}
    for p in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept.items():
            p.grad = grad


class Capture:
    """Give a consumer every example's rows of every trainable parameter, as backward passes by.

    Use it as a context around forward and backward. Parameters used once are handed over as soon as
    their module's backward is done; tied ones, and modules called twice, by `finish`.

    Args:
        model: in any mode; its `requires_grad` flags say what is captured.
        consume: called with a parameter's name and its rows.
        skip: names of parameters to leave out (the engine loops over those).
    """

    def __init__(self, model: nn.Module, consume: Consumer, *, skip: Iterable[str] = ()) -> None:
        self._model = model
        self._consume = consume
        skipped = set(skip)
        self._names = {id(p): n for n, p in trainable(model).items() if n not in skipped}
        self._stack = ExitStack()
        self._anchor = torch.zeros((), requires_grad=True)
        self._n = self._t = 0
        self._is_backward = False
        self._calls: dict[int, int] = {}
        self._waiting: dict[int, list[Rows]] = {}
        self.declined: set[str] = set()
        # Used without a batch axis, which was put back on trust: tokens in the batch's order.
        self.folded: set[str] = set()
        self.seen: set[str] = set()

    def __enter__(self) -> "Capture":
        owners: dict[int, int] = {}
        for module in self._model.modules():
            owned = [
                (key, p)
                for key, p in module.named_parameters(recurse=False)
                if id(p) in self._names
            ]
            for _, p in owned:
                owners[id(p)] = owners.get(id(p), 0) + 1
            if owned and kernel_for(module) is not None:
                self._watch(module, [(key, id(p)) for key, p in owned])
        self._shared = {key for key, count in owners.items() if count > 1}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _watch(self, module: nn.Module, owned: list[tuple[str, int]]) -> None:
        def after_forward(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,  # noqa: ANN401
        ) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            # What checkpointing recomputes in the backward pass is the same use once more; a call
            # on something else than the batch (DoRA measures a norm with one) gives no rows.
            if not self._is_backward and self._is_batch(output):
                for _, key in owned:
                    self._calls[key] = self._calls.get(key, 0) + 1
            if not torch.is_grad_enabled():
                return None
            anchor = self._anchor.to(output.device)
            return tap(
                module, args, kwargs, output, lambda call: self._receive(call, owned), anchor=anchor
            )

        handle: RemovableHandle = module.register_forward_hook(after_forward, with_kwargs=True)
        self._stack.callback(handle.remove)

    def _is_batch(self, output: Tensor) -> bool:
        return output.shape[:1] == (self._n,) or is_flat(output, self._n, self._t)

    def _receive(self, call: Call, owned: list[tuple[str, int]]) -> None:
        kernel = kernel_for(call.module)
        assert kernel is not None
        if is_flat(call.D, self._n, self._t):
            call = folded(call, self._n, self._t)
            self.folded.update(self._names[key] for _, key in owned)
        for local, key in owned:
            name = self._names[key]
            rows = kernel(call, local) if call.D.shape[0] == self._n else None
            if rows is None:
                self.declined.add(name)
            elif self._calls.get(key, 0) > 1 or key in self._shared:
                self._waiting.setdefault(key, []).append(rows)
            else:
                self.seen.add(name)
                self._consume(name, rows)

    def expect(self, n: int, t: int = 0) -> None:
        """Say how many examples the coming forward pass holds, and how many tokens each has.

        Without the second, modules that are called without a batch axis are declined.
        """
        self._n, self._t = n, t
        self._is_backward = False
        self._calls.clear()
        self._waiting.clear()

    def backward(
        self, losses: Tensor, *, towards_weights: bool = False, also: Iterable[nn.Parameter] = ()
    ) -> None:
        """Run backward from the sum of the example losses, then `finish`.

        Args:
            losses: one loss per example, as the forward pass gave them.
            towards_weights: fill every `.grad`, as a training step does.
            also: parameters whose `.grad` is filled in any case.
        """
        total = losses.sum()
        self._is_backward = True
        if towards_weights:
            total.backward()
        elif _checkpoints_reentrantly(self._model):
            # Reentrant checkpointing refuses `inputs=`; what it leaves in `.grad` is taken away.
            wanted = {id(p) for p in also}
            with set_aside_gradients(p for p in self._model.parameters() if id(p) not in wanted):
                total.backward()
        elif total.requires_grad:
            torch.autograd.backward(total, inputs=[self._anchor, *also])
            self._anchor.grad = None
        self.finish()

    def finish(self) -> None:
        """Hand over what waited for its last use: tied parameters, modules called twice."""
        waiting, self._waiting = self._waiting, {}
        for key, parts in waiting.items():
            name = self._names[key]
            if name not in self.declined:
                self.seen.add(name)
                self._consume(name, parts[0] if len(parts) == 1 else JointRows(parts))


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    for module in model.modules():
        # transformers binds the kind of checkpointing into this function, and nowhere else.
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and module.__dict__.get("gradient_checkpointing"):
            return function.keywords.get("use_reentrant", True) is not False
    return False


def refuse_declined(capture: Capture) -> None:
    """Raise when rows could not be read.

    Raises:
        CoverageError: a parameter was used in a way that its kernel does not cover.
    """
    if capture.declined:
        names = sorted(capture.declined)
        raise CoverageError(
            f"{len(names)} trainable parameters would get no gradient per example",
            where=", ".join(names[:3]),
            why="their module was called with another shape than on the first batch",
            do="freeze them, or score with `token_budget` so small that a batch is one example",
        )
