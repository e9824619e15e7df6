from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selectune.data import NO_LOSS, Tokens, collate, length_sorted_batches, narrowed

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 200), st.none() | st.integers(1, 8))
def test_batches_partition_the_examples_within_the_budget(
    lengths: list[int], budget: int, most: int | None
) -> None:
    batches = length_sorted_batches(lengths, token_budget=budget, max_examples=most)
    assert sorted(k for batch in batches for k in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[k] for k in batch)
        assert len(batch) == 1 or len(batch) * width <= budget
        assert most is None or len(batch) <= most


@given(LENGTHS, st.integers(1, 200))
def test_batches_come_longest_first_with_ties_in_order(lengths: list[int], budget: int) -> None:
    flat = [k for batch in length_sorted_batches(lengths, token_budget=budget) for k in batch]
    assert flat == sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))


@given(LENGTHS.filter(bool), st.integers(1, 200))
def test_no_batch_could_take_in_the_next_example(lengths: list[int], budget: int) -> None:
    batches = length_sorted_batches(np.array(lengths), token_budget=budget)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_row_holds_its_example_and_padding_that_counts_nowhere(
    side: Literal["left", "right"], lengths: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    items = [
        Tokens(f"e{k}", rng.integers(1, 50, size=n), rng.random(n) < 0.5)
        for k, n in enumerate(lengths)
    ]
    batch = collate(items, pad_id=0, side=side)
    assert batch.ids == tuple(item.id for item in items)
    assert batch.input_ids.shape == (len(items), max(lengths))
    for row, item in enumerate(items):
        n = len(item.input_ids)
        real = slice(n) if side == "right" else slice(max(lengths) - n, None)
        mask = torch.zeros(max(lengths), dtype=torch.int64)
        mask[real] = 1
        assert torch.equal(batch.attention_mask[row], mask)
        assert batch.input_ids[row, real].tolist() == item.input_ids.tolist()
        assert (batch.input_ids[row][mask == 0] == 0).all()
        assert (batch.labels[row][mask == 0] == NO_LOSS).all()
        expected = [
            i if t else NO_LOSS for i, t in zip(item.input_ids, item.is_target, strict=True)
        ]
        assert batch.labels[row, real].tolist() == expected


def test_a_batch_moves_with_its_ids() -> None:
    batch = collate([Tokens("a", np.array([1, 2]), np.array([False, True]))], pad_id=0)
    moved = batch.to("meta")
    assert moved.ids == ("a",)
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.labels)} == {
        "meta"
    }


@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_narrower_batches_hold_every_example_once_with_less_padding(
    side: Literal["left", "right"], lengths: list[int]
) -> None:
    items = [
        Tokens(f"e{k}", np.arange(1, n + 1), np.arange(n) >= n // 2) for k, n in enumerate(lengths)
    ]
    whole = collate(items, pad_id=0, side=side)
    parts = narrowed(whole)
    assert sorted(id for part in parts for id in part.ids) == sorted(whole.ids)
    for part in parts:
        for id, *row in zip(
            part.ids, part.input_ids, part.attention_mask, part.labels, strict=True
        ):
            item = items[int(id[1:])]
            ids, mask, labels = row
            assert ids[mask > 0].tolist() == item.input_ids.tolist()
            assert (labels[mask > 0] != NO_LOSS).tolist() == item.is_target.tolist()
    cost = [64 + part.input_ids.numel() for part in parts]
    assert sum(cost) <= 64 + whole.input_ids.numel()


def test_one_long_example_does_not_widen_three_short_ones() -> None:
    items = [Tokens(f"e{n}", np.arange(n), np.arange(n) > 0) for n in (250, 50, 49, 48)]
    parts = narrowed(collate(items, pad_id=0))
    assert [part.ids for part in parts] == [("e250",), ("e50", "e49", "e48")]
    assert [part.input_ids.shape[1] for part in parts] == [250, 50]
