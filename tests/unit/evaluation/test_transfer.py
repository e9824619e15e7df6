"""Round-robin metrics by hand, their intervals, and loss on generic text."""

import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from evaluation_case import WORDS, question, tiny_lm, tiny_tokenizer

from selectune.data.examples import Row, number_rows
from selectune.errors import ConfigError, DataError, TrainingError
from selectune.evaluation import evaluate, generic_text
from selectune.evaluation.generation import generate_answers
from selectune.evaluation.generic_text import GenericLoss, compare_generic, generic_loss
from selectune.evaluation.transfer import (
    RoundRobin,
    compare_transfer,
    right_answers,
    round_robin,
    transfer,
    transfer_metrics,
)

_TASKS = ("siqa", "piqa", "boolq")
_TEXTS = [" ".join(random.Random(k).choices(WORDS, k=3 + 2 * k)) for k in range(6)]


def _marks(task: str, right: np.ndarray) -> dict[str, bool]:
    return {f"{task}{k:03}": bool(value) for k, value in enumerate(right)}


def _first(task: str, n_right: int, n: int = 200) -> dict[str, bool]:
    return _marks(task, np.arange(n) < n_right)


def _rounds(
    accuracy: Mapping[tuple[str, str], list[int]], base: Mapping[str, int], **options: str
) -> RoundRobin:
    tuned = {(r, m): [_first(m, n) for n in found] for (r, m), found in accuracy.items()}
    answers = {m: _first(m, n) for m, n in base.items()}
    return round_robin(tuned, answers, scoring=options.get("scoring", "generated"))


# Right of 200 questions, one seed: siqa's model forgets piqa and collapses on boolq.
_TABLE = {
    ("siqa", "siqa"): [160],
    ("siqa", "piqa"): [50],
    ("siqa", "boolq"): [1],
    ("piqa", "siqa"): [100],
    ("piqa", "piqa"): [180],
    ("piqa", "boolq"): [2],
    ("boolq", "siqa"): [80],
    ("boolq", "piqa"): [100],
    ("boolq", "boolq"): [140],
}
_BASE = {"siqa": 80, "piqa": 100, "boolq": 20}


def test_a_round_robin_by_hand() -> None:
    found = transfer(_rounds(_TABLE, _BASE), n_boot=200)
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert values == {
        "id_accuracy": pytest.approx((0.8 + 0.9 + 0.7) / 3),
        "ood_accuracy": pytest.approx((0.1275 + 0.255 + 0.45) / 3),
        "ood_gain": pytest.approx((0.1275 + 0.255 + 0.45) / 3 - (0.3 + 0.25 + 0.45) / 3),
        # (0.3 - 0.1275) / 0.3; better than the base counts as 0; no different.
        "forget_ratio": pytest.approx((0.575 + 0 + 0) / 3),
        # 1 of 200 is below 1 %, 2 of 200 are not.
        "collapse_percent": pytest.approx(100 / 6),
    }
    assert found.by_task["siqa"]["forget_ratio"] == pytest.approx(0.575)
    assert found.by_task["boolq"]["ood_gain"] == 0.0
    assert found.by_task["siqa"]["collapse_percent"] == 50
    assert found.base == {"siqa": 0.4, "piqa": 0.5, "boolq": 0.1}
    assert (found.n_seeds, found.n_undefined) == (1, 0)


def test_accuracy_by_likelihood_has_no_collapse() -> None:
    found = transfer(_rounds(_TABLE, _BASE, scoring="likelihood"), n_boot=50)
    assert "collapse_percent" not in found.estimates
    assert set(found.by_task["siqa"]) == set(found.estimates)


def test_each_seed_is_a_round_robin_of_its_own_and_they_are_averaged() -> None:
    # Over both seeds siqa's model is as good as the base; in one of them it forgot half.
    table = {pair: [_BASE[pair[1]]] * 2 for pair in _TABLE} | {("siqa", "piqa"): [40, 160]}
    found = transfer(_rounds(table, _BASE), n_boot=50)
    assert found.by_task["siqa"]["ood_gain"] == pytest.approx(0.0)
    assert found.by_task["siqa"]["forget_ratio"] == pytest.approx(0.5 * 0.15 / 0.3)


