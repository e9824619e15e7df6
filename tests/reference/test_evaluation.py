"""Batched evaluation and vectorised intervals against their slow twins."""

import random

import numpy as np
import pyarrow as pa
import pytest
from evaluation_case import question, statement, tiny_lm, tiny_tokenizer
from slow_evaluation import answer, bootstrap_means, seed_bootstrap_means

from selectune.evaluation import Evaluation, compare_paired, compare_seeds, evaluate


def _answers(losses: list[float], prefix: str = "q") -> Evaluation:
    n = len(losses)
    table = pa.table({"id": [f"{prefix}{k}" for k in range(n)], "answer_loss": losses})
    return Evaluation(table.append_column("correct_norm", pa.nulls(n, pa.bool_())))


@pytest.mark.parametrize("token_budget", [1, 60, 4096])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_batched_answers_equal_one_option_at_a_time(family: str, token_budget: int) -> None:
    rng = random.Random(0)
    tokenizer, model = tiny_tokenizer(), tiny_lm(family).eval()
    questions = [question(k, rng) for k in range(20)]
    found = evaluate(
        model, questions, tokenizer, max_length=128, pad_id=0, token_budget=token_budget
    ).table.to_pylist()
    for row, asked in zip(found, questions, strict=True):
        expected = answer(model, asked, tokenizer, 128)
        assert row.pop("answer_loss") == pytest.approx(expected.pop("answer_loss"), rel=1e-5)
        assert row == expected


def test_the_two_rankings_disagree_somewhere_so_that_both_are_tested() -> None:
    rng = random.Random(0)
    found = evaluate(
        tiny_lm("llama"),
        [question(k, rng) for k in range(20)],
        tiny_tokenizer(),
        max_length=128,
        pad_id=0,
    )
    assert found.column("correct_raw") != found.column("correct_norm")


def test_an_example_without_options_has_the_loss_of_its_completion_asked_as_only_option() -> None:
    rng = random.Random(1)
    tokenizer, model = tiny_tokenizer(), tiny_lm("llama").eval()
    told = [statement(k, rng) for k in range(6)]
    found = evaluate(model, told, tokenizer, max_length=128, pad_id=0).table.to_pylist()
    for row, example in zip(found, told, strict=True):
        only = type(example)(
            example.id, example.content, "", "", (example.content["completion"],), 0, "", {}
        )
        expected = answer(model, only, tokenizer, 128)
        assert row["answer_loss"] == pytest.approx(expected["answer_loss"], rel=1e-5)
        assert row["n_target_tokens"] == expected["n_target_tokens"]
        assert row["chosen"] is None


def test_paired_bootstrap_equals_one_draw_at_a_time() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, 30), rng.normal(0.5, 1, 30)
    found = compare_paired(_answers(a.tolist()), _answers(b.tolist()), n_boot=4000, seed=1)
    means = bootstrap_means((a - b).tolist(), 4000, seed=2)
    assert found.mean_difference == pytest.approx(float(np.mean(a - b)))
    # Two independent sets of 4000 draws: percentiles agree to about 3 % of the interval's width.
    width = found.high - found.low
    assert found.low == pytest.approx(np.percentile(means, 2.5), abs=0.06 * width)
    assert found.high == pytest.approx(np.percentile(means, 97.5), abs=0.06 * width)


@pytest.mark.parametrize("crossed", [True, False])
def test_hierarchical_bootstrap_equals_one_draw_at_a_time(crossed: bool) -> None:
    rng = np.random.default_rng(4)
    shift, odd = rng.normal(0, 1, (3, 1)), rng.normal(0, 2, (1, 20))
    differences = 1 + shift + odd + rng.normal(0, 0.3, (3, 20))
    pairs = [
        (
            _answers(row.tolist(), "q" if crossed else f"s{k}-"),
            _answers([0.0] * 20, "q" if crossed else f"s{k}-"),
        )
        for k, row in enumerate(differences)
    ]
    found = compare_seeds(pairs, n_boot=4000, seed=1)
    means = seed_bootstrap_means(differences.tolist(), 4000, 2, crossed=crossed)
    assert found.mean_difference == pytest.approx(float(differences.mean()))
    assert (found.n, found.n_seeds) == (20 if crossed else 60, 3)
    width = found.high - found.low
    assert found.low == pytest.approx(np.percentile(means, 2.5), abs=0.06 * width)
    assert found.high == pytest.approx(np.percentile(means, 97.5), abs=0.06 * width)
