"""Row pickers by themselves: odds, counts, and what scores of any size and kind must not break."""

from dataclasses import replace

import pytest
import torch
from slow_gast import slow_greedy, slow_inclusion, slow_odds, slow_standardise, slow_topk
from torch import Tensor

from selectune.methods.data_layer.pickers import (
    all_examples,
    greedy,
    random,
    random_shared,
    softmax,
    topk,
)
from selectune.registry import get, methods
from selectune.training.picks import Alignments, Picker, factors

# Gaussian scores, 8 of 16 drawn: the odds by rank that the method's notes give, to two digits.
ODDS = [.96, .90, .83, .76, .69, .62, .56, .50, .45, .40, .35, .30, .24, .20, .15, .10]  # fmt: skip


def gumbel(*shape: int) -> Tensor:
    return -torch.empty(*shape).exponential_().log()


def alignments(score: Tensor, noise: Tensor | None = None, **changes: object) -> Alignments:
    n = len(score)
    noise = gumbel(n) if noise is None else noise
    usual = {"is_valid": torch.ones(n, dtype=torch.bool), "k": max(1, n // 2)}
    return Alignments(score, noise, **{**usual, **changes})


def drawn(picker: Picker, scores: Tensor, noise: Tensor, **changes: object) -> Tensor:
    """Return the picks of many batches at once, one per row."""
    return torch.vmap(lambda s, g: picker(alignments(s, g, **changes)))(scores, noise)


def standardised(scores: Tensor) -> Tensor:
    centred = scores - scores.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt()


def test_odds_by_rank_are_those_of_the_table() -> None:
    n_draws = 20_000
    scores = torch.randn(n_draws, 16)
    picks = drawn(softmax, scores, gumbel(n_draws, 16), k=8)
    by_rank = picks.gather(1, scores.argsort(1, descending=True)).mean(0)
    table = torch.tensor(ODDS)
    # Two digits, and four standard errors of a binomial.
    tolerance = 0.005 + 4 * (table * (1 - table) / n_draws).sqrt()
    assert ((by_rank - table).abs() < tolerance).all(), by_rank
    assert (picks.sum(1) == 8).all()


@pytest.mark.parametrize(
    ("picker", "temperature", "mean_z"),
    [(softmax, 0.5, 0.69), (softmax, 1.0, 0.53), (softmax, 2.0, 0.32), (topk, 1.0, 0.80),
     (random, 1.0, 0.0), (random_shared, 1.0, 0.0), (all_examples, 1.0, 0.0)],
)  # fmt: skip
def test_mean_alignment_of_the_picks(picker: Picker, temperature: float, mean_z: float) -> None:
    scores = torch.randn(8_000, 16)
    picks = drawn(picker, scores, gumbel(8_000, 16), k=8, temperature=temperature)
    found = (picks * standardised(scores)).sum(1) / picks.sum(1)
    assert float(found.mean()) == pytest.approx(mean_z, abs=0.006 + 4 * float(found.std()) / 90)


@pytest.mark.parametrize(("n", "mean_z"), [(16, 0.53), (8, 0.52), (4, 0.49), (2, 0.45)])
def test_small_micro_batches_tilt_less(n: int, mean_z: float) -> None:
    scores = torch.randn(8_000, 16)
    picks = drawn(softmax, scores.reshape(-1, n), gumbel(128_000 // n, n)).view(8_000, 16)
    found = (picks * standardised(scores)).sum(1) / 8  # measured within the whole batch
    assert float(found.mean()) == pytest.approx(mean_z, abs=0.006 + 4 * float(found.std()) / 89)


@pytest.mark.parametrize(("n", "k"), [(6, 3), (7, 2), (5, 5), (5, 1)])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_odds_are_those_of_drawing_one_after_another(n: int, k: int, temperature: float) -> None:
    score = torch.randn(n).exp()
    odds = torch.tensor(slow_inclusion(slow_odds(score.tolist(), temperature), k))
    picks = drawn(softmax, score.expand(20_000, n), gumbel(20_000, n), k=k, temperature=temperature)
    error = (odds * (1 - odds) / 20_000).clamp_min(0).sqrt()
    assert ((picks.mean(0) - odds).abs() <= 4 * error + 1e-6).all()


def test_scores_are_standardised_as_the_twin_does() -> None:
    for scale in (1.0, 1e-3, 1e4):
        score = scale * torch.randn(9)
        torch.testing.assert_close(
            alignments(score).standardised(),
            torch.tensor(slow_standardise(score.tolist())),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-40, 2.0**-20, 2.0**20, 2.0**60])
@pytest.mark.parametrize("picker", [softmax, topk, random])
def test_the_size_of_the_scores_changes_no_pick(picker: Picker, scale: float) -> None:
    for _ in range(20):
        case = alignments(torch.randn(12))
        other = replace(case, score=case.score * scale)
        assert torch.equal(picker(case), picker(other))
        assert torch.equal(case.standardised(), other.standardised())


ALIKE = {
    "zero": torch.zeros(8),
    "equal": torch.full((8,), 3.7),
    "rounding": 1e4 + torch.arange(8) * 1e-3,
    "tiny": torch.full((8,), 1e-42),
}


@pytest.mark.parametrize("name", sorted(ALIKE))
def test_scores_that_are_all_alike_draw_evenly(name: str) -> None:
    assert torch.equal(alignments(ALIKE[name]).standardised(), torch.zeros(8))
    noise = gumbel(5_000, 8)
    picks = drawn(softmax, ALIKE[name].expand(5_000, 8), noise)
    assert torch.equal(picks, drawn(random, ALIKE[name].expand(5_000, 8), noise))
    assert ((picks.mean(0) - 0.5).abs() < 4 * (0.25 / 5_000) ** 0.5).all()


def test_one_huge_score_leaves_the_others_nearly_even() -> None:
    score = torch.randn(16)
    score[3] = 1e6
    z = alignments(score).standardised()
    assert z.isfinite().all()
    assert float(z.abs().max()) == pytest.approx(15**0.5, rel=1e-4)


PICKERS = [entry.name for entry in methods("row_picker")]


def full(n: int, **changes: object) -> Alignments:
    """Return everything that any picker may ask for."""
    rows = torch.randn(n, 30)
    return alignments(
        rows @ torch.randn(30),
        **{"norm2": rows.square().sum(1), "gram": rows @ rows.T, "learning_rate": 0.1, **changes},
    )


@pytest.mark.parametrize("name", PICKERS)
def test_a_picker_takes_as_many_as_asked_and_only_valid_ones(name: str) -> None:
    picker = get("row_picker", name).function
    for k in (1, 3, 5):
        is_valid = torch.tensor([True, False, True, True, False, True, True])
        case = full(7, k=k, is_valid=is_valid)
        picked = picker(case)
        assert picked.dtype == case.score.dtype
        assert set(picked.tolist()) <= {0.0, 1.0}
        assert not picked[~is_valid].any()
        assert picked.sum() == (5 if name == "all" else k)


@pytest.mark.parametrize("name", PICKERS)
def test_invalid_examples_do_not_touch_the_picks_of_the_others(name: str) -> None:
    picker = get("row_picker", name).function
    case = full(6, k=3)
    wild = torch.tensor([1e9])
    wide = Alignments(
        torch.cat([case.score, wild]),
        torch.cat([case.noise, wild]),
        torch.tensor([True] * 6 + [False]),
        3,
        1.0,
        torch.cat([case.norm2, wild]),
        torch.nn.functional.pad(case.gram, (0, 1, 0, 1), value=1e9),
        0.1,
    )
    assert torch.equal(picker(wide)[:6], picker(case))
    torch.testing.assert_close(wide.standardised()[:6], case.standardised())
    torch.testing.assert_close(wide.moments(), case.moments())


@pytest.mark.parametrize("name", PICKERS)
def test_the_order_of_the_batch_changes_no_pick(name: str) -> None:
    picker = get("row_picker", name).function
    case, order = full(9, k=4), torch.randperm(9)
    other = replace(
        case,
        score=case.score[order],
        noise=case.noise[order],
        norm2=case.norm2[order],
        gram=case.gram[order][:, order],
    )
    assert torch.equal(picker(other), picker(case)[order])


def test_topk_takes_the_largest() -> None:
    score = torch.randn(10)
    assert topk(alignments(score)).nonzero().flatten().tolist() == slow_topk(score.tolist(), 5)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.3, 10.0])
def test_greedy_follows_the_twin(rate: float) -> None:
    for k in range(1, 7):
        case = full(8, k=k, learning_rate=rate)
        expected = slow_greedy(case.score.tolist(), case.gram.tolist(), rate, k)
        assert greedy(case).nonzero().flatten().tolist() == expected


def test_greedy_leaves_out_copies() -> None:
    # Two directions of use, three copies of the better one: the second pick is the other one.
    rows = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    case = alignments(
        rows @ torch.tensor([1.0, 0.9]), is_valid=torch.ones(4, dtype=torch.bool),
        k=2, gram=rows @ rows.T, learning_rate=0.5,
    )  # fmt: skip
    assert greedy(case).nonzero().flatten().tolist() == [0, 3]
    assert topk(case)[3] == 0


def test_mean_of_all_picks_is_exactly_the_plain_gradient() -> None:
    weight = torch.rand(7) * 1000
    case = alignments(torch.randn(7), k=7)
    assert torch.equal(factors(torch.ones(7), weight, "mean", case), torch.ones(7))
    assert torch.equal(factors(torch.ones(7), weight, "share", case), torch.ones(7))
    assert torch.equal(factors(torch.ones(7), weight, "unbiased", case), torch.ones(7))


def test_mean_keeps_the_sum_of_weights() -> None:
    weight = torch.rand(7)
    picked = torch.tensor([1.0, 0, 0, 1, 0, 1, 0])
    factor = factors(picked, weight, "mean", alignments(torch.randn(7)))
    assert float((factor * weight).sum()) == pytest.approx(float(weight.sum()))
    assert torch.equal(factor > 0, picked > 0)
    assert len(set(factor[picked > 0].tolist())) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_unbiased_factors_give_the_plain_gradient_in_the_mean(temperature: float) -> None:
    score, weight = torch.randn(8), torch.rand(8) + 0.5

    def one(noise: Tensor) -> Tensor:
        case = alignments(score, noise, k=4, temperature=temperature)
        return factors(softmax(case), weight, "unbiased", case)

    # `factors` asks whether everything is picked, which vmap cannot: a loop.
    found = torch.stack([one(noise) for noise in gumbel(1_500, 8)])
    error = found.std(0) / 1_500**0.5
    assert ((found.mean(0) - 1).abs() < 4 * error).all(), found.mean(0)


def test_the_mean_update_tilts_towards_the_target() -> None:
    # Chebyshev's sum inequality: odds that rise with alignment raise its mean, whatever the batch.
    for n in (4, 8):
        for _ in range(5):
            rows, target = torch.randn(n, 12), torch.randn(12)
            score = rows @ target
            odds = torch.tensor(slow_inclusion(slow_odds(score.tolist()), n // 2))
            assert (odds.argsort() == score.argsort()).all()
            exact = float(odds @ score) / (n // 2)
            assert exact > float(score.mean())
            picks = drawn(softmax, score.expand(10_000, n), gumbel(10_000, n))
            along = picks @ score / (n // 2)
            assert float(along.mean()) == pytest.approx(
                exact, abs=4.5 * float(along.std()) / 100 + 1e-5
            )