def test_a_forget_ratio_is_undefined_where_the_base_knows_nothing_and_counted() -> None:
    found = transfer(_rounds(_TABLE, {"siqa": 80, "piqa": 0, "boolq": 0}), n_boot=50)
    assert found.n_undefined == 1
    assert found.by_task["siqa"]["forget_ratio"] is None
    # piqa's model: from 0.2 to 0.255; boolq's: from 0.2 to 0.45.
    assert found.estimates["forget_ratio"].value == 0.0
    nothing = transfer(_rounds(_TABLE, dict.fromkeys(_BASE, 0)), n_boot=50)
    assert nothing.n_undefined == 3
    assert nothing.estimates["forget_ratio"] is None
    assert nothing.to_json()["estimates"]["forget_ratio"] is None


def test_an_interval_holds_its_estimate_and_stays_within_what_is_possible() -> None:
    rng = np.random.default_rng(0)
    base = {m: _marks(m, rng.random(40) < 0.5) for m in _TASKS}
    tuned = {(r, m): [_marks(m, rng.random(40) < 0.5) for _ in range(2)] for r, m in _TABLE}
    found = transfer(round_robin(tuned, base, scoring="generated"), n_boot=300)
    for name, estimate in found.estimates.items():
        assert estimate.low <= estimate.value <= estimate.high
        assert name == "ood_gain" or estimate.low >= 0
    assert found.estimates["id_accuracy"].high <= 1


def test_a_forget_ratio_of_noise_alone_does_not_exclude_zero() -> None:
    # As many right as the base, but each model three others: every draw finds some task forgotten.
    names, half = [f"t{k}" for k in range(8)], np.arange(60) < 30
    base = {m: _marks(m, half) for m in names}
    tuned = {}
    for k, r in enumerate(names):
        swapped = half.copy()
        swapped[3 * k : 3 * k + 3], swapped[30 + 3 * k : 33 + 3 * k] = False, True
        tuned |= {(r, m): [_marks(m, swapped)] for m in names}
    found = transfer(round_robin(tuned, base, scoring="generated"), n_boot=500)
    ratio = found.estimates["forget_ratio"]
    assert (ratio.value, ratio.low) == (0, 0)
    assert 0 < ratio.high < 0.1


def test_what_is_hard_for_model_and_base_alike_cancels_in_the_gain() -> None:
    rng = np.random.default_rng(1)
    hard = {m: rng.random(300) < 0.5 for m in _TASKS}
    base = {m: _marks(m, hard[m]) for m in _TASKS}
    tuned = {(r, m): [_marks(m, hard[m] | (np.arange(300) < 15))] for r, m in _TABLE}
    found = transfer(round_robin(tuned, base, scoring="likelihood"), n_boot=1000).estimates
    gain, level = found["ood_gain"], found["ood_accuracy"]
    assert gain.excludes_zero
    assert gain.high - gain.low < 0.5 * (level.high - level.low)


def test_intervals_of_a_gain_cover_the_truth() -> None:
    rng, n_covered = np.random.default_rng(0), 0
    for repeat in range(200):
        drawn = {(r, m): [_marks(m, rng.random(50) < 0.6)] for r, m in _TABLE}
        base = {m: _marks(m, rng.random(50) < 0.5) for m in _TASKS}
        rounds = round_robin(drawn, base, scoring="likelihood")
        gain = transfer(rounds, n_boot=300, seed=repeat).estimates["ood_gain"]
        n_covered += gain.low <= 0.1 <= gain.high
    assert 0.90 <= n_covered / 200 <= 0.985


def test_answers_are_joined_by_id() -> None:
    rng = np.random.default_rng(2)
    marks = {(r, m): _marks(m, rng.random(30) < 0.5) for r, m in _TABLE}
    base = {m: _marks(m, rng.random(30) < 0.5) for m in _TASKS}
    turned = {pair: dict(reversed(found.items())) for pair, found in marks.items()}
    one, other = (
        transfer(round_robin({p: [a] for p, a in x.items()}, base, scoring="generated"), n_boot=50)
        for x in (marks, turned)
    )
    assert one == other


