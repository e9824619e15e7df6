"""The readable twins of generated answers: one question, one token, one place at a time."""

import unicodedata
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data.encode import opening_ids
from selectune.data.examples import Example
from selectune.data.tokens import option_tokens


def write(
    model: nn.Module,
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stop: Sequence[str] = ("\n",),
    slack: int = 16,
) -> str:
    """Return what the model writes: the whole text read anew for each token, without a cache."""
    limit = slack + max(
        int(option.is_target.sum()) for option in option_tokens(example, tokenizer, max_length)
    )
    prompt = tokenizer(example.content["prompt"], add_special_tokens=False)["input_ids"]
    ids = [*opening_ids(tokenizer), *prompt][-(max_length - limit) :]
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    new: list[int] = []
    while len(new) < limit:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in ends:
            break
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for mark in stop:
            if mark in text and not any(mark in option.strip() for option in example.options):
                return text.split(mark)[0]
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def find(words: str, options: Sequence[str]) -> int | None:
    """Return the option that ends last in the words: every option held to every place.

    For scripts with spaces, and options that neither begin nor end with a digit.
    """
    text = _tidy(words)
    best: tuple[int, int] = 0, 0
    found = None
    for k, option in enumerate(options):
        bare = _tidy(option)
        if any(character not in ".,;:!? " for character in bare):
            while bare[-1] in ".,;:!? ":
                bare = bare[:-1]
        for start in range(len(text) - len(bare) + 1):
            stop = start + len(bare)
            here = text[start:stop]
            is_same = here.lower() == bare.lower() if len(bare) > 1 else here == bare
            if not is_same:
                continue
            if start > 0 and _in_word(text[start - 1]) and _in_word(bare[0]):
                continue
            if stop < len(text) and _in_word(text[stop]) and _in_word(bare[-1]):
                continue
            if (stop, len(bare)) > best:
                best, found = (stop, len(bare)), k
    return found


def _tidy(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
