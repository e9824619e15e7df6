"""Deltas that somebody else wrote: whatever they say, a clear refusal, and no code is run."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from selectune.errors import CorruptFileError, IncompatibleRunError, SelectuneError
from selectune.weights.delta import SparseDelta
from selectune.weights.gaps import decode

NAME = "a.weight"
Facts = dict[str, Any]


def delta() -> SparseDelta:
    return SparseDelta(
        {NAME: torch.tensor([1, 4])},
        {NAME: torch.tensor([0.5, -0.5])},
        {NAME: (2, 3)},
        {NAME: "float32"},
        "f00d",
    )


def seal(folder: Path, facts: Facts) -> None:
    """Write facts whose checksums are right: the liar knows how they are made."""
    weights = (folder / "sparse.safetensors").read_bytes()
    facts["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    facts.pop("sha256", None)
    body = json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n"
    facts["sha256"] = hashlib.sha256(body).hexdigest()
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (folder / "sparse.json").write_text(text)


def facts_of(folder: Path) -> Facts:
    return json.loads((folder / "sparse.json").read_text())


@pytest.fixture(params=["plain", "gaps"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = delta().save(tmp_path / "delta", indices=request.param)
    seal(path, facts_of(path))
    assert SparseDelta.load(path) == delta()  # the seal is as good as ours
    return path


LIES: dict[str, Callable[[Facts], object]] = {
    "no tensors": lambda f: f.pop("tensors"),
    "tensors are a list": lambda f: f.update(tensors=[]),
    "no base": lambda f: f.pop("base"),
    "no about": lambda f: f.pop("about"),
    "another count": lambda f: f.update(n_entries=3),
    "an absurd count": lambda f: f["tensors"][NAME].update(n_entries=10**15),
    "a negative count": lambda f: f["tensors"][NAME].update(n_entries=-1),
    "a smaller shape": lambda f: f["tensors"][NAME].update(shape=[2, 2]),
    "a shape of text": lambda f: f["tensors"][NAME].update(shape="abc"),
    "a negative shape": lambda f: f["tensors"][NAME].update(shape=[-2, -3]),
    "a function for a type": lambda f: f["tensors"][NAME].update(dtype="load"),
    "a type of integers": lambda f: f["tensors"][NAME].update(dtype="int8"),
    "a tensor more": lambda f: f["tensors"].update(b=f["tensors"][NAME]),
    "another name": lambda f: f.update(tensors={"b": f["tensors"][NAME]}),
    "another format": lambda f: f.update(format="selectune/weight mask"),
    "a version of text": lambda f: f.update(version="2"),
    "a newer version": lambda f: f.update(version=99),
}


@pytest.mark.parametrize("lie", LIES)
def test_facts_that_are_sealed_lies_are_refused(folder: Path, lie: str) -> None:
    facts = facts_of(folder)
    LIES[lie](facts)
    seal(folder, facts)
    with pytest.raises((CorruptFileError, IncompatibleRunError)) as error:
        SparseDelta.load(folder)
    assert error.value.where


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([4, 1], dtype=torch.int32),
        torch.tensor([1, 1], dtype=torch.int32),
        torch.tensor([1, 6], dtype=torch.int32),
        torch.tensor([-1, 1], dtype=torch.int32),
        torch.tensor([1.0, 4.0]),
        torch.tensor([[1, 4]], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([0, 2**40]),
    ],
    ids=str,
)
def test_sealed_indices_that_are_no_places_are_refused(tmp_path: Path, index: Tensor) -> None:
    folder = delta().save(tmp_path / "delta")
    file = folder / "sparse.safetensors"
    save_file({**load_file(file), f"{NAME}.idx": index}, file)
    seal(folder, facts_of(folder))
    with pytest.raises(CorruptFileError, match="does not fit its own description"):
        SparseDelta.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_sealed_deltas_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    file = folder / "sparse.safetensors"
    save_file({**load_file(file), f"{NAME}.delta": torch.tensor([0.0, value])}, file)
    seal(folder, facts_of(folder))
    with pytest.raises(CorruptFileError, match="not a finite number"):
        SparseDelta.load(folder)


@pytest.mark.parametrize("name", ["sparse.json", "sparse.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CorruptFileError):
        SparseDelta.load(folder)


@pytest.mark.parametrize("name", ["sparse.json", "sparse.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"{}", b"[" * 100_000, b"\xff" * 100])
def test_nonsense_for_a_file_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptFileError):
        SparseDelta.load(folder)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_sealed_tensor_file_breaks_the_reader(tmp_path: Path, content: bytes) -> None:
    folder = delta().save(tmp_path / "delta")
    (folder / "sparse.safetensors").write_bytes(content)
    seal(folder, facts_of(folder))
    with pytest.raises(SelectuneError):
        SparseDelta.load(folder)


@given(st.binary(max_size=60), st.integers(1, 10**12))
def test_no_bytes_break_the_gaps(data: bytes, k: int) -> None:
    raw = torch.tensor(list(data), dtype=torch.uint8)
    try:
        found = decode(raw, k)
    except CorruptFileError:
        return
    assert len(found) == k
    assert bool((found.diff() > 0).all())
