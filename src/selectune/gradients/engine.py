"""The gradient of every example at every trainable parameter, for the price of a backward pass.

`GradientEngine.run` takes one batch, hands each parameter's rows to a consumer as soon as they
exist, and returns the losses. What no kernel covers takes an exact loop over examples; which
parameters those are is found out by `probe`, which compares the sum of all rows with autograd's own
gradient. A functional call around a module, a fused head or an odd norm is thus found, not missed.
"""

import logging
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.data import Batch, Tokens, collate, length_sorted_batches
from selectune.errors import CoverageError, SelectionError
from selectune.gradients.capture import (
    Capture,
    Consumer,
    refuse_declined,
    set_aside_gradients,
    trainable,
)
from selectune.gradients.kernels import DenseRows, Rows, exact, ones
from selectune.gradients.loss import target_nll

_log = logging.getLogger(__name__)

# How far the sum of rows may lie from autograd's gradient, relative to its norm. Half precision
# rounds each of the two sums differently; a missed use of a parameter is off by a share of 1.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_TOLERANCE_HALF = 0.1
# The same where the gradient is 0 but for rounding, as of OPT's key biases, which softmax cancels:
# relative to the largest gradient of the model.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-6}
_ROUNDING_HALF = 1e-3


@contextmanager
def precision_of(device: torch.device, precision: str) -> Generator[None]:
    """Enter autocast for one forward pass; entered anew each time, so no stale casts survive."""
    dtype = getattr(torch, precision)
    with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        yield


def example_loss(model: nn.Module, batch: Batch, precision: str = "float32") -> Float[Tensor, " n"]:
    """Return the mean cross-entropy of each example over its target tokens, in nats, fp32.

    Source: DESIGN.md, section 2, "loss of an example". The batch loss of transformers differs: one
    mean over all tokens of the batch.
    """
    with precision_of(batch.input_ids.device, precision):
        nats, n_tokens = target_nll(model, batch)
    return nats / n_tokens


