from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from selectune.data import Tokens, option_tokens, preview, read_examples, tokenize
from selectune.errors import DataError

from .conftest import make_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = st.text("ab xyé😀\n", min_size=1, max_size=8).filter(lambda text: bool(text.strip()))


def one(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: object) -> Tokens:
    [tokens] = tokenize(read_examples([row]), tokenizer, **{"max_length": 200, **options})
    return tokens


def targets(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(tokens.input_ids[tokens.is_target])


def with_bos_and_eos() -> PreTrainedTokenizerFast:
    """A tokenizer that opens and closes every text by itself."""
    tokenizer = make_tokenizer()
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|bos|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|end|>", pair="<|bos|> $A $B <|end|>", special_tokens=ids
    )
    return tokenizer


@given(TEXTS, TEXTS)
def test_the_completion_and_its_end_are_the_targets(prompt: str, completion: str) -> None:
    tokens = one({"prompt": prompt, "completion": completion}, TOKENIZER)
    assert TOKENIZER.decode(tokens.input_ids) == prompt + completion + "<|end|>"
    assert targets(tokens, TOKENIZER) == completion + "<|end|>"
    prompt_ids = TOKENIZER(prompt)["input_ids"]  # what a generating model is given
    assert tokens.input_ids[: len(prompt_ids)].tolist() == prompt_ids


def test_a_token_that_would_span_the_boundary_is_split(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("xy")["input_ids"]) == 1
    tokens = one({"prompt": "ax", "completion": "yb"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["a", "x", "y", "b", "<|end|>"]


def test_an_end_token_that_is_there_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in ({"prompt": "a", "completion": "b<|end|>"}, {"text": "ab<|end|>"}):
        assert tokenizer.decode(one(row, tokenizer).input_ids) == "ab<|end|>"


def test_evaluation_leaves_out_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = one({"prompt": "a", "completion": "bc"}, tokenizer, append_eos=False)
    assert targets(tokens, tokenizer) == "bc"


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt() -> None:
    tokenizer = with_bos_and_eos()
    tokens = one({"prompt": "a", "completion": "b"}, tokenizer)
    assert tokenizer.decode(tokens.input_ids) == "<|bos|>ab<|end|>"
    assert targets(tokens, tokenizer) == "b<|end|>"
    assert tokenizer.decode(one({"text": "ab"}, tokenizer).input_ids) == "<|bos|>ab<|end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "abc"},
        {"prompt": "a", "completion": "bc"},
        {"prompt": "", "completion": "abc"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_loss_on_all_marks_every_token_but_the_first(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = one(row, tokenizer, loss_on="all")
    assert tokens.is_target.tolist() == [False] + [True] * (len(tokens.input_ids) - 1)


def test_a_text_counts_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = one({"text": "abc"}, tokenizer)
    assert tokens.is_target.tolist() == [False, True, True, True]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_of_messages_the_assistants_turns_and_their_ends_are_the_targets(
    turns: list[tuple[str, str]],
) -> None:
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    tokens = one({"messages": messages}, TOKENIZER, max_length=10_000)
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(tokens.input_ids) == rendered
    assert targets(tokens, TOKENIZER) == "".join(f"{reply}<|end|>" for _, reply in turns)


@pytest.mark.parametrize("first", ["a", "assistant", "end", " s"])
def test_a_conversation_may_begin_with_the_assistant(
    first: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [("assistant", first), ("user", "u"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert targets(one({"messages": messages}, tokenizer), tokenizer) == f"{first}<|end|>b<|end|>"


def test_messages_need_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="this tokenizer has none"):
        one({"messages": [{"role": "assistant", "content": "a"}]}, tokenizer)


UNSTABLE = (
    "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_renders_turns_anew_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tokenizer.chat_template = UNSTABLE
    with pytest.raises(DataError, match="cannot be found") as caught:
        one(row, tokenizer)
    assert caught.value.where == "pool[0], message 1"
    assert one(row, tokenizer, loss_on="all").is_target.sum() > 0


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for %}"],
)
def test_a_template_that_fails_or_reaches_for_python_is_refused(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="the chat template fails"):
        one({"messages": [{"role": "assistant", "content": "a"}]}, tokenizer)


def test_what_loses_all_targets_is_left_out_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a" * n, "completion": "bb"} for n in (1, 3, 4, 9)]
    examples = read_examples(rows)
    found = tokenize(examples, tokenizer, max_length=4, max_empty_share=0.5)
    assert [t.id for t in found] == [examples[0].id, examples[1].id]
    assert found.empty_ids == (examples[2].id, examples[3].id)
    assert found.n_truncated == 3  # 1 + 2 and the end token are 4 tokens: just fits
    assert found.lengths.tolist() == [4, 4]
    assert found.n_targets.tolist() == [3, 1]
    with pytest.raises(DataError, match="2 of 4 examples have no target token") as caught:
        tokenize(examples, tokenizer, max_length=4, max_empty_share=0.49)
    assert f"{examples[2].id} (pool[2])" in caught.value.where


def test_mixed_forms_keep_their_order_across_chunks(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = {"messages": [{"role": "assistant", "content": "a"}]}
    sets = [[{"text": f"t{k}"}, {"prompt": "p", "completion": f"c{k}"}, chat] for k in range(5)]
    examples = read_examples([[row] for rows in sets for row in rows])
    whole = tokenize(examples, tokenizer, max_length=50)
    assert [t.id for t in whole] == [e.id for e in examples]
    monkeypatch.setattr("selectune.data.tokens._CHUNK", 2)
    for a, b in zip(whole, tokenize(examples, tokenizer, max_length=50), strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.is_target, b.is_target)


def test_every_option_is_scored_after_the_same_prompt() -> None:
    tokenizer = with_bos_and_eos()
    row = {"prompt": "Qx", "completion": "y", "options": ["y", " long"]}
    [example] = read_examples([row])
    options = option_tokens(example, tokenizer, 50)
    assert [t.id for t in options] == [f"{example.id}#0", f"{example.id}#1"]
    assert [targets(t, tokenizer) for t in options] == ["y", " long"]
    assert [tokenizer.decode(t.input_ids) for t in options] == ["<|bos|>Qxy", "<|bos|>Qx long"]


def test_an_option_too_long_loses_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "abcdef", "completion": " gh", "options": [" gh", " i"]}
    first, second = option_tokens(read_examples([row])[0], tokenizer, 4)
    assert tokenizer.decode(first.input_ids) == "f gh"
    assert targets(first, tokenizer) == " gh"
    assert tokenizer.decode(second.input_ids) == "ef i"


def test_without_options_there_is_nothing_to_rank(tokenizer: PreTrainedTokenizerFast) -> None:
    assert option_tokens(read_examples([{"prompt": "a", "completion": "b"}])[0], tokenizer, 9) == []


def test_an_option_that_nothing_predicts_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "", "completion": "b", "options": ["a", "b"]}
    with pytest.raises(DataError, match="no token to judge it by"):
        option_tokens(read_examples([row])[0], tokenizer, 9)


@given(TEXTS, TEXTS)
def test_the_preview_shows_every_character_once(prompt: str, completion: str) -> None:
    tokens = one({"prompt": prompt, "completion": completion}, TOKENIZER)
    pieces = preview(tokens, TOKENIZER)
    assert len(pieces) == len(tokens.input_ids)
    assert "".join(text for text, _ in pieces) == prompt + completion + "<|end|>"
    assert "".join(text for text, counts in pieces if counts) == completion + "<|end|>"
