"""Gap-coded indices: what comes out is what went in, in about a byte each."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_deltas import read_gaps
from torch import Tensor

from selectune.errors import CorruptFileError
from selectune.weights.gaps import decode, encode


def drawn(numel: int, k: int) -> Tensor:
    return torch.randperm(numel)[:k].sort().values


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=200))
def test_any_indices_come_back(places: set[int]) -> None:
    index = torch.tensor(sorted(places))
    assert decode(encode(index), len(index)).tolist() == index.tolist()


@given(st.sets(st.integers(0, 300), min_size=1, max_size=40))
def test_the_bytes_mean_what_a_loop_over_bits_reads(places: set[int]) -> None:
    data = encode(torch.tensor(sorted(places))).tolist()
    assert read_gaps(data, len(places)) == sorted(places)


@pytest.mark.parametrize("index", [[0], [2**33 + 5], [0, 2**33], list(range(100))], ids=str)
def test_extreme_places_come_back(index: list[int]) -> None:
    assert decode(encode(torch.tensor(index)), len(index)).tolist() == index


@pytest.mark.parametrize(("density", "limit"), [(0.1, 0.7), (0.01, 1.1), (0.001, 1.55)])
def test_an_index_takes_about_a_byte(density: float, limit: float) -> None:
    numel = 2_000_000
    k = int(density * numel)
    per_entry = encode(drawn(numel, k)).numel() / k
    assert per_entry < limit
    # No code can do better than the entropy of the choice.
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    assert per_entry > entropy / 8


def test_whole_rows_and_columns_take_no_more() -> None:
    rows, columns = 1000, 500
    row_wise = torch.cat([torch.arange(columns) + r * columns for r in range(0, rows, 100)])
    column_wise = (torch.arange(rows)[:, None] * columns + torch.arange(5)).flatten()
    for index in (row_wise, column_wise):
        assert encode(index).numel() / len(index) < 1.1
        assert torch.equal(decode(encode(index), len(index)), index)


@pytest.mark.parametrize(
    ("data", "k"),
    [([], 1), ([60, 0, 0], 1), ([3], 5), ([0, 0b10000000], 2), ([0, 0b11100000], 2), ([0, 1], 99)],
    ids=["empty", "too many bits", "low bits missing", "one short", "one over", "absurd count"],
)
def test_bytes_that_are_no_gaps_are_refused(data: list[int], k: int) -> None:
    with pytest.raises(CorruptFileError):
        decode(torch.tensor(data, dtype=torch.uint8), k)
