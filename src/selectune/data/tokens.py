"""From text to tokens, and which of them count in the loss."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, overload

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selectune.data.examples import Example
from selectune.errors import DataError

LossOn = Literal["completion", "all"]
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
    prefix = _opening_ids(tokenizer)
    eos = _eos_id(tokenizer) if append_eos else None
    items: list[Tokens] = []
    empty: list[Example] = []
    n_truncated = 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for example, (ids, mask) in zip(
            chunk, _encode(chunk, tokenizer, prefix, eos, loss_on), strict=True
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
    prefix = _opening_ids(tokenizer)
    prompts = [example.content["prompt"]] * len(example.options)
    result: list[Tokens] = []
    pairs = _encode_pairs(prompts, example.options, tokenizer)
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


def _call(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, offsets: bool = False
) -> dict[str, list[Any]]:
    texts = list(texts)
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,  # silences "longer than the maximum length": we truncate and count ourselves
    )
    return cast(dict[str, list[Any]], encoding)


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text, such as [BOS].

    It is put there by us, and nothing is left at the end: a tokenizer that closes every text by
    itself would otherwise close the prompt too.
    """
    plain = _call(["a"], tokenizer)["input_ids"][0]
    full = cast(list[int], tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain and plain:
            return full[:start]
    return full[:1] if full[:1] == [cast(int | None, tokenizer.bos_token_id)] else []


def _encode_pairs(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int]]:
    """Tokenise prompt + completion together; return ids and where the completion begins.

    Where a token would span the boundary, the parts are tokenised apart: a generating model is
    given the prompt's own tokens, and these must be what it was trained on.
    """
    unique = list(dict.fromkeys(prompts))
    prompt_ids = dict(zip(unique, _call(unique, tokenizer)["input_ids"], strict=True))
    whole = (p + c for p, c in zip(prompts, completions, strict=True))
    joint = _call(whole, tokenizer)["input_ids"]
    result: list[tuple[list[int], int]] = []
    apart: list[int] = []
    for k, (prompt, ids) in enumerate(zip(prompts, joint, strict=True)):
        head: list[int] = prompt_ids[prompt]
        if ids[: len(head)] != head:
            apart.append(k)
        result.append((ids, len(head)))
    tails = _call([completions[k] for k in apart], tokenizer)["input_ids"]
    for k, tail in zip(apart, tails, strict=True):
        head = prompt_ids[prompts[k]]
        result[k] = [*head, *tail], len(head)
    return result


def _encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    eos: int | None,
    loss_on: LossOn,
) -> list[tuple[list[int], list[bool]]]:
    """Return ids and targets of each example, untruncated."""
    done: dict[int, tuple[list[int], list[bool]]] = {}

    def close(ids: list[int]) -> list[int]:
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    texts = [k for k, example in enumerate(examples) if "text" in example.content]
    all_ids = _call([examples[k].content["text"] for k in texts], tokenizer)["input_ids"]
    for k, ids in zip(texts, all_ids, strict=True):
        whole = [*prefix, *close(ids)]
        done[k] = whole, [False] * len(prefix) + [True] * (len(whole) - len(prefix))

    pairs = [k for k, example in enumerate(examples) if "prompt" in example.content]
    encoded = _encode_pairs(
        [examples[k].content["prompt"] for k in pairs],
        [examples[k].content["completion"] for k in pairs],
        tokenizer,
    )
    for k, (ids, boundary) in zip(pairs, encoded, strict=True):
        whole = [*prefix, *close(ids)]
        n_before = len(prefix) + boundary
        done[k] = whole, [False] * n_before + [True] * (len(whole) - n_before)

    chats = [k for k, example in enumerate(examples) if "messages" in example.content]
    find_turns = loss_on == "completion"
    encoded_chats = _encode_chats([examples[k] for k in chats], tokenizer, find_turns=find_turns)
    done.update(zip(chats, encoded_chats, strict=True))
    in_order = [done[k] for k in range(len(examples))]
    return in_order if find_turns else [(ids, [True] * len(ids)) for ids, _ in in_order]


def _encode_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, find_turns: bool
) -> list[tuple[list[int], list[bool]]]:
    if not examples:
        return []
    if not tokenizer.chat_template:  # pyright: ignore[reportUnknownMemberType]
        raise DataError(
            "messages need a chat template, and this tokenizer has none",
            where=examples[0].origin,
            do="take an instruction-tuned base model, or rewrite the data as prompt and completion",
        )
    if not tokenizer.is_fast:
        raise DataError(
            "messages need a tokenizer that tells where each token stands in the text",
            where=examples[0].origin,
            why=f"{type(tokenizer).__name__} is a slow tokenizer without offsets",
            do="convert it to a fast one, or rewrite the data as prompt and completion",
        )
    rendered = [_render(example, tokenizer, find_turns=find_turns) for example in examples]
    encoding = _call([text for text, _ in rendered], tokenizer, offsets=True)
    result: list[tuple[list[int], list[bool]]] = []
    for (_, spans), ids, offsets in zip(
        rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True
    ):
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            # A token counts as soon as one of its characters is the assistant's.
            mask |= (starts < end) & (ends > begin)
        result.append((ids, mask.tolist()))
    return result


def _render(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, find_turns: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation as the model reads it, and the assistant's spans of characters.

    A span runs from where a generating model would be set off to the end of the turn. White space
    that the template puts after the end-of-sequence token is never generated, so it is left out.
    """
    messages: list[dict[str, str]] = example.content["messages"]

    def render(n: int, *, to_go_on: bool = False) -> str:
        text = tokenizer.apply_chat_template(  # pyright: ignore[reportUnknownMemberType]
            messages[:n], tokenize=False, add_generation_prompt=to_go_on
        )
        return cast(str, text)

    spans: list[tuple[int, int]] = []
    eos = cast(str | None, tokenizer.eos_token)
    try:
        full = render(len(messages))
        for k, turn in enumerate(messages):
            if turn["role"] != "assistant" or not find_turns:
                continue
            opening, upto = render(k, to_go_on=True), render(k + 1)
            if not (upto.startswith(opening) and full.startswith(upto)):
                raise DataError(
                    f"the assistant's words cannot be found in {example.id} once it is rendered",
                    where=f"{example.origin}, message {k}",
                    why="the chat template renders a turn otherwise once it is asked to go on or "
                    "more turns follow",
                    do="split the conversation so that each row ends with its only assistant turn, "
                    "set data.loss_on=all, or take a template that renders turn by turn",
                )
            if eos and upto.rstrip().endswith(eos):
                upto = upto.rstrip()
            spans.append((len(opening), len(upto)))
    except TemplateError as error:
        raise DataError(
            f"the chat template fails on {example.id}: {error}",
            where=example.origin,
            why="templates may refuse roles, their order, or an empty conversation",
            do="check the roles: most templates want user and assistant in turn, the user first",
        ) from error
    return full, spans


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
