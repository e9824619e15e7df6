"""Where a training method draws examples from, for passes of its own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from selectune.data import Batch, Tokens, collate, read_examples, tokenize
from selectune.errors import ConfigError, DataError
from selectune.training.method import BatchSource, Scene


class TokenSource:
    """Examples whose tokens are at hand."""

    def __init__(
        self, tokens: Sequence[Tokens], *, pad_id: int, device: torch.device | str = "cpu"
    ) -> None:
        """Keep the examples.

        Args:
            tokens: with at least one target token each.
            pad_id: token id at padding.
            device: of the model.
        """
        self._tokens, self._pad_id, self._device = tokens, pad_id, device

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self._tokens)

    def draw(self, indices: Sequence[int]) -> Batch:
        """Return these examples as one batch."""
        items = [self._tokens[k] for k in indices]
        return collate(items, pad_id=self._pad_id, device=self._device)


class CollatedSource:
    """The data set of a trainer, put together by the trainer's own collator."""

    def __init__(
        self,
        dataset: Sequence[Any],
        collate_fn: Callable[[list[Any]], Mapping[str, Any]],
        *,
        device: torch.device | str,
    ) -> None:
        """Keep the data set.

        Args:
            dataset: with a length and rows by index.
            collate_fn: rows -> input_ids, attention_mask and labels.
            device: of the model.
        """
        self._dataset, self._collate, self._device = dataset, collate_fn, device

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self._dataset)

    def draw(self, indices: Sequence[int]) -> Batch:
        """Return these examples as one batch.

        Raises:
            DataError: the collator gives no padded batch with one row per example.
        """
        batch = self._collate([self._dataset[k] for k in indices])
        parts = [batch.get(key) for key in ("input_ids", "attention_mask", "labels")]
        found = [x for x in parts if isinstance(x, Tensor) and x.shape[:1] == (len(indices),)]
        if len(found) != len(parts):
            raise DataError(
                "the collator gives no padded batch of examples",
                where=", ".join(sorted(batch)),
                why="input_ids, attention_mask and labels are needed, one row per example",
                do="turn off packing and padding-free batches",
            )
        ids = tuple(str(k) for k in indices)
        return Batch(ids, *found).to(self._device)


def as_source(data: Any, scene: Scene) -> BatchSource:  # noqa: ANN401
    """Return target examples that a user gave, in any form, as a source.

    Args:
        data: a source, tokens, tokenised rows, or anything that `selectune.score` takes for a pool.
        scene: has the tokenizer and the collator.

    Raises:
        DataError: no example has a target token.
        ConfigError: text needs a tokenizer, rows of tokens a collator.
    """
    if isinstance(data, BatchSource):
        return data
    device = next(scene.model.parameters()).device
    rows = cast("Sequence[Any]", data)
    first: Any = rows[0] if not isinstance(data, str | Path | dict) and len(rows) else None
    if isinstance(first, Mapping) and "input_ids" in first and scene.collate_fn is not None:
        return CollatedSource(rows, scene.collate_fn, device=device)
    if not isinstance(first, Tokens):
        if scene.tokenizer is None:
            raise ConfigError(
                "target examples given as text need a tokenizer",
                where="target",
                do="give attach(..., tokenizer=), or the trainer a processing_class",
            )
        found = tokenize(
            read_examples(data, what="target"), scene.tokenizer, max_length=scene.max_length
        )
        rows = list(found)
    tokens = [t for t in cast("Sequence[Tokens]", rows) if t.is_target[1:].any()]
    if not tokens:
        raise DataError(
            "no target example has an answer",
            where="target",
            why="the target gradient is that of the answers' loss",
            do="give rows with prompt and completion, or raise max_length",
        )
    pad_id = 0 if scene.tokenizer is None else cast("int | None", scene.tokenizer.pad_token_id)
    return TokenSource(tokens, pad_id=pad_id or 0, device=device)
