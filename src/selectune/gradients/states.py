"""Means of the last hidden states of every example, and how alike two sets of examples are."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.data import Batch, Tokens, collate, length_sorted_batches
from selectune.errors import CoverageError
from selectune.gradients.engine import dropout_off, precision_of
from selectune.gradients.facts import StateFacts

# Weighted and plain mean, stacked.
Means = Float[Tensor, "2 n h"]


def state_similarity(
    model: nn.Module,
    pool: Sequence[Tokens],
    targets: Sequence[Tokens],
    *,
    groups: Sequence[str],
    pad_id: int,
    precision: str,
    token_budget: int,
    advance: Callable[[int], None] | None = None,
) -> StateFacts:
    """Return cosines between pool and targets, from one forward pass each; no state is kept.

    Args:
        model: a causal LM, in any mode, and left in it.
        pool: the candidates.
        targets: the examples that they are compared with.
        groups: each target's subtask label.
        pad_id: token id for padding.
        precision: autocast of the forward pass.
        token_budget: padded tokens in one batch.
        advance: called with the number of pool examples just done.

    Raises:
        CoverageError: the model's head reads something else than one state per token.
    """
    device = next(model.parameters()).device
    found = np.zeros((2, len(pool), len(targets)), np.float32)

    def means_of(items: Sequence[Tokens], rows: list[int]) -> Tensor:
        batch = collate([items[k] for k in rows], pad_id=pad_id, device=device)
        means = mean_states(model, batch, precision)
        return nn.functional.normalize(means, dim=-1)

    with dropout_off(model), torch.inference_mode():
        aims: Tensor | None = None
        for rows in _batches(targets, token_budget):
            means = means_of(targets, rows)
            aims = means.new_zeros(2, len(targets), means.shape[2]) if aims is None else aims
            aims[:, rows] = means
        assert aims is not None
        for rows in _batches(pool, token_budget):
            found[:, rows] = (means_of(pool, rows) @ aims.mT).cpu().numpy()
            if advance is not None:
                advance(len(rows))
    return StateFacts(found[0], found[1], tuple(t.id for t in targets), tuple(groups))


def _batches(items: Sequence[Tokens], token_budget: int) -> list[list[int]]:
    lengths = [len(t.input_ids) for t in items]
    return list(length_sorted_batches(lengths, token_budget=token_budget))


def mean_states(model: nn.Module, batch: Batch, precision: str) -> Means:
    """Return the mean state of each example's tokens, the t-th counting t times, and plainly.

    The state is what the LM head reads: past the last norm, and whatever the family does there.

    Args:
        model: a causal LM of transformers, bare or wrapped by peft.
        batch: padded on either side.
        precision: autocast of the forward pass.

    Raises:
        CoverageError: the head reads something else than one state per token.
    """
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    tokens, mask = (x.gather(1, order) for x in (batch.input_ids, batch.attention_mask))
    seen: list[Tensor] = []

    def before_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return args[0][:, :1], *args[1:]  # no logit is wanted

    # peft passes this method of transformers on through `__getattr__`, so no type knows of it.
    head = cast("nn.Module | None", cast("Any", model).get_output_embeddings())
    handle = None if head is None else head.register_forward_pre_hook(before_head)
    try:
        with precision_of(tokens.device, precision):
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
    if len(seen) != 1 or seen[0].shape[:2] != tokens.shape:
        raise CoverageError(
            "the model's head does not read one hidden state per token",
            where=type(model).__name__,
            why="an example is compared by the mean of these states",
            do="use a causal LM with an output layer of its own, or another score.method",
        )
    states = seen[0].float() * mask[..., None]
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) * mask
    weighted = (states * place[..., None]).sum(1) / place.sum(1, keepdim=True)
    return torch.stack((weighted, states.sum(1) / mask.sum(1, keepdim=True)))
