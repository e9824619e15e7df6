"""From text to tokens, and which of them count in the loss."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from selectune.data.encode import LossOn, encode, encode_pairs, opening_ids
from selectune.data.examples import Example
from selectune.errors import DataError

_CHUNK = 1000  # examples per tokenizer call: large enough to be fast, small enough for memory


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One tokenised example.

    Attributes:
        id: the example's id.
        input_ids: int64, one per token.
        is_target: True at tokens whose own prediction counts in the loss; never at position 0,
            which nothing predicts.
    """

    id: str
    input_ids: np.ndarray
    is_target: np.ndarray


@dataclass
class Tokenized(Sequence[Tokens]):
    """Tokenised examples, in order, without those that have nothing to learn from.

    Attributes:
        items: examples with at least one target token.
        n_truncated: how many examples were longer than the limit and lost their end.
        empty_ids: examples without a target token after truncation; they are not in `items`.
    """

    items: tuple[Tokens, ...]
    n_truncated: int
    empty_ids: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tokens, ...]: ...
    def __getitem__(self, index: int | slice) -> Tokens | tuple[Tokens, ...]:
        """Return one item or several."""
        return self.items[index]

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each item, int64."""
        return np.array([len(item.input_ids) for item in self.items], dtype=np.int64)

    @cached_property
    def n_targets(self) -> np.ndarray:
        """Target tokens of each item, int64."""
        return np.array([item.is_target.sum() for item in self.items], dtype=np.int64)


def fingerprint_of(items: Sequence[Tokens]) -> str:
    """Return a hash of ids, tokens and loss masks, in the order given."""
    digest = hashlib.sha256()
    for item in items:
        for part in (item.id.encode(), item.input_ids.tobytes(), item.is_target.tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = "completion",
    max_empty_share: float = 0.05,
    append_eos: bool = True,
) -> Tokenized:
    """Tokenise examples and mark the tokens whose prediction counts in the loss.

    A text counts as a whole. Of a prompt and its completion, the completion counts, with the
    end-of-sequence token that is appended as trl does, unless it stands there already. Of
    messages, rendered by the tokenizer's chat template, the assistant's turns count, each up to
    and with the token that ends it.

    Args:
        examples: in any mix of forms.
        tokenizer: of the model that will read the tokens.
        max_length: the most tokens of an example; what comes after them is cut off.
        loss_on: "all" counts every token, the prompt's too.
        max_empty_share: the largest tolerable share of examples without target tokens.
        append_eos: False leaves out the end-of-sequence token, which evaluation does not want.

    Raises:
        DataError: too many examples have no target token left, or the chat template is missing,
            fails, or renders a conversation otherwise once more turns follow.
    """
    prefix = opening_ids(tokenizer)
    eos = _eos_id(tokenizer) if append_eos else None
    items: list[Tokens] = []
    empty: list[Example] = []
    n_truncated = 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for example, (ids, mask) in zip(
            chunk, encode(chunk, tokenizer, prefix, eos, loss_on), strict=True
        ):
            n_truncated += len(ids) > max_length
            input_ids = np.array(ids[:max_length], dtype=np.int64)
            is_target = np.array(mask[:max_length], dtype=bool)
            is_target[:1] = False
            if is_target.any():
                items.append(Tokens(example.id, input_ids, is_target))
            else:
                empty.append(example)
    if len(empty) > max_empty_share * len(examples):
        raise _too_many_empty(empty, len(examples), max_length, max_empty_share)
    return Tokenized(tuple(items), n_truncated, tuple(example.id for example in empty))


def clipped(tokens: Tokens, max_length: int) -> Tokens:
    """Return a window of an example, with what counts in its loss and the text right before it.

    Up to half of the window stands before the first target token. Where the rest is enough for all
    that follows, the window ends with the example, and what is cut is the beginning of its prompt.

    Args:
        tokens: the example.
        max_length: tokens of the window, 2 or more.
    """
    n = len(tokens.input_ids)
    if n <= max_length:
        return tokens
    first = int(tokens.is_target.argmax())
    start = max(0, min(n - max_length, first - max_length // 2))
    is_target = tokens.is_target[start : start + max_length].copy()
    is_target[:1] = False
    return Tokens(tokens.id, tokens.input_ids[start : start + max_length], is_target)


def option_tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Tokens]:
    """Tokenise the prompt with each answer option, for ranking the options by likelihood.

    Nothing is appended, so that an option is judged by its own words only. What is too long loses
    its beginning, not its end, as in lm-eval: the option is what is asked about.

    Returns:
        One per option, ids "<id>#0", "<id>#1" and so on; the option's tokens are the targets.
        [] for an example without options.
    """
    if not example.options:
        return []
    prefix = opening_ids(tokenizer)
    prompts = [example.content["prompt"]] * len(example.options)
    result: list[Tokens] = []
    pairs = encode_pairs(prompts, example.options, tokenizer)
    for k, (ids, boundary) in enumerate(pairs):
        is_target = np.zeros(len(prefix) + len(ids), dtype=bool)
        is_target[len(prefix) + boundary :] = True
        is_target = is_target[-max_length:]
        is_target[:1] = False
        input_ids = np.array([*prefix, *ids][-max_length:], dtype=np.int64)
        if not is_target.any():
            raise DataError(
                f"option {k} of {example.id} has no token to judge it by",
                where=example.origin,
                why=f"the prompt is empty, or the tokenizer ignores {example.options[k]!r}",
            )
        result.append(Tokens(f"{example.id}#{k}", input_ids, is_target))
    return result


def preview(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return each token's text and whether it counts in the loss.

    The texts joined are the decoded example. A character that is spread over several tokens stands
    with the last of them; the others have "".
    """
    pieces: list[tuple[str, bool]] = []
    ids: list[int] = tokens.input_ids.tolist()
    shown = ""
    for end, is_target in enumerate(tokens.is_target.tolist(), start=1):
        text = _decode(ids[:end], tokenizer)
        # U+FFFD at the end: the bytes so far are only the beginning of a character.
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append(("", is_target))
            continue
        pieces.append((text[len(shown) :], is_target))
        shown = text
    return pieces


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # pyright: ignore[reportUnknownMemberType]
    return cast(str, text)


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    # transformers sets the special ids by __getattr__: their types are not declared.
    return cast(int | None, tokenizer.eos_token_id)


def _too_many_empty(
    empty: Sequence[Example], n: int, max_length: int, max_share: float
) -> DataError:
    first = ", ".join(f"{example.id} ({example.origin})" for example in empty[:3])
    return DataError(
        f"{len(empty)} of {n} examples have no target token within {max_length} tokens",
        where=first + (" and more" if len(empty) > 3 else ""),
        why=f"their prompts alone fill data.max_length, and only {max_share:.0%} of the examples "
        "may be left out for that",
        do="raise data.max_length, shorten the prompts, or raise data.max_empty to leave them out",
    )
