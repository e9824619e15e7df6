"""The loss of each example of a batch, with the LM head computed at target positions only.

With prompts three quarters of the tokens, most of the head's work would go to logits that no loss
reads. A forward pre-hook on the model's own head gathers the hidden states that do predict a target
token, so whatever the model does to its logits afterwards (soft-capping, scaling) stays right.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from selectune.data.collate import NO_LOSS, Batch
from selectune.errors import CoverageError, DataError


def target_nll(
    model: nn.Module, batch: Batch, draws: Float[Tensor, "n t"] | None = None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return each example's summed cross-entropy over its target tokens, and their number.

    Args:
        model: as `token_nll` takes it.
        batch: on the model's device; a label at position 0 is ignored, as nothing predicts it.
        draws: as `token_nll` takes them; None for the batch's own labels.

    Returns:
        Nats, summed in fp32 (fp64 for an fp64 model) and differentiable; counts of target tokens.

    Raises:
        DataError: an example has no target token, so its loss is undefined.
        CoverageError: the model returns logits that do not line up with its input tokens.
    """
    nats, is_real = token_nll(model, batch, draws)
    return nats.sum(1), is_real.sum(1)


def token_nll(
    model: nn.Module, batch: Batch, draws: Float[Tensor, "n t"] | None = None
) -> tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]:
    """Return the cross-entropy of each target token, in the order of an example's tokens.

    Padding may stand on either side: rows are moved to the left first, which leaves positions as
    the model was trained with, whether it takes them as ids, learns them or has none. Trainable
    heads are called with `[n, T, hidden]`, so that gradients keep a batch axis; frozen ones with
    `[1, all targets, hidden]`, which wastes nothing.

    Args:
        model: a causal LM of transformers, bare or wrapped by peft, in any mode and dtype.
        batch: on the model's device; a label at position 0 is ignored, as nothing predicts it.
        draws: uniform numbers in [0, 1), one for each target token of an example in order, the rest
            unused; the model's own tokens, drawn by them, then stand in for the labels.

    Returns:
        Nats in fp32 (fp64 for an fp64 model) and differentiable, 0 where an example has fewer
        target tokens than the longest; True where there is one.

    Raises:
        DataError: an example has no target token, so its loss is undefined.
        CoverageError: the model returns logits that do not line up with its input tokens.
    """
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    tokens, mask, labels = (
        x.gather(1, order) for x in (batch.input_ids, batch.attention_mask, batch.labels)
    )
    n, t = tokens.shape
    is_target = labels[:, 1:] != NO_LOSS
    n_tokens = is_target.sum(1)
    _refuse_empty(batch, n_tokens)

    head = _head(model)
    width = int(n_tokens.max())
    # Where the predicting positions of each row stand, in order; row n's first n_tokens[n] count.
    positions = is_target.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    is_real = torch.arange(width, device=tokens.device) < n_tokens[:, None]
    slots = positions + t * torch.arange(n, device=tokens.device)[:, None]
    answers = labels.take(slots + 1).where(is_real, NO_LOSS)
    if head is None or not any(p.requires_grad for p in head.parameters()):
        slots, answers = slots[is_real][None], answers[is_real][None]

    def gather(hidden: Tensor) -> Tensor:
        picked = hidden.flatten(0, 1).index_select(0, slots.flatten())
        return picked.view(*slots.shape, hidden.shape[-1])

    def before_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != (n, t):
            return None
        return gather(args[0]), *args[1:]

    handle = None if head is None else head.register_forward_pre_hook(before_head)
    try:
        is_half = torch.is_autocast_enabled(tokens.device.type)
        with _inputs_as_they_are(model if is_half else nn.Module()):
            logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    # The two shapes never coincide: position 0 is no target, so a row has at most t - 1 of them.
    if logits.shape[:-1] == (n, t):
        logits = gather(logits)
    elif logits.shape[:-1] != slots.shape:
        raise CoverageError(
            f"the model returned logits of shape {list(logits.shape)} for {n} x {t} tokens",
            where=type(model).__name__,
            why="an example's loss needs one row of logits for each of its tokens",
            do="use a causal LM without virtual tokens or a loss of its own",
        )
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if draws is not None:
        u = draws[:, :width]
        u = u if answers.shape == u.shape else u[is_real][None]
        answers = _drawn(exact.detach(), u).where(answers != NO_LOSS, NO_LOSS)
    nats = functional.cross_entropy(
        exact.flatten(0, 1), answers.flatten(), ignore_index=NO_LOSS, reduction="none"
    )
    if slots.shape != is_real.shape:
        nats = nats.new_zeros(is_real.shape).masked_scatter(is_real, nats)
    return nats.view_as(is_real), is_real


def _drawn(logits: Float[Tensor, "a b v"], u: Float[Tensor, "a b"]) -> Int[Tensor, "a b"]:
    """Return the token whose share of the summed probabilities u falls into."""
    reached = logits.softmax(-1).cumsum(-1)
    level = u.to(reached.dtype)[..., None] * reached[..., -1:]
    return torch.searchsorted(reached, level, right=True)[..., 0].clamp_(max=logits.shape[-1] - 1)


@contextmanager
def _inputs_as_they_are(model: nn.Module) -> Generator[None]:
    """Keep peft from widening the input of every adapter to the factors' fp32.

    Autocast narrows it again at once: the same numbers, and an fp32 copy of the activations per
    adapted module. peft 0.21's own helper fails at the kinds of adapter that have no such switch.
    """
    switch = "cast_input_dtype_enabled"
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and switch in vars(m)]
    before = [vars(layer)[switch] for layer in layers]
    for layer in layers:
        vars(layer)[switch] = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            vars(layer)[switch] = value


def _head(model: nn.Module) -> nn.Module | None:
    # peft passes this method of transformers on through `__getattr__`, so no type knows of it.
    return cast("Any", model).get_output_embeddings()


def _refuse_empty(batch: Batch, n_tokens: Tensor) -> None:
    empty = [id for id, n in zip(batch.ids, n_tokens.cpu().numpy(), strict=True) if n == 0]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(batch.ids)} examples of a batch have no target token",
            where="example " + ", ".join(empty[:5]),
            why="the loss of an example is a mean over its target tokens",
            do="raise `data.max_length`, or take these examples out",
        )
