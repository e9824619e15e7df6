"""Vectorised transfer metrics, their intervals and generic loss against their slow twins."""

import numpy as np
import pytest
from evaluation_case import WORDS, tiny_lm, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_transfer import bootstrap, metrics, seed_metrics, text_nats

from selectune.evaluation.generic_text import generic_loss
from selectune.evaluation.transfer import (
    round_robin,
    transfer,
    transfer_metrics,
)

_TASKS = ("siqa", "piqa", "boolq")


def _answers(rng: np.random.Generator, task: str, rate: float, n: int) -> dict[str, bool]:
    return {f"{task}{k}": bool(rng.random() < rate) for k in range(n)}


def _case(seed: int, n_seeds: int = 3) -> tuple[dict, dict]:
    """Return answers of tuned models, better at home and worse abroad, and of the base."""
    rng = np.random.default_rng(seed)
    sizes = {task: 25 + 5 * k for k, task in enumerate(_TASKS)}
    base = {m: _answers(rng, m, 0.5, sizes[m]) for m in _TASKS}
    tuned = {
        (r, m): [
            # Seeds far apart, so that it shows how they are drawn.
            _answers(rng, m, 0.5 + 0.2 * s if r == m else 0.25 * s, sizes[m])
            for s in range(n_seeds)
        ]
        for r in _TASKS
        for m in _TASKS
    }
    return tuned, base


_SHARES = st.integers(0, 300).map(lambda k: k / 300)


@settings(max_examples=200)
@given(st.data(), st.integers(2, 4), st.integers(1, 3))
def test_metrics_of_a_table_equal_a_loop_over_it(data: st.DataObject, n: int, n_seeds: int) -> None:
    small = st.one_of(st.sampled_from([0.0, 1 / 300, 0.01, 4 / 300]), _SHARES)
    flat = data.draw(st.lists(small, min_size=n * n * n_seeds, max_size=n * n * n_seeds))
    accuracy = np.array(flat).reshape(n, n, n_seeds)
    base = np.array(data.draw(st.lists(small, min_size=n, max_size=n)))
    names = [f"t{k}" for k in range(n)]
    V = dict(zip(names, base.tolist(), strict=True))
    each = [
        metrics(
            {
                (r, m): float(accuracy[i, j, s])
                for i, r in enumerate(names)
                for j, m in enumerate(names)
            },
            V,
        )
        for s in range(n_seeds)
    ]
    found = transfer_metrics(accuracy, base, scoring="generated")
    for name in each[0]:
        if each[0][name] is None:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(np.mean([m[name] for m in each]), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_answers_equal_a_loop_over_questions(seed: int) -> None:
    tuned, base = _case(seed)
    found = transfer(round_robin(tuned, base, scoring="generated"), n_boot=20).estimates
    each = seed_metrics(tuned, base, {m: list(base[m]) for m in base})
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(np.mean([m[name] for m in each]), abs=1e-12)


def test_intervals_equal_one_draw_at_a_time() -> None:
    tuned, base = _case(1)
    found = transfer(round_robin(tuned, base, scoring="generated"), n_boot=3000, seed=1).estimates
    for name in ("id_accuracy", "ood_gain", "forget_ratio"):
        draws = bootstrap(tuned, base, name, 1500, seed=2)
        if name == "forget_ratio":
            # However far apart seeds are spread, no ratio is below 0 or above 1.
            draws = [min(1.0, max(0.0, draw)) for draw in draws]
        width = found[name].high - found[name].low
        assert width > 0.05
        # Two independent sets of draws: percentiles agree to a few per cent of the width.
        assert found[name].low == pytest.approx(np.percentile(draws, 2.5), abs=0.09 * width)
        assert found[name].high == pytest.approx(np.percentile(draws, 97.5), abs=0.09 * width)


@pytest.mark.parametrize("token_budget", [1, 50, 4096])
@pytest.mark.parametrize(("window", "context"), [(8, 1), (9, 4), (100, 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generic_loss_equals_one_token_at_a_time(
    family: str, window: int, context: int, token_budget: int
) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=n)) for n in (1, 2, 5, 8, 12)]
    tokenizer, model = tiny_tokenizer(), tiny_lm(family).eval()
    found = generic_loss(
        model,
        texts,
        tokenizer,
        pad_id=0,
        window=window,
        context=context,
        token_budget=token_budget,
    )
    for text, nats, n in zip(texts, found.nats, found.n_tokens, strict=True):
        expected, n_expected = text_nats(model, text, tokenizer, window=window, context=context)
        assert n == n_expected
        assert nats == pytest.approx(expected, rel=1e-5)
