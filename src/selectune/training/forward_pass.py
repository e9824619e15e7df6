"""One forward pass of the training loop, as a method that picks examples sees it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectune.data import Batch
from selectune.data.collate import NO_LOSS
from selectune.errors import DataError
from selectune.gradients.kernels import Rows


@dataclass(slots=True, eq=False)
class Scored:
    """Sums over the parameters of one picking unit."""

    score: Tensor | float = 0.0
    norm2: Tensor | float = 0.0
    gram: Tensor | float = 0.0


@dataclass(slots=True, eq=False)
class ForwardPass:
    """What is known of a forward pass before its backward pass."""

    n: int  # rows, of which the last `n_aside` are targets that ride along
    n_aside: int
    n_tokens: Int[Tensor, " n"]  # target tokens
    is_valid: Bool[Tensor, " n"]
    noise: Float[Tensor, "units all"]  # of the examples of all processes, if they pick together
    k: int
    mine: slice  # this process's examples among all
    counts: list[int]  # examples of each process
    # Two passes: what the first one found, by picking unit.
    scored: dict[str, Scored] = field(default_factory=dict[str, Scored])
    # Rows of one parameter under each example's own mean loss, to find the loss's weights by.
    replay: dict[str, Rows] = field(default_factory=dict[str, Rows])
    is_half: bool = False  # some of the passes runs in half precision

    @property
    def is_telling(self) -> bool:
        """Whether its examples differ in length, so that their weights can be told apart."""
        lengths = self.n_tokens[self.is_valid]
        return lengths.numel() > 1 and bool((lengths != lengths[0]).any())


def read_batch(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: tuple[Tensor, Sequence[str]] | None,
) -> Batch:
    """Return the batch that a model is called with.

    Args:
        args: of the call.
        kwargs: of the call.
        expected: labels and ids of the examples, where the loop told them before.

    Raises:
        DataError: its rows are not one example each, or its labels are unknown.
    """
    tokens = kwargs.get("input_ids", args[0] if args else None)
    labels = kwargs.get("labels") if expected is None else expected[0]
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        raise DataError(
            "the model is called without token ids",
            where="input_ids",
            why="picks need one row of tokens per example",
            do="train on input_ids",
        )
    _refuse_packed(tokens, kwargs)
    if labels is None:
        raise DataError(
            "the model is called without labels",
            where="labels",
            why="how long an example's answer is decides its weight in the loss",
            do="give labels to the model, or call session.expect(labels) before",
        )
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    ids = () if expected is None else expected[1]
    return Batch(tuple(ids) or ("",) * len(tokens), tokens, mask, labels)


def with_answers(batch: Batch) -> Batch:
    """Give every example target tokens, as passes of our own need some; nobody reads theirs."""
    is_empty = (batch.labels[:, 1:] == NO_LOSS).all(1)
    labels = torch.where(is_empty[:, None], batch.input_ids, batch.labels)
    return Batch(batch.ids, batch.input_ids, batch.attention_mask, labels)


def draw_noise(
    keys: Int[Tensor, " n"], units: int, seed: Sequence[int], *, is_same: bool
) -> Float[Tensor, "units n"]:
    """Return Gumbel noise per picking unit and example; it goes with an example, not its place.

    Args:
        keys: a number per example that depends on its tokens only.
        units: what picks by itself: layers, or modules.
        seed: of the draw.
        is_same: every unit draws with the same noise.
    """
    rng = np.random.default_rng(list(seed))
    noise = np.empty((units, len(keys)), np.float32)
    noise[:, np.argsort(keys.numpy(), kind="stable")] = rng.gumbel(size=noise.shape)
    if is_same:
        noise[:] = noise[:1]
    return torch.from_numpy(noise)


def content_keys(tokens: Int[Tensor, "n t"], mask: Int[Tensor, "n t"]) -> Int[Tensor, " n"]:
    """Return a number per row that depends on its real tokens only, to order a batch by."""
    ids, is_real = tokens.cpu().numpy(), mask.cpu().numpy().astype(bool)
    if is_real.shape != ids.shape:
        is_real = np.ones_like(ids, bool)
    digests = [
        hashlib.blake2b(row[real].astype(np.int64).tobytes(), digest_size=8).digest()
        for row, real in zip(ids, is_real, strict=True)
    ]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])


def _refuse_packed(tokens: Tensor, kwargs: Mapping[str, Any]) -> None:
    positions = kwargs.get("position_ids")
    starts = 0 if positions is None else int((positions == 0).sum())
    is_padding_free = any(kwargs.get(key) is not None for key in ("cu_seq_lens_q", "seq_idx"))
    # Left padding repeats position 0 or 1 in front, where the mask is 0.
    mask = kwargs.get("attention_mask")
    if positions is not None and mask is not None and mask.shape == positions.shape:
        starts = int(((positions == 0) & (mask > 0)).sum())
    if is_padding_free or starts > len(tokens):
        raise DataError(
            "the batch is packed: one row holds several examples",
            where="position_ids",
            why="examples are picked one by one, and a row counts as one",
            do="turn off packing and padding_free",
        )
