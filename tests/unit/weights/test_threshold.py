"""The k highest of many scores: by counting bits, as by sorting; ties, zeros, denormals, bounds."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from slow_masks import Places, slow_bounded, slow_top
from torch import Tensor

from selectune.seeds import seeded
from selectune.weights.threshold import Cut, bounded, exact_cut, keys, passing, sampled_cut

# Few values make ties; infinities, both zeros and denormals are where bits could mislead.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 1e-40, 3e38, float("inf"), float("-inf")]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False))
TENSORS = st.lists(
    hnp.arrays(np.float32, st.integers(1, 12), elements=VALUES), min_size=1, max_size=4
)


def chosen(scores: dict[str, Tensor], cut: Cut, of: Callable[[str], Tensor]) -> Places:
    found = {
        name: is_in.nonzero().flatten().tolist() for name, is_in in passing([*scores], of, cut)
    }
    return {name: places for name, places in found.items() if places}


def named(tensors: list[np.ndarray]) -> dict[str, Tensor]:
    return {f"t{k}": torch.from_numpy(t) for k, t in enumerate(tensors)}


def plain(scores: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: t.tolist() for name, t in scores.items()}


@given(TENSORS, st.data())
def test_the_cut_is_where_a_full_sort_ends(tensors: list[np.ndarray], data: st.DataObject) -> None:
    scores = named(tensors)
    k = data.draw(st.integers(1, sum(map(len, tensors))))

    def of(name: str) -> Tensor:
        return keys(scores[name])

    cut = exact_cut([*scores], of, k)
    assert chosen(scores, cut, of) == slow_top(plain(scores), k)


@given(hnp.arrays(np.float32, 20, elements=VALUES))
def test_keys_are_in_the_order_of_the_scores(values: np.ndarray) -> None:
    found = keys(torch.from_numpy(values)).numpy()
    for a, x in zip(found, values, strict=True):
        for b, y in zip(found, values, strict=True):
            assert (a < b) == (x < y)
            assert (a == b) == (x == y)


@given(TENSORS, st.data())
def test_bounds_hold_and_the_best_others_fill_up(
    tensors: list[np.ndarray], data: st.DataObject
) -> None:
    scores = named(tensors)
    least, most = {}, {}
    for name, t in scores.items():
        most[name] = data.draw(st.integers(0, len(t)))
        least[name] = data.draw(st.integers(0, most[name]))
    lowest, highest = sum(least.values()), sum(most.values())
    if highest == 0:
        return
    k = data.draw(st.integers(max(1, lowest), highest))

    def of(name: str) -> Tensor:
        return bounded(keys(scores[name]), least[name], most[name])

    cut = exact_cut([*scores], of, k)
    assert chosen(scores, cut, of) == slow_bounded(plain(scores), k, least, most)


def test_scores_that_are_all_alike_are_taken_from_the_front() -> None:
    scores = {"b": torch.zeros(4), "a": torch.zeros(3)}

    def of(name: str) -> Tensor:
        return keys(scores[name])

    cut = exact_cut(["b", "a"], of, 5)
    assert chosen(scores, cut, of) == {"b": [0, 1, 2, 3], "a": [0]}


def test_a_large_tensor_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selectune.weights.threshold._CHUNK", 7)
    scores = {"a": torch.randn(100), "b": torch.randn(50)}

    def of(name: str) -> Tensor:
        return keys(scores[name])

    assert chosen(scores, exact_cut([*scores], of, 31), of) == slow_top(plain(scores), 31)


def test_every_sweep_asks_for_one_tensor_after_the_other() -> None:
    scores = {"a": torch.randn(9), "b": torch.randn(5)}
    asked: list[str] = []

    def of(name: str) -> Tensor:
        asked.append(name)
        return keys(scores[name])

    list(passing([*scores], of, exact_cut([*scores], of, 4)))
    assert asked == ["a", "b"] * 3


def test_a_sampled_cut_is_near_the_share_and_repeats() -> None:
    scores = {"a": torch.randn(40_000), "b": 3 * torch.randn(20_000)}

    def of(name: str) -> Tensor:
        return keys(scores[name])

    share = Fraction(1, 20)
    found = []
    for seed in (0, 0, 1):
        cut = sampled_cut([*scores], of, share, sample=10_000, seed=seed)
        found.append(sum(int(is_in.sum()) for _, is_in in passing([*scores], of, cut)))
    assert found[0] == found[1] != found[2]
    # Relative standard deviation 1 / sqrt(share * sample) = 4.5 %; four of them are allowed.
    assert all(abs(n / 3000 - 1) < 0.18 for n in found)


def test_a_sample_of_all_scores_gives_the_exact_cut() -> None:
    scores = {"a": torch.randn(70), "b": torch.randn(30)}

    def of(name: str) -> Tensor:
        return keys(scores[name])

    cut = sampled_cut([*scores], of, Fraction(1, 10), sample=1000, seed=0)
    assert chosen(scores, cut, of) == slow_top(plain(scores), 10)


def test_random_numbers_have_a_purpose() -> None:
    draws = {
        (seed, words): torch.rand(1, generator=seeded(seed, *words)).item()
        for seed in (0, 1)
        for words in (("random", "a"), ("random", "b"), ("matched", "a"))
    }
    assert len(set(draws.values())) == len(draws)
