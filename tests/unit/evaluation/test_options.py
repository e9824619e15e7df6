"""Answers depend on the model and the question, on nothing else."""

import math
import random
from dataclasses import replace

import pytest
import torch
from evaluation_case import question, statement, tiny_lm, tiny_tokenizer

from selectune.data.examples import Example
from selectune.errors import DataError, TrainingError
from selectune.evaluation import Evaluation, evaluate


def _ask(examples: list[Example], *, token_budget: int = 4096) -> Evaluation:
    model = tiny_lm("llama")
    return evaluate(
        model, examples, tiny_tokenizer(), max_length=128, pad_id=0, token_budget=token_budget
    )


def _mixed() -> list[Example]:
    rng = random.Random(2)
    return [question(k, rng) if k % 3 else statement(k, rng) for k in range(12)]


def test_batch_size_and_order_change_nothing() -> None:
    examples = _mixed()
    expected = {row["id"]: row for row in _ask(examples).table.to_pylist()}
    for budget, order in ((1, examples), (100, examples[::-1])):
        found = _ask(order, token_budget=budget)
        assert found.column("id") == [example.id for example in order]
        for row in found.table.to_pylist():
            loss = expected[row["id"]]["answer_loss"]
            assert row == expected[row["id"]] | {"answer_loss": pytest.approx(loss, rel=1e-5)}


@pytest.mark.parametrize("token_budget", [1, 30, 4096])
def test_ties_go_to_the_lowest_index(token_budget: int) -> None:
    rng = random.Random(0)
    asked = [
        replace(question(k, rng), options=(" go", " go", " go"), answer=k % 3) for k in range(6)
    ]
    found = _ask(asked, token_budget=token_budget)
    assert found.column("chosen") == [0] * 6
    assert found.column("correct_raw") == [k % 3 == 0 for k in range(6)]


def test_summary_means_are_those_of_the_rows() -> None:
    found = _ask(_mixed())
    right = [value for value in found.column("correct_norm") if value is not None]
    assert 0 < len(right) < found.n
    assert found.accuracy == sum(right) / len(right)
    assert found.answer_loss == pytest.approx(math.fsum(found.column("answer_loss")) / found.n)
    assert found.to_json()["n"] == 12


def test_without_options_there_is_no_accuracy() -> None:
    rng = random.Random(0)
    found = _ask([statement(k, rng) for k in range(3)])
    assert (found.accuracy, found.accuracy_raw) == (None, None)
    assert found.column("chosen") == [None] * 3


def test_the_model_is_left_as_it_was_and_dropout_is_off_meanwhile() -> None:
    model = tiny_lm("gpt2").train()  # GPT-2 drops 10 %
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    asked = _mixed()
    options = {"max_length": 128, "pad_id": 0}
    once = evaluate(model, asked, tiny_tokenizer(), **options)
    assert evaluate(model, asked, tiny_tokenizer(), **options).table.equals(once.table)
    assert [module.training for module in model.modules()] == before


def test_bfloat16_runs_under_autocast_and_stays_close() -> None:
    model, tokenizer, asked = tiny_lm("llama"), tiny_tokenizer(), _mixed()
    exact = evaluate(model, asked, tokenizer, max_length=128, pad_id=0)
    rough = evaluate(model, asked, tokenizer, max_length=128, pad_id=0, precision="bfloat16")
    assert rough.answer_loss != exact.answer_loss
    assert rough.answer_loss == pytest.approx(exact.answer_loss, rel=0.05)


def test_progress_counts_each_distinct_sequence_once() -> None:
    asked, done = _mixed(), []
    evaluate(
        tiny_lm("llama"), asked, tiny_tokenizer(), max_length=128, pad_id=0, advance=done.append
    )
    distinct = {
        example.content["prompt"] + option
        for example in asked
        for option in example.options or (example.content["completion"],)
    }
    assert sum(done) == len(distinct)


def test_a_loss_that_is_no_number_names_the_example() -> None:
    model = tiny_lm("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(TrainingError, match=r"where: example q\d+-0#\d"):
        evaluate(model, _mixed(), tiny_tokenizer(), max_length=128, pad_id=0)


def test_no_examples_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        _ask([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": -1}, "which of its options is right"),
        ({"answer": 2, "options": (" a", " b")}, "which of its options is right"),
        ({"answer": 0, "options": (" a", " ")}, "empty option"),
    ],
)
def test_a_question_that_cannot_be_judged_is_named(change: dict[str, object], message: str) -> None:
    asked = replace(question(0, random.Random(0)), **change)
    with pytest.raises(DataError, match=message) as caught:
        _ask([asked])
    assert caught.value.where == asked.origin