def test_a_comparison_is_paired_and_mirrors() -> None:
    better = {pair: [min(200, n[0] + 20)] for pair, n in _TABLE.items()}
    a, b = _rounds(better, _BASE), _rounds(_TABLE, _BASE)
    there, back = compare_transfer(a, b, n_boot=500), compare_transfer(b, a, n_boot=500)
    assert there["ood_accuracy"].value == pytest.approx(0.1)
    assert there["ood_accuracy"].low > 0.05
    assert there["collapse_percent"].value == pytest.approx(-100 / 6)
    for name, estimate in there.items():
        assert estimate.low == pytest.approx(-back[name].high)
    same = compare_transfer(b, b, n_boot=100)
    assert all((e.value, e.low, e.high) == (0, 0, 0) for e in same.values())


def test_comparisons_of_what_differs_are_refused() -> None:
    a = _rounds(_TABLE, _BASE)
    with pytest.raises(DataError, match="different scorings"):
        compare_transfer(a, _rounds(_TABLE, _BASE, scoring="likelihood"))
    with pytest.raises(DataError, match="different numbers of seeds"):
        compare_transfer(a, _rounds({p: n * 2 for p, n in _TABLE.items()}, _BASE))
    turned = dict(reversed(_BASE.items()))
    with pytest.raises(DataError, match="order of tasks"):
        compare_transfer(a, _rounds(_TABLE, turned))


def test_right_answers_are_those_of_ranking_or_of_writing() -> None:
    rng = random.Random(0)
    asked = [question(k, rng) for k in range(6)]
    options = {"max_length": 120, "pad_id": 0}
    model = tiny_lm("llama")
    ranked = evaluate(model, asked, tiny_tokenizer(), **options)
    written = generate_answers(model, asked, tiny_tokenizer(), **options)
    assert list(right_answers(ranked).values()) == ranked.column("correct_norm")
    assert right_answers(written) == dict(
        zip([e.id for e in asked], written.column("is_right"), strict=True)
    )


def test_incomplete_round_robins_are_refused() -> None:
    base = {m: _first(m, 3, 5) for m in _TASKS}
    tuned = {pair: [_first(pair[1], 2, 5)] for pair in _TABLE}
    with pytest.raises(DataError, match="at least two tasks"):
        round_robin({("siqa", "siqa"): [base["siqa"]]}, {"siqa": base["siqa"]}, scoring="generated")
    with pytest.raises(DataError, match="piqa on boolq"):
        round_robin(
            {p: a for p, a in tuned.items() if p != ("piqa", "boolq")}, base, scoring="generated"
        )
    with pytest.raises(DataError, match="nq on siqa"):
        round_robin(tuned | {("nq", "siqa"): [base["siqa"]]}, base, scoring="generated")
    with pytest.raises(DataError, match="same seeds"):
        round_robin(tuned | {("siqa", "piqa"): [base["piqa"]] * 2}, base, scoring="generated")
    with pytest.raises(DataError, match="boolq004"):
        round_robin(tuned | {("siqa", "boolq"): [_first("boolq", 2, 4)]}, base, scoring="generated")
    with pytest.raises(DataError, match="no question of siqa"):
        round_robin(
            tuned | {(r, "siqa"): [{}] for r in _TASKS}, base | {"siqa": {}}, scoring="generated"
        )


def test_a_table_of_accuracies_is_checked() -> None:
    table = np.full((2, 2, 1), 0.5)
    assert transfer_metrics(table, np.array([0.5, 1.0]), scoring="likelihood") == {
        "id_accuracy": 0.5,
        "ood_accuracy": 0.5,
        "ood_gain": -0.25,
        "forget_ratio": 0.25,
    }
    with pytest.raises(DataError, match="no round-robin"):
        transfer_metrics(np.full((2, 3, 1), 0.5), np.full(3, 0.5), scoring="generated")
    with pytest.raises(DataError, match="no round-robin"):
        transfer_metrics(np.full((1, 1, 1), 0.5), np.full(1, 0.5), scoring="generated")
    with pytest.raises(DataError, match="between 0 and 1"):
        transfer_metrics(table * 100, np.full(2, 0.5), scoring="generated")
    with pytest.raises(DataError, match="between 0 and 1"):
        transfer_metrics(table * math.nan, np.full(2, 0.5), scoring="generated")


def _read(model: torch.nn.Module, texts: list[str] = _TEXTS, **options: object) -> GenericLoss:
    return generic_loss(model, texts, tiny_tokenizer(), pad_id=0, **({"window": 12} | options))


