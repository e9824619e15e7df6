from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selectune.data import NO_LOSS, Tokens, collate, length_sorted_batches

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
