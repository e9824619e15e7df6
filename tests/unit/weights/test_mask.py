"""Masks as values: they refuse nonsense, combine like sets, and survive the disk."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selectune.errors import CorruptFileError, IncompatibleRunError, SelectionError, StorageError
from selectune.weights.mask import WeightMask, index_dtype

SHAPES = {"b": (3, 4), "a": (5,), "c": (2, 2)}
PLACES = {"b": st.sets(st.integers(0, 11)), "a": st.sets(st.integers(0, 4))}


def made(places: dict[str, set[int]], base: str = "x") -> WeightMask:
    indices = {name: torch.tensor(sorted(p), dtype=torch.int64) for name, p in places.items()}
    return WeightMask(indices, SHAPES, base)


def sets(mask: WeightMask) -> dict[str, set[int]]:
    return {name: set(index.tolist()) for name, index in mask}


def without_empty(places: dict[str, set[int]]) -> dict[str, set[int]]:
    return {name: p for name, p in places.items() if p}


@given(st.fixed_dictionaries(PLACES), st.fixed_dictionaries(PLACES))
def test_masks_combine_like_sets(a: dict[str, set[int]], b: dict[str, set[int]]) -> None:
    one, other = made(a), made(b)
    assert sets(one | other) == without_empty({n: a[n] | b[n] for n in a})
    assert sets(one & other) == without_empty({n: a[n] & b[n] for n in a})
    assert sets(one - other) == without_empty({n: a[n] - b[n] for n in a})
    rest = one.complement()
    assert len(rest) + len(one) == one.n_eligible == 21
    assert not len(rest & one)
    assert rest.complement() == one
    assert one.density == len(one) / 21
    assert sum(d * s for d, s in zip(one.densities().values(), (12, 5, 4), strict=True)) == (
        pytest.approx(len(one))
    )


def test_indices_are_int32_by_name_and_empty_ones_are_left_out() -> None:
    mask = made({"b": {1, 2}, "a": {0}, "c": set()})
    assert list(mask.indices) == ["a", "b"]
    assert {index.dtype for _, index in mask} == {torch.int32}
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64
    assert "3 of 21 weights" in repr(mask)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ({"z": [0]}, '"z" is no parameter'),
        ({"a": [5]}, "not places in a tensor of 5"),
        ({"a": [-1, 0]}, "not places in a tensor of 5"),
        ({"a": [2, 1]}, "not places in a tensor of 5"),
        ({"a": [1, 1]}, "not places in a tensor of 5"),
    ],
    ids=str,
)
def test_places_that_do_not_exist_are_refused(indices: dict[str, list[int]], words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        WeightMask({name: torch.tensor(i) for name, i in indices.items()}, SHAPES)


def test_a_size_below_nothing_is_refused() -> None:
    with pytest.raises(SelectionError, match="shape"):
        WeightMask({}, {"a": (-2, -3)})


def test_masks_of_different_bases_do_not_combine() -> None:
    for combine in (WeightMask.__or__, WeightMask.__and__, WeightMask.__sub__):
        with pytest.raises(SelectionError, match="different base models"):
            combine(made({"a": {1}}), made({"a": {1}}, base="y"))


def test_masks_of_one_name_and_two_shapes_do_not_combine() -> None:
    other = WeightMask({"a": torch.tensor([1])}, {"a": (1, 5)}, "x")
    with pytest.raises(SelectionError, match="shape"):
        _ = made({"a": {1}}) | other


def test_equality_is_of_places_shapes_and_base() -> None:
    assert made({"a": {1}}) == made({"a": {1}})
    assert made({"a": {1}}) != made({"a": {2}})
    assert made({"a": {1}}) != made({"b": {1}})
    assert made({"a": {1}}) != made({"a": {1}}, base="y")
    assert made({"a": {1}}) != 3


@given(st.fixed_dictionaries(PLACES))
def test_a_saved_mask_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, places: dict[str, set[int]]
) -> None:
    mask = made(places)
    path = mask.save(tmp_path_factory.mktemp("mask") / "m")
    again = WeightMask.load(path)
    assert again == mask
    assert list(again.shapes) == list(mask.shapes)


def test_a_damaged_or_newer_mask_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made({"a": {1, 3}}).save(tmp_path / "m")
    file = path / "mask.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError):
        WeightMask.load(path)
    file.write_bytes(content)
    assert len(WeightMask.load(path)) == 2
    monkeypatch.setattr("selectune.weights.mask._FORMAT", 2)
    with pytest.raises(IncompatibleRunError, match="format 1, this version reads 2"):
        WeightMask.load(path)


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StorageError):
        made({"a": {1}}).save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_indices_from_anywhere_come_to_the_cpu() -> None:
    index: Tensor = torch.tensor([0, 4], dtype=torch.int16)
    assert made({}).n_chosen == 0
    assert WeightMask({"a": index}, SHAPES).indices["a"].dtype == torch.int32
