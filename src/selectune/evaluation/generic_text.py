"""Loss on text that has nothing to do with any task: the plainest measure of what was forgotten."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data.collate import collate, length_sorted_batches
from selectune.data.examples import Row, number_rows
from selectune.data.tokens import Tokenized, Tokens, tokenize
from selectune.errors import ConfigError, DataError, TrainingError
from selectune.evaluation.estimate import LEVELS, Estimate
from selectune.gradients.loss import target_nll

_DRAWS_AT_ONCE = 1 << 22  # numbers of one bootstrap that are held together: 32 MB


@dataclass(frozen=True, slots=True)
class GenericLoss:
    """What a model expects of plain text.

    Args:
        ids: of the texts, made from their content; texts without a token to predict are absent.
        nats: summed over each text's predicted tokens.
        n_tokens: predicted tokens of each text.
    """

    ids: tuple[str, ...]
    nats: tuple[float, ...]
    n_tokens: tuple[int, ...]

    @property
    def nats_per_token(self) -> float:
        """Mean over all tokens of all texts: a long text weighs more."""
        return math.fsum(self.nats) / sum(self.n_tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of that mean."""
        return math.exp(self.nats_per_token)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {
            "n_texts": len(self.ids),
            "n_tokens": sum(self.n_tokens),
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
        }


def generic_loss(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pad_id: int,
    window: int = 512,
    context: int = 1,
    device: str = "cpu",
    precision: str = "float32",
    token_budget: int = 4096,
    advance: Callable[[int], None] | None = None,
) -> GenericLoss:
    """Return a model's loss on texts that have nothing to do with any task.

    Texts are read in windows. Every token is predicted exactly once, but for the first of a text
    whose tokenizer puts nothing before it; the size of the batches changes nothing beyond rounding.

    Args:
        model: a causal LM on `device`; dropout is off meanwhile, and then as it was.
        texts: plain text, such as held-out paragraphs of the web.
        tokenizer: the model's.
        pad_id: id of the padding token.
        window: tokens that the model reads at once.
        context: tokens at the start of a later window that the one before predicted already. 1 is
            cheapest; more give the first tokens of a window a past, at the price of more windows.
        device: where the batches go.
        precision: bfloat16 runs the model under autocast; losses are summed in fp32 either way.
        token_budget: padded tokens in one batch.
        advance: called with the number of windows just read.

    Raises:
        ConfigError: `context` leaves a window nothing to predict.
        DataError: no text has a token to predict.
        TrainingError: the model gives a loss that is not a number.
    """
    if not 1 <= context < window:
        raise ConfigError(
            f"windows of {window} tokens with {context} of context predict nothing",
            why="the context must be at least 1 and shorter than the window",
        )
    rows = [Row({"text": text}, "", "", (), -1, f"texts[{k}]", {}) for k, text in enumerate(texts)]
    read = tokenize(
        number_rows(rows), tokenizer, max_length=sys.maxsize, max_empty_share=1.0, append_eos=False
    )
    if not len(read):
        raise DataError(
            "there is no generic text to read",
            why=f"none of {len(texts)} texts has a token that another stands before",
            do="give some paragraphs of plain text",
        )
    windows = [
        (k, piece) for k, text in enumerate(read) for piece in _windows(text, window, context)
    ]
    nats, n_tokens = np.zeros(len(windows)), np.zeros(len(windows), dtype=np.int64)
    noisy = [module for module in model.modules() if module.training]
    model.eval()
    try:
        lengths = [len(piece.input_ids) for _, piece in windows]
        for members in length_sorted_batches(lengths, token_budget=token_budget):
            pieces = [windows[member][1] for member in members]
            batch = collate(pieces, pad_id=pad_id, device=device)
            autocast = torch.autocast(
                torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"
            )
            with torch.inference_mode(), autocast:
                sums, counts = target_nll(model, batch)
            nats[members], n_tokens[members] = sums.double().cpu().numpy(), counts.cpu().numpy()
            if advance is not None:
                advance(len(members))
    finally:
        for module in noisy:
            module.training = True
    return _joined(read, [k for k, _ in windows], nats, n_tokens)


def mean_loss(losses: Sequence[GenericLoss]) -> GenericLoss:
    """Return what several models that read the same texts expect of them on average.

    Raises:
        DataError: they did not read the same tokens.
    """
    first = losses[0]
    if any((x.ids, x.n_tokens) != (first.ids, first.n_tokens) for x in losses):
        raise _other_texts()
    by_text = zip(*(x.nats for x in losses), strict=True)
    return GenericLoss(
        first.ids, tuple(math.fsum(t) / len(losses) for t in by_text), first.n_tokens
    )


def compare_generic(
    a: GenericLoss, b: GenericLoss, *, n_boot: int = 10_000, seed: int = 0
) -> Estimate:
    """Return a - b in nats per token, with its interval over texts.

    Raises:
        DataError: the two did not read the same tokens.
    """
    mine, other = (
        dict(zip(x.ids, zip(x.nats, x.n_tokens, strict=True), strict=True)) for x in (a, b)
    )
    ids = sorted(mine)
    if ids != sorted(other) or any(mine[id][1] != other[id][1] for id in ids):
        raise _other_texts()
    nats = np.array([mine[id][0] - other[id][0] for id in ids])
    n_tokens = np.array([mine[id][1] for id in ids])
    generator, n = np.random.default_rng(seed), len(ids)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    means: list[np.ndarray] = []
    for start in range(0, n_boot, at_once):
        picks = generator.integers(n, size=(min(at_once, n_boot - start), n))
        means.append(nats[picks].sum(1) / n_tokens[picks].sum(1))
    low, high = np.percentile(np.concatenate(means), LEVELS)
    return Estimate(float(nats.sum() / n_tokens.sum()), float(low), float(high))


def _other_texts() -> DataError:
    return DataError(
        "losses on generic text cannot be compared",
        why="the models did not read the same texts in the same tokens",
        do="give all the same texts, tokenizer, window and context",
    )


def _windows(text: Tokens, window: int, context: int) -> list[Tokens]:
    pieces: list[Tokens] = []
    for start in range(0, max(1, len(text.input_ids) - context), window - context):
        is_target = text.is_target[start : start + window].copy()
        if start:
            is_target[:context] = False
        pieces.append(Tokens(text.id, text.input_ids[start : start + window], is_target))
    return pieces


def _joined(
    read: Tokenized, owners: Sequence[int], nats: np.ndarray, n_tokens: np.ndarray
) -> GenericLoss:
    bad = sorted(
        {read[k].id for k, value in zip(owners, nats, strict=True) if not np.isfinite(value)}
    )
    if bad:
        raise TrainingError(
            f"the loss of {len(bad)} generic texts is not a number",
            where="text " + ", ".join(bad[:5]),
            why="the model's weights overflowed, or were not a number to begin with",
            do="lower `tune.learning_rate`, or set `model.dtype=float32`",
        )
    owner = np.array(owners)
    return GenericLoss(
        tuple(text.id for text in read),
        tuple(math.fsum(nats[owner == k]) for k in range(len(read))),
        tuple(int(n_tokens[owner == k].sum()) for k in range(len(read))),
    )
