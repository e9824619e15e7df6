"""Batched generation against one token at a time, and the search for answers against all places."""

import random
from dataclasses import replace

import pytest
from evaluation_case import question, tiny_lm, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_generation import find, write

from selectune.data.examples import Example
from selectune.evaluation.answers import find_answer
from selectune.evaluation.generation import generate_answers

# No option has a q, most have an e, and these models like to write both.
_STOPS = {"newline": ("\n",), "letters": ("q", "e"), "none": ()}


def _questions() -> list[Example]:
    rng = random.Random(0)
    asked = [question(k, rng) for k in range(14)]
    # Options that such a model does write now and then, so that some answers are found.
    return [
        replace(q, options=(" bank", *q.options[1:]), answer=0) if k % 2 else q
        for k, q in enumerate(asked)
    ]


@pytest.mark.parametrize("stop", _STOPS)
@pytest.mark.parametrize("token_budget", [1, 300, 4096])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_batches_write_what_one_token_at_a_time_writes(
    family: str, token_budget: int, stop: str
) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_lm(family).eval()
    found = generate_answers(
        model,
        _questions(),
        tokenizer,
        max_length=120,
        pad_id=0,
        token_budget=token_budget,
        stop=_STOPS[stop],
        slack=6,
    )
    for row, asked in zip(found.table.to_pylist(), _questions(), strict=True):
        words = write(model, asked, tokenizer, max_length=120, stop=_STOPS[stop], slack=6)
        assert row["generated"] == words
        assert row["given"] == find(words, asked.options)


def test_some_answers_are_found_and_some_are_not_so_that_both_are_tested() -> None:
    found = generate_answers(
        tiny_lm("llama"), _questions(), tiny_tokenizer(), max_length=120, pad_id=0
    )
    assert len(set(found.column("generated"))) > 5
    assert 0 < found.n_unparsed < found.n
    assert 0 < found.accuracy < 1


_PIECES = st.sampled_from(
    ["the", "bank", "river", "bankers", "A", "a", "B", "b", " ", "  ", ".", "\t"]
)
_OPTIONS = st.lists(st.lists(_PIECES, min_size=1, max_size=3).map("".join), min_size=1, max_size=4)


@settings(max_examples=400)
@given(st.lists(_PIECES, max_size=12).map("".join), _OPTIONS)
def test_the_answer_found_is_that_of_a_search_of_every_place(
    words: str, options: list[str]
) -> None:
    options = [option for option in options if option.strip()]
    assert find_answer(words, options) == find(words, options)
