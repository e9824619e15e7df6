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