@contextmanager
def dropout_off(model: nn.Module) -> Generator[None]:
    """Put a model in eval mode, and every module back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def pool_losses(
    model: nn.Module,
    tokens: Sequence[Tokens],
    *,
    pad_id: int,
    precision: str,
    token_budget: int,
    advance: Callable[[int], None] | None = None,
) -> Float[np.ndarray, " n"]:
    """Return the loss of every example from one forward pass each, dropout off, no gradients.

    Args:
        model: in any mode, and left in it.
        tokens: the examples.
        pad_id: token id for padding.
        precision: autocast of the forward pass.
        token_budget: padded tokens in one batch.
        advance: called with the number of examples just done.
    """
    losses = np.zeros(len(tokens), np.float32)
    device = next(model.parameters()).device
    lengths = [len(t.input_ids) for t in tokens]
    with dropout_off(model), torch.inference_mode():
        for rows in length_sorted_batches(lengths, token_budget=token_budget):
            batch = collate([tokens[k] for k in rows], pad_id=pad_id, device=device)
            losses[rows] = example_loss(model, batch, precision).float().cpu().numpy()
            if advance is not None:
                advance(len(rows))
    return losses


class GradientEngine:
    """Per-example gradients of a model's trainable parameters, batch by batch.

    Args:
        model: its `requires_grad` flags say what is captured; put in eval mode, so that dropout
            is off.
        precision: "float32", "bfloat16" or "float16": the autocast of each forward pass.
        only: names of the trainable parameters that matter; None for all.

    Raises:
        SelectionError: nothing in the model is trainable.
    """

    def __init__(
        self, model: nn.Module, *, precision: str = "float32", only: Container[str] | None = None
    ) -> None:
        self.model = model.eval()
        self.precision = precision
        found = trainable(model)
        self.parameters = {n: p for n, p in found.items() if only is None or n in only}
        self._outside = frozenset(found.keys() - self.parameters.keys())
        self.looped: frozenset[str] = frozenset()
        # Without rows and without gradient on the first batch; a later one may yet use them.
        self.idle: frozenset[str] = frozenset()
        self._n_probed = 0
        if not self.parameters:
            raise SelectionError(
                "no parameter of the model is trainable",
                why="gradients are taken of the parameters with requires_grad=True",
                do="add a peft adapter, or unfreeze layers",
            )

    def run(self, batch: Batch, consume: Consumer) -> Float[Tensor, " n"]:
        """Hand every parameter's rows to `consume` once, and return the example losses.

        Raises:
            CoverageError: a parameter's rows cannot be told apart by example.
        """
        if self._n_probed < min(2, len(batch.ids)):
            self.probe(batch)
        # A layer sampler may have frozen some since the probe.
        idle = [p for name in self.idle if (p := self.parameters[name]).requires_grad]
        with (
            set_aside_gradients(idle),
            Capture(self.model, consume, skip=self.looped | self._outside) as capture,
        ):
            capture.expect(*batch.input_ids.shape)
            losses = example_loss(self.model, batch, self.precision)
            capture.backward(losses, also=idle)
            woken = {
                name
                for name in self.idle - capture.seen
                if (grad := self.parameters[name].grad) is not None and bool(grad.any())
            }
        refuse_declined(capture)
        if woken:
            self.looped, self.idle = self.looped | woken, self.idle - woken
            self._tell_looped()
        if self.looped:
            self._loop(batch, consume)
        return losses.detach()

    def probe(self, batch: Batch) -> None:
        """Find the parameters whose rows do not add up to autograd's gradient, and loop over them.

        Two examples tell: a batch axis of one would hide broadcasting, and the order of tokens
        where a module is called without a batch axis. A first batch of one is no last word.
        """
        few = take(batch, [0, len(batch.ids) - 1]) if len(batch.ids) > 1 else batch
        self._n_probed = len(few.ids)
        sums: dict[str, Tensor] = {}
        firsts: dict[str, Tensor] = {}

        def add_up(name: str, rows: Rows) -> None:
            sums[name] = rows.combine(ones(rows))
            if name in capture.folded:
                only = ones(rows)
                only[1:] = 0
                firsts[name] = rows.combine(only)

        with set_aside_gradients(self.model.parameters()):
            with Capture(self.model, add_up, skip=self._outside) as capture:
                capture.expect(*few.input_ids.shape)
                losses = example_loss(self.model, few, self.precision)
                capture.backward(losses, towards_weights=True)
            bad = self._astray(sums, self.parameters)
        if firsts:
            with set_aside_gradients(self.model.parameters()):
                example_loss(self.model, take(few, [0]), self.precision).sum().backward()
                bad += self._astray(firsts, firsts)
        self.looped = frozenset({*bad, *capture.declined})
        self.idle = frozenset(self.parameters.keys() - sums.keys() - self.looped)
        if self.looped:
            self._tell_looped()

    def _astray(self, found: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
        """Return the parameters whose `.grad` is not what was found."""
        half = self.precision != "float32"
        grads = {name: self.parameters[name].grad for name in names}
        norms = [torch.linalg.vector_norm(g) for g in grads.values() if g is not None]
        largest = max(map(float, norms), default=0.0)
        return [n for n, g in grads.items() if not _agree(found.get(n), g, half, largest)]

    def _tell_looped(self) -> None:
        _log.warning(
            "%d of %d parameters have no fast gradient kernel; one backward pass per example "
            "covers them, first: %s",
            len(self.looped), len(self.parameters), sorted(self.looped)[0],
        )  # fmt: skip

    def _loop(self, batch: Batch, consume: Consumer) -> None:
        names = sorted(self.looped)
        parameters = [self.parameters[name] for name in names]
        gradients: list[list[Tensor]] = [[] for _ in names]
        for k in range(len(batch.ids)):
            with set_aside_gradients(self.model.parameters()):
                # Not `autograd.grad`: reentrant checkpointing refuses it.
                example_loss(self.model, take(batch, [k]), self.precision).sum().backward()
                for column, p in zip(gradients, parameters, strict=True):
                    column.append(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, column in zip(names, gradients, strict=True):
            consume(name, DenseRows(exact(torch.stack(column))))


def take(batch: Batch, rows: list[int]) -> Batch:
    """Return some examples of a batch, in the order asked for."""
    return Batch(
        tuple(batch.ids[k] for k in rows),
        batch.input_ids[rows],
        batch.attention_mask[rows],
        batch.labels[rows],
    )


def _agree(total: Tensor | None, gradient: Tensor | None, half: bool, largest: float) -> bool:
    if gradient is None:
        return total is None or not bool(total.any())
    if total is None:
        return not bool(gradient.any())
    if not bool(torch.isfinite(gradient).all()):
        raise CoverageError(
            "a gradient is not a number on the first batch",
            why="the loss overflowed, or the weights already hold NaN",
            do="use model.dtype=float32, and check the base weights",
        )
    reference = gradient.to(total.dtype)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE.get(gradient.dtype, _TOLERANCE_HALF)
    rounding = _ROUNDING_HALF if half else _ROUNDING.get(gradient.dtype, _ROUNDING_HALF)
    error = torch.linalg.vector_norm(total - reference)
    bound = tolerance * torch.linalg.vector_norm(reference) + rounding * largest + 1e-12
    return bool(error <= bound)
