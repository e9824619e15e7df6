"""Where a training method draws examples from, for passes of its own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from selectune.data import Batch, Tokens, collate, read_examples, tokenize
from selectune.data.collate import NO_LOSS
from selectune.errors import ConfigError, DataError
from selectune.training.method import BatchSource, Scene


@runtime_checkable
class Indexed(Protocol):
    """Rows by index: a list, a data set of torch or of datasets, which are no `Sequence`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401


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
    """Tokenised rows, put together by the collator of a trainer."""

    def __init__(
        self,
        dataset: Indexed,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]],
        *,
        device: torch.device | str,
    ) -> None:
        """Keep the data set.

        Args:
            dataset: the trainer's own, or another that its collator takes.
            collate_fn: rows -> input_ids, attention_mask and labels.
            device: of the model.
        """
        self._dataset, self._collate, self._device = dataset, collate_fn, device

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self._dataset)

    def draw(self, indices: Sequence[int]) -> Batch:
        """Return those of these examples that have a target token, as one batch.

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
        answered = [k for k, row in enumerate(found[2][:, 1:] != NO_LOSS) if row.any()]
        ids = tuple(str(indices[k]) for k in answered)
        return Batch(ids, *(x[answered] for x in found)).to(self._device)


def as_source(data: Any, scene: Scene) -> BatchSource:  # noqa: ANN401
    """Return target examples that a user gave, in any form, as a source.

    Args:
        data: a source, tokens, tokenised rows, or anything that `selectune.score` takes for a pool.
        scene: has the tokenizer and the collator.

    Raises:
        DataError: no example has a target token.
        ConfigError: text needs a tokenizer, rows of tokens a collator, and all an index.
    """
    if isinstance(data, BatchSource):
        return data
    device = next(scene.model.parameters()).device
    first = None if isinstance(data, str | Path | Mapping) else _first(data)
    rows = cast("Sequence[Any]", data)
    if isinstance(first, Mapping) and "input_ids" in first:
        if scene.collate_fn is None:
            raise ConfigError(
                "target examples given as rows of tokens need a collator",
                where="target",
                do="use the method in a trainer, or give rows of text, or `selectune.data.Tokens`",
            )
        source = CollatedSource(rows, scene.collate_fn, device=device)
        # Stops at the first answer, which most often is the first row's.
        if not any(source.draw([k]).ids for k in range(source.n)):
            raise _no_answers("give rows whose labels are not all -100")
        return source
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
        raise _no_answers("give rows with prompt and completion, or raise max_length")
    pad_id = 0 if scene.tokenizer is None else cast("int | None", scene.tokenizer.pad_token_id)
    return TokenSource(tokens, pad_id=pad_id or 0, device=device)


def _first(data: object) -> Any:  # noqa: ANN401
    if not isinstance(data, Indexed):
        raise ConfigError(
            f"target examples cannot be of type {type(data).__name__}",
            where="target",
            why="they are drawn at random, by index",
            do="give a list of rows, a Dataset, or the path of a file",
        )
    return data[0] if len(data) else None


def _no_answers(do: str) -> DataError:
    return DataError(
        "no target example has an answer",
        where="target",
        why="the target gradient is that of the answers' loss",
        do=do,
    )