def test_generic_loss_of_texts_in_one_window_is_that_of_evaluate() -> None:
    model = tiny_lm("llama")
    examples = number_rows([Row({"text": text}, "", "", (), -1, "", {}) for text in _TEXTS])
    expected = evaluate(model, examples, tiny_tokenizer(), max_length=200, pad_id=0)
    found = _read(model, window=200)
    per_token = [nats / n for nats, n in zip(found.nats, found.n_tokens, strict=True)]
    assert per_token == pytest.approx(expected.column("answer_loss"), rel=1e-6)
    assert found.n_tokens == tuple(expected.column("n_target_tokens"))


def test_every_token_is_read_once_whatever_the_window_and_the_batches() -> None:
    model = tiny_lm("llama")
    whole = _read(model, window=200)
    for window, context in ((2, 1), (7, 1), (7, 6), (30, 15)):
        found = _read(model, window=window, context=context)
        assert found.n_tokens == whole.n_tokens
        again = _read(model, window=window, context=context, token_budget=1)
        assert again.nats == pytest.approx(found.nats, rel=1e-5)
    assert _read(model, window=8).nats != pytest.approx(whole.nats, rel=1e-3)


def test_means_weigh_tokens_and_perplexity_is_their_exponential() -> None:
    found = GenericLoss(("a", "b"), (2.0, 4.0), (1, 5))
    assert found.nats_per_token == 1.0
    assert found.perplexity == pytest.approx(math.e)
    assert found.to_json() == {
        "n_texts": 2,
        "n_tokens": 6,
        "nats_per_token": 1.0,
        "perplexity": pytest.approx(math.e),
    }


def test_losses_are_compared_text_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(5, 50, 40)
    hard = rng.normal(0, 50, 40)
    texts = tuple(map(str, range(40)))
    nats = tuple((hard + n_tokens * (0.2 + rng.normal(0, 0.01, 40))).tolist())
    a = GenericLoss(texts, nats, tuple(n_tokens.tolist()))
    b = GenericLoss(texts, tuple(hard.tolist()), a.n_tokens)
    found = compare_generic(a, b, n_boot=500)
    assert 0.19 < found.low < found.value < found.high < 0.21
    assert found.excludes_zero
    with monkeypatch.context() as patch:
        patch.setattr(generic_text, "_DRAWS_AT_ONCE", 130)  # three of 500 at once
        assert compare_generic(a, b, n_boot=500) == found
    turned = GenericLoss(b.ids[::-1], b.nats[::-1], b.n_tokens[::-1])
    assert compare_generic(a, turned, n_boot=500) == found
    with pytest.raises(DataError, match="cannot be compared"):
        compare_generic(a, GenericLoss(("0",), (1.0,), (1,)))
    with pytest.raises(DataError, match="cannot be compared"):
        compare_generic(a, GenericLoss(texts, b.nats, (1,) * 40))


def test_texts_without_a_token_to_predict_are_absent() -> None:
    found = _read(tiny_lm("llama"), ["", *_TEXTS, "a"])  # no token stands before the only "a"
    assert len(found.ids) == len(_TEXTS)
    with pytest.raises(DataError, match="no generic text"):
        _read(tiny_lm("llama"), ["", "a"])
    with pytest.raises(DataError, match="none of 0 texts"):
        _read(tiny_lm("llama"), [])


def test_the_model_that_reads_is_left_as_it_was() -> None:
    model = tiny_lm("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    done: list[int] = []
    assert _read(model, advance=done.append) == _read(model)
    assert [module.training for module in model.modules()] == before
    assert sum(done) > len(_TEXTS)


def test_bfloat16_stays_close() -> None:
    model = tiny_lm("llama")
    exact, rough = _read(model), _read(model, precision="bfloat16")
    assert rough.nats != exact.nats
    assert rough.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.05)


@pytest.mark.parametrize(("window", "context"), [(1, 1), (8, 8), (8, 0)])
def test_windows_that_predict_nothing_are_refused(window: int, context: int) -> None:
    with pytest.raises(ConfigError, match="predict nothing"):
        _read(tiny_lm("llama"), window=window, context=context)


def test_a_loss_that_is_no_number_names_the_text() -> None:
    model = tiny_lm("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(TrainingError, match=r"generic texts is not a number\n  where: text \w+-0"):
        _read(model)
