"""What a pass over examples says about every eligible weight, with one dense gradient at a time.

    mean_gradient     g  = mean over examples of the gradient of the example's loss
    square_gradient   g2 = mean over micro-batches (of one example) of the squared gradient
    first_gradient    g of the first micro-batch alone
    drift             weight after full fine-tuning, minus weight

The mean is linear: one ordinary backward pass from the sum of the losses of a batch gives its part
of it, and `sums.GradientSums` adds it up.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from selectune.data import Tokens, collate, length_sorted_batches
from selectune.errors import DataError, SelectionError, TrainingError
from selectune.gradients.engine import precision_of
from selectune.gradients.loss import target_nll
from selectune.registry import WeightNeed
from selectune.training.ranks import add_up, rank, world
from selectune.weights.base import base_weights
from selectune.weights.eligible import EligibleWeight
from selectune.weights.sums import GradientSums

_log = logging.getLogger(__name__)

# Whether the mean is over examples, each the mean over its target tokens, or over all tokens.
Weighting = Literal["example", "token"]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """The evidence about every eligible weight.

    Attributes:
        values: per need and tensor, fp32 on the CPU, in the shape of the weight.
        ids: of the examples that it was drawn from.
        silent: tensors of which a statistic is zero throughout.
        peak_gradient_bytes: dense gradients that were alive at once, in one backward pass.
    """

    values: Mapping[WeightNeed, Mapping[str, Tensor]] = field(
        default_factory=dict[WeightNeed, Mapping[str, Tensor]]
    )
    ids: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    peak_gradient_bytes: int = 0


def drawn(tokens: Sequence[Tokens], n: int, seed: int) -> list[Tokens]:
    """Return n examples, drawn by seed and id, whatever the order of the pool; all if fewer."""

    def place(item: Tokens) -> bytes:
        return sha256(f"{seed}:{item.id}".encode()).digest()

    return sorted(tokens, key=place)[:n]


def estimate(
    model: nn.Module,
    tokens: Sequence[Tokens],
    needs: frozenset[WeightNeed],
    eligible: Mapping[str, EligibleWeight],
    *,
    examples: int = 1024,
    seed: int = 0,
    weighting: Weighting = "example",
    micro_batch: int = 1,
    pad_id: int = 0,
    precision: str = "float32",
    token_budget: int = 1024,
    tuned: nn.Module | None = None,
    spill: Path | None = None,
    advance: Advance | None = None,
) -> Statistics:
    """Compute what a weight scorer needs; model, gradients and flags are left as they were.

    Under torch.distributed every process gives the same tokens, takes its share of the batches,
    and gets the sums of all.

    Args:
        model: a causal LM, bare or with adapters, dropout off during the pass.
        tokens: of the pool; those without a target token are passed over.
        needs: which statistics.
        eligible: from `eligible_weights`.
        examples: drawn from the pool.
        seed: of the draw.
        weighting: what the mean is over.
        micro_batch: examples in one, for squares and for the first gradient.
        pad_id: token id at padding.
        precision: autocast of the forward pass.
        token_budget: padded tokens in one batch.
        tuned: the model after full fine-tuning, for "drift".
        spill: folder on whose disk the sums lie, 4 bytes per eligible weight; None keeps them in
            memory.
        advance: called with the number of examples just done.

    Raises:
        DataError: a pass over examples is needed and there are none.
        TrainingError: a gradient is not a number, or all of them are zero.
        SelectionError: the fine-tuned model is another one.
        StorageError: the sums find no room on disk.
    """
    values: dict[WeightNeed, dict[str, Tensor]] = {}
    used: list[Tokens] = []
    peak = 0
    if needs - {"drift"}:
        used = drawn([t for t in tokens if t.is_target[1:].any()], examples, seed)
        if not used:
            raise DataError(
                "no example has a target token",
                where="data",
                why="weights are scored by the gradient of the examples' loss",
                do="give rows with prompt and completion, or raise max_length",
            )
    for need in sorted(needs):
        if need == "drift":
            values[need] = _drift(eligible, tuned)
            continue
        batches = _batches(used, need, micro_batch, token_budget)
        sums = GradientSums(eligible, is_squared=need == "square_gradient", spill=spill)
        with sums.watching(model):
            for items in batches[rank() :: world()]:
                _backward(model, items, need, weighting, pad_id, precision)
                if advance is not None:
                    advance(len(items))
        parts = len(batches) if need == "square_gradient" else 1
        if need != "square_gradient":
            every = [item for items in batches for item in items]
            parts = (
                len(every)
                if weighting == "example"
                else sum(int(item.is_target[1:].sum()) for item in every)
            )
        device = next(model.parameters()).device
        values[need] = {name: _shared(t, device).div_(parts) for name, t in sums.take()}
        peak = max(peak, sums.peak_bytes)
    return Statistics(values, tuple(t.id for t in used), _silent(values), peak)


def _batches(
    used: list[Tokens], need: WeightNeed, micro_batch: int, token_budget: int
) -> list[list[Tokens]]:
    if need == "square_gradient":
        return [used[k : k + micro_batch] for k in range(0, len(used), micro_batch)]
    if need == "first_gradient":
        used = used[:micro_batch]
    lengths = [len(t.input_ids) for t in used]
    groups = length_sorted_batches(lengths, token_budget=token_budget)
    return [[used[k] for k in group] for group in groups]


def _backward(
    model: nn.Module,
    items: list[Tokens],
    need: WeightNeed,
    weighting: Weighting,
    pad_id: int,
    precision: str,
) -> None:
    device = next(model.parameters()).device
    batch = collate(items, pad_id=pad_id, device=device)
    with precision_of(device, precision):
        nats, n_tokens = target_nll(model, batch)
    losses = nats / n_tokens
    if not bool(losses.isfinite().all()):
        bad = [t.id for t, x in zip(items, losses.tolist(), strict=True) if not abs(x) < 1e30]
        raise TrainingError(
            f"the loss of {len(bad)} examples is not a number",
            where="example " + ", ".join(bad[:3]),
            why="the forward pass overflowed, or the weights already hold NaN",
            do="score with precision=float32, and check the base weights",
        )
    total = losses.sum() if weighting == "example" else nats.sum()
    if need == "square_gradient":  # of the mean over the micro-batch
        total = total / (len(items) if weighting == "example" else n_tokens.sum())
    if total.requires_grad:  # a model may not use the eligible weights at all
        total.backward()


def _shared(total: Tensor, device: torch.device) -> Tensor:
    """Return the sum over all processes; some backends add up on the device only."""
    return total if world() == 1 else add_up([total.to(device)])[0].cpu()


def _drift(eligible: Mapping[str, EligibleWeight], tuned: nn.Module | None) -> dict[str, Tensor]:
    assert tuned is not None
    after = base_weights(tuned)
    found: dict[str, Tensor] = {}
    for name, weight in eligible.items():
        before = weight.parameter.detach()
        if name not in after or after[name].shape != before.shape:
            raise SelectionError(
                f"the fine-tuned model has no {name} of shape {list(before.shape)}",
                where="tuned",
                why="what fine-tuning changed is found weight by weight",
                do="give the model that was fine-tuned from this base",
            )
        found[name] = after[name].detach().cpu().float() - before.cpu().float()
    return found


def _silent(values: Mapping[WeightNeed, Mapping[str, Tensor]]) -> tuple[str, ...]:
    silent: dict[str, None] = {}
    for need, tensors in values.items():
        zero: list[str] = []
        for name, tensor in tensors.items():
            low, high = (float(x) for x in tensor.aminmax())  # in one reading pass; NaN spreads
            if not (isfinite(low) and isfinite(high)):
                raise TrainingError(
                    f"the {need.replace('_', ' ')} of {name} is not a number",
                    where=name,
                    why="a weight holds NaN, or a sum overflowed",
                    do="check the weights",
                )
            if low == high == 0:
                zero.append(name)
        words = need.replace("_", " ")
        if len(zero) == len(tensors):
            raise TrainingError(
                f"the {words} of every eligible weight is zero",
                where=f"{zero[0]} and {len(zero) - 1} more",
                why="full fine-tuning changed nothing"
                if need == "drift"
                else "no loss depends on these weights",
                do="give the model as it was after training"
                if need == "drift"
                else "check `eligible`, and that the model uses these weights",
            )
        if zero:
            _log.warning(
                "%s: zero throughout in %d of %d tensors, first: %s",
                words, len(zero), len(tensors), zero[0],
            )  # fmt: skip
        silent.update(dict.fromkeys(zero))
    return tuple(silent)
