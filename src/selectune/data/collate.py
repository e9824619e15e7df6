"""Batches: padded tensors, and which examples go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from selectune.data.tokens import Tokens

NO_LOSS = -100  # what transformers and torch's cross-entropy call "no loss here"


@dataclass
class Batch:
    """Several examples as padded tensors.

    Attributes:
        ids: the examples, in the order of the rows.
        input_ids: token ids, filled up with the padding id.
        attention_mask: 1 at tokens, 0 at padding.
        labels: the token id at targets, -100 elsewhere. Not shifted: the label at position p is
            predicted from p - 1, as transformers has it.
    """

    ids: tuple[str, ...]
    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    labels: Int[Tensor, "n t"]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on `device`."""
        return Batch(
            self.ids,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
        )


def collate(
    items: Sequence[Tokens],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad examples to the longest of them.

    Args:
        items: at least one example.
        pad_id: the token id at padding; any id will do, as the attention mask hides it.
        side: where the padding stands.
        device: where the tensors are put.
    """
    shape = len(items), max(len(item.input_ids) for item in items)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, NO_LOSS, dtype=np.int64)
    for row, item in enumerate(items):
        length = len(item.input_ids)
        place = slice(length) if side == "right" else slice(shape[1] - length, shape[1])
        input_ids[row, place] = item.input_ids
        attention_mask[row, place] = 1
        labels[row, place] = np.where(item.is_target, item.input_ids, NO_LOSS)
    tensors = (torch.as_tensor(a, device=device) for a in (input_ids, attention_mask, labels))
    return Batch(tuple(item.id for item in items), *tensors)


def length_sorted_batches(
    lengths: Sequence[int] | np.ndarray,
    *,
    token_budget: int,
    max_examples: int | None = None,
) -> list[list[int]]:
    """Group examples of like length, so that little of a batch is padding.

    Args:
        lengths: tokens of each example.
        token_budget: the most tokens in a batch, padding included; a longer example goes alone.
        max_examples: the most examples in a batch.

    Returns:
        Indices into `lengths`, each in exactly one batch, the longest first: when memory does not
        suffice, that shows at once. Ties stand in their given order.
    """
    widths: list[int] = np.maximum(1, np.asarray(lengths, dtype=np.int64)).tolist()
    order = sorted(range(len(widths)), key=lambda k: -widths[k])  # stable: ties stay in order
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        # The first example is the longest of its batch, so its length is the batch's width.
        fits = max(1, token_budget // widths[order[start]])
        size = fits if max_examples is None else min(fits, max(1, max_examples))
        batches.append(order[start : start + size])
        start += size
    return batches


# What one more pass costs beside its tokens, in tokens: SmolLM2-135M on two cores, rounded.
_PASS_TOKENS = 64


def narrowed(batch: Batch) -> list[Batch]:
    """Split a batch into narrower ones, where that saves more padding than the passes cost.

    A few examples drawn at random are as wide as their longest: four of 250, 50, 50 and 50 tokens
    make 1,000, and 400 in two passes.

    Returns:
        Every example in exactly one batch; the batch itself where nothing is to be saved.
    """
    lengths = batch.attention_mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lambda k: -lengths[k])
    # best[j]: the least cost of the j longest, and where its last pass begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for j in range(1, len(order) + 1):
        best.append(
            min((best[i][0] + _PASS_TOKENS + (j - i) * lengths[order[i]], i) for i in range(j))
        )
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        groups.append(sorted(order[best[end][1] : end]))
        end = best[end][1]
    if len(groups) <= 1:
        return [batch]
    return [_cut(batch, rows) for rows in reversed(groups)]


def _cut(batch: Batch, rows: list[int]) -> Batch:
    is_used = batch.attention_mask[rows].any(0)
    return Batch(
        tuple(batch.ids[k] for k in rows),
        batch.input_ids[rows][:, is_used],
        batch.attention_mask[rows][:, is_used],
        batch.labels[rows][:, is_used],
    )
