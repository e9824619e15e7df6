"""A sparse delta as a value and on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from selectune.errors import (
    CorruptFileError,
    IncompatibleRunError,
    SelectionError,
    StorageError,
    TrainingError,
)
from selectune.files import MANIFEST
from selectune.weights.delta import Indices, SparseDelta, Stored, add, seal
from selectune.weights.mask import WeightMask
from unit.weights.deltas import tiny_delta, tiny_model

FORMS: list[tuple[Stored, Indices]] = [
    ("float32", "plain"),
    ("float32", "gaps"),
    ("bfloat16", "plain"),
    ("bfloat16", "gaps"),
]
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def delta(model: nn.Module) -> SparseDelta:
    return tiny_delta(model)


def simple(**changes: object) -> SparseDelta:
    facts: dict[str, Any] = {
        "indices": {"a.weight": torch.tensor([1, 4])},
        "deltas": {"a.weight": torch.tensor([0.5, -0.5])},
        "shapes": {"a.weight": (2, 3)},
        "dtypes": {"a.weight": "float32"},
        "base": "f00d",
    }
    return SparseDelta(**{**facts, **changes})


def big(k: int = 20_000, numel: int = 2_000_000) -> SparseDelta:
    return SparseDelta(
        {"a.weight": torch.randperm(numel)[:k].sort().values},
        {"a.weight": torch.randn(k)},
        {"a.weight": (1000, numel // 1000)},
        {"a.weight": "float32"},
    )


@pytest.mark.parametrize(("dtype", "indices"), FORMS)
def test_what_is_saved_comes_back(
    delta: SparseDelta, tmp_path: Path, dtype: Stored, indices: Indices
) -> None:
    path = delta.save(tmp_path / "delta", dtype=dtype, indices=indices)
    found = SparseDelta.load(path)
    assert found.about == delta.about
    assert found.indices.keys() == delta.indices.keys()
    for name, held in delta.deltas.items():
        assert torch.equal(found.deltas[name], held.to(getattr(torch, dtype)))
        assert torch.equal(found.indices[name], delta.indices[name])
        assert found.indices[name].dtype == torch.int32
    assert (found == delta) == (dtype == "float32")


@pytest.mark.parametrize("indices", ["plain", "gaps"])
def test_a_delta_of_bfloat16_stays_so_unless_asked(
    model: nn.Module, tmp_path: Path, indices: Indices
) -> None:
    half = tiny_delta(model, dtype=HALF)
    assert SparseDelta.load(half.save(tmp_path / "a", indices=indices)) == half
    wide = SparseDelta.load(half.save(tmp_path / "b", dtype="float32"))
    assert all(torch.equal(wide.deltas[n], d.float()) for n, d in half.deltas.items())


@pytest.mark.parametrize(("form", "limit"), list(zip(FORMS, [8.0, 5.1, 6.0, 3.1], strict=True)))
def test_bytes_per_entry(tmp_path: Path, form: tuple[Stored, Indices], limit: float) -> None:
    path = big().save(tmp_path / "delta", dtype=form[0], indices=form[1])
    n_bytes = sum(file.stat().st_size for file in path.iterdir()) - 2000  # names and facts
    assert n_bytes <= limit * 20_000


def test_the_facts_can_be_read_by_anyone(tmp_path: Path) -> None:
    found = json.loads((simple().save(tmp_path / "delta") / "sparse.json").read_text())
    assert found["format"] == "selectune/sparse-delta"
    assert (found["version"], found["base"], found["n_entries"]) == (1, "f00d", 2)
    assert found["tensors"]["a.weight"] == {"shape": [2, 3], "dtype": "float32", "n_entries": 2}


@pytest.mark.parametrize("indices", ["plain", "gaps"])
@pytest.mark.parametrize("name", ["sparse.json", "sparse.safetensors"])
def test_no_flipped_bit_passes(tmp_path: Path, name: str, indices: Indices) -> None:
    file = simple().save(tmp_path / "delta", indices=indices) / name
    good = file.read_bytes()
    for place in range(len(good)):
        for bit in (0, 5, 7):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises((CorruptFileError, IncompatibleRunError)):
                SparseDelta.load(file.parent)
    file.write_bytes(good)
    assert SparseDelta.load(file.parent) == simple()


@pytest.mark.parametrize("name", ["sparse.json", "sparse.safetensors"])
def test_a_file_that_is_cut_off_or_missing_is_refused(tmp_path: Path, name: str) -> None:
    file = simple().save(tmp_path / "delta") / name
    good = file.read_bytes()
    for length in range(0, len(good), 7):
        file.write_bytes(good[:length])
        with pytest.raises(CorruptFileError):
            SparseDelta.load(file.parent)
    file.unlink()
    with pytest.raises(CorruptFileError):
        SparseDelta.load(file.parent)


def test_a_folder_without_a_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="there is no such folder"):
        SparseDelta.load(tmp_path / "nowhere")
    with pytest.raises(CorruptFileError, match="no sparse delta"):
        SparseDelta.load(tmp_path)


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    file = simple().save(tmp_path / "delta") / "sparse.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(IncompatibleRunError, match="newer selectune"):
        SparseDelta.load(file.parent)


def test_a_copy_without_manifest_or_behind_links_loads(tmp_path: Path) -> None:
    path = simple().save(tmp_path / "delta")
    (path / MANIFEST).unlink()
    (tmp_path / "cache").mkdir()
    for name in ("sparse.json", "sparse.safetensors"):  # the Hub's cache looks like this
        (tmp_path / "cache" / name).symlink_to(path / name)
    assert SparseDelta.load(tmp_path / "cache") == simple()


def test_files_of_others_stay_and_a_later_save_replaces_only_its_own(tmp_path: Path) -> None:
    path = simple().save(tmp_path / "delta")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "weights").write_text("dear")
    (path / "tokenizer.json").write_text("{}")
    later = simple(base="beef")
    later.save(path)
    assert SparseDelta.load(path) == later
    assert (path / "checkpoint-1" / "weights").read_text() == "dear"
    assert not (path / MANIFEST).exists()  # it told of the older files
    simple().save(path)
    assert SparseDelta.load(path) == simple()


def test_a_manifest_of_another_result_stays(tmp_path: Path) -> None:
    WeightMask({"a": torch.tensor([0])}, {"a": (2,)}).save(tmp_path / "mask")
    simple().save(tmp_path / "mask")
    assert WeightMask.load(tmp_path / "mask").n_chosen == 1
    assert SparseDelta.load(tmp_path / "mask") == simple()


def test_two_saves_that_mix_are_refused(tmp_path: Path) -> None:
    older, newer = simple().save(tmp_path / "a"), simple(base="beef").save(tmp_path / "b")
    weights = simple(deltas={"a.weight": torch.tensor([0.5, 0.25])}).save(tmp_path / "c")
    shutil.copy(weights / "sparse.safetensors", newer)  # a save that was cut between its two files
    with pytest.raises(CorruptFileError, match="damaged"):
        SparseDelta.load(newer)
    assert SparseDelta.load(older) == simple()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "delta").write_text("a file")
    with pytest.raises(StorageError, match="is a file"):
        simple().save(tmp_path / "delta")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": {"a.weight": torch.tensor([4, 1])}}, "not places"),
        ({"indices": {"a.weight": torch.tensor([1, 6])}}, "not places"),
        ({"indices": {"b": torch.tensor([1])}}, "no parameter"),
        ({"deltas": {}}, "has no indices, no deltas or no type"),
        ({"dtypes": {"a.weight": "int8"}}, "is of the type int8"),
        ({"dtypes": {}}, "has no indices, no deltas or no type"),
        ({"deltas": {"a.weight": torch.tensor([0.5])}}, "do not fit its indices"),
        ({"deltas": {"a.weight": torch.ones(2, dtype=torch.float16)}}, "do not fit its indices"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        simple(**changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(TrainingError, match=r"a delta of a\.weight is not a finite number"):
        simple(deltas={"a.weight": torch.tensor([0.5, value])})


def test_it_prints_what_it_is_and_gives_its_mask() -> None:
    made = simple(about={"method": "gallop"}, shapes={"a.weight": (2, 3), "b": (9,)})
    assert repr(made) == "SparseDelta(gallop, 2 of 6 weights in 1 tensors)"
    assert (made.n_entries, len(made)) == (2, 2)
    assert made.mask().indices["a.weight"].tolist() == [1, 4]
    assert made != "text"
    assert made != simple(base="beef")


def test_only_its_own_base_passes(delta: SparseDelta, model: nn.Module) -> None:
    delta.check(model)
    with pytest.raises(IncompatibleRunError, match=f"expects the fingerprint {delta.base}"):
        delta.check(tiny_model(seed=1), where="runs/delta")
    with pytest.raises(IncompatibleRunError, match="another shape") as wide:
        delta.check(tiny_model(width=32))
    assert delta.base in str(wide.value)
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(IncompatibleRunError, match="tensors are missing"):
        delta.check(other)


def test_a_base_of_another_type_is_told_so(delta: SparseDelta) -> None:
    with pytest.raises(IncompatibleRunError, match=r"dtype=torch\.float32") as error:
        delta.check(tiny_model(HALF))
    assert "made on float32 weights, the model holds bfloat16" in str(error.value)


FLOATS = st.floats(-2, 2, width=32, allow_subnormal=True)


@given(
    st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=30),
    st.sampled_from([torch.float32, HALF, torch.float16]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_sealed_weights_are_what_the_stored_delta_gives(
    pairs: list[tuple[float, float]], weight: torch.dtype, stored: Stored
) -> None:
    values, base = (torch.tensor(column) for column in zip(*pairs, strict=True))
    base = base.to(weight)
    sealed = seal(values, base, dtype=stored)
    assert sealed.delta.dtype == getattr(torch, stored)
    live = sealed.values.to(weight)
    assert torch.equal(live, add(base, sealed.delta))
    # A second seal finds nothing to do; the masters may be off by what fp32 cannot say.
    again = seal(sealed.values, base, dtype=stored)
    assert torch.equal(again.values.to(weight), live) or stored == "bfloat16"
    changed = live != values.to(weight)
    assert sealed.n_changed == int(changed.sum())
    gaps = (live.float() - values.to(weight).float()).abs()
    assert sealed.largest_change == float(gaps.max())
    if stored == "float32" and weight == torch.float32:
        assert bool((gaps <= 2**-24 * (base.abs() + 2 * values.abs()) + 2**-148).all())


def test_a_seal_changes_what_a_difference_does_not_add_back_to() -> None:
    base, values = 0.02 * torch.randn(2, 20_000)
    is_off = base + (values - base) != values
    sealed = seal(values, base)
    assert 0 < sealed.n_changed == int(is_off.sum())
    assert sealed.largest_change <= 2**-24 * float((base.abs() + 2 * values.abs()).max())


def test_weights_of_double_precision_are_added_in_theirs() -> None:
    base = torch.tensor([1.0 + 2**-40], dtype=torch.float64)
    assert add(base, torch.tensor([0.0])).item() == base.item()
