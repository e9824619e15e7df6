"""Calibration text as blocks: which tokens, in which order, and what is held back."""

import pytest

from selectune.errors import DataError
from selectune.offsite.calibration import Calibration, calibration_of
from workspace import byte_tokenizer

TEXTS = [f"paragraph {k} of some length" for k in range(20)]
TOKENIZER = byte_tokenizer()


def blocks_of(
    texts: list[str], n_blocks: int = 4, n_probe: int = 2, size: int = 16, seed: int = 0
) -> Calibration:
    return calibration_of(
        texts, TOKENIZER, n_blocks=n_blocks, block_tokens=size, n_probe=n_probe, seed=seed
    )


def test_blocks_are_the_texts_one_after_another() -> None:
    found = blocks_of(TEXTS)
    assert (len(found.blocks), len(found.probe)) == (4, 2)
    ids = [int(i) for block in (*found.probe, *found.blocks) for i in block.input_ids]
    written = TOKENIZER.decode(ids)
    for part in written.split("<eos>")[:-1]:
        assert part in TEXTS
    every = [*found.blocks, *found.probe]
    assert all(len(block.input_ids) == 16 for block in every)
    assert all(block.is_target[1:].all() and not block.is_target[0] for block in every)


def test_blocks_depend_on_the_seed_and_not_on_the_order_of_texts() -> None:
    one, other = blocks_of(TEXTS), blocks_of(TEXTS[::-1])
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != blocks_of(TEXTS, seed=1).fingerprint


def test_of_short_text_a_fifth_is_held_back() -> None:
    n = sum(len(text) + 1 for text in TEXTS) // 16
    found = blocks_of(TEXTS, n_blocks=1000, n_probe=1000)
    assert len(found.probe) == round(n / 5)
    assert len(found.blocks) == n - round(n / 5)
    few = blocks_of(TEXTS[:2], n_blocks=9, n_probe=9)
    assert (len(few.probe), len(few.blocks)) == (1, 2)


@pytest.mark.parametrize("texts", [[], [""], ["  ", "\n"]])
def test_empty_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="the calibration text is empty"):
        blocks_of(texts)


def test_text_of_less_than_two_blocks_is_refused() -> None:
    with pytest.raises(DataError, match="28 tokens, too few for 2 blocks of 16"):
        blocks_of([TEXTS[10]])
