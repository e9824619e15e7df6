import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selectune.training.order import EpochBatches


def epoch(n: int, batch_size: int, accumulation: int, seed: int = 0, number: int = 0) -> list:
    lengths = np.random.default_rng(5).integers(3, 99, n).tolist()
    order = EpochBatches(lengths, batch_size=batch_size, accumulation=accumulation, seed=seed)
    order.set_epoch(number)
    assert len(list(order)) == len(order)
    return list(order)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_each_epoch_holds_every_example_once(n: int, size: int, passes: int, number: int) -> None:
    batches = epoch(n, size, passes, number=number)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert max(map(len, batches)) <= size


@given(st.integers(1, 100))
def test_a_step_holds_the_same_examples_however_it_is_cut(n: int) -> None:
    whole = [set(batch) for batch in epoch(n, 8, 1)]
    for size, passes in ((4, 2), (2, 4), (1, 8)):
        parts = epoch(n, size, passes)
        steps, start = [], 0
        for step in whole:
            stop = start + -(-len(step) // size)
            steps.append({i for batch in parts[start:stop] for i in batch})
            start = stop
        assert steps == whole


def test_seed_and_epoch_decide_the_order_and_nothing_else_does() -> None:
    assert epoch(50, 4, 1) == epoch(50, 4, 1)
    assert epoch(50, 4, 1, seed=1) != epoch(50, 4, 1)
    assert epoch(50, 4, 1, number=1) != epoch(50, 4, 1)


def test_batches_hold_examples_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 512)
    order = EpochBatches(lengths.tolist(), batch_size=8, accumulation=1, seed=0)
    padded = sum(len(batch) * lengths[batch].max() for batch in order)
    at_random = lengths.reshape(-1, 8).max(1).sum() * 8
    assert padded < 1.1 * lengths.sum() < at_random
