"""Token ids of each form, and which of them are the words to learn."""

from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import Any, Literal, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selectune.data.examples import Example
from selectune.errors import DataError

LossOn = Literal["completion", "all"]


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
    return dict(encoding)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def encode_pairs(
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


def encode(
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
    encoded = encode_pairs(
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

    def render(turns: list[dict[str, str]], *, to_go_on: bool = False) -> str:
        text = tokenizer.apply_chat_template(  # pyright: ignore[reportUnknownMemberType]
            turns, tokenize=False, add_generation_prompt=to_go_on
        )
        return cast(str, text)

    spans: list[tuple[int, int]] = []
    eos = cast(str | None, tokenizer.eos_token)
    try:
        full = render(messages)
        for k, turn in enumerate(messages):
            if turn["role"] != "assistant" or not find_turns:
                continue
            upto = render(messages[: k + 1])
            if k:
                opening = render(messages[:k], to_go_on=True)
            else:
                # No template renders an empty conversation: see where other words would begin.
                other = "b" if turn["content"].lstrip().startswith("a") else "a"
                elsewhere = render([{"role": "assistant", "content": other}])
                opening = commonprefix([upto, elsewhere])  # noqa: RUF071 (words, not paths)
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
    except (TemplateError, ValueError) as error:
        raise DataError(
            f"the chat template fails on {example.id}: {error}",
            where=example.origin,
            why="templates may refuse roles, their order, or an empty conversation",
            do="check the roles: most templates want user and assistant in turn, the user first",
        ) from error
    return full, spans
