"""A pass that was stopped, damaged or mixed up goes on exactly, or says what is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_tokens, tiny_trainable

from selectune.data import Tokens
from selectune.errors import CorruptFileError, DataError, IncompatibleRunError
from selectune.files import disk
from selectune.gradients import products as products_module
from selectune.gradients import store as store_module
from selectune.gradients.engine import GradientEngine
from selectune.gradients.store import Beside, GradientStore, StoredPool, Target
from selectune.progress import Silent

POOL = [Tokens(f"z{k}", t.input_ids, t.is_target) for k, t in enumerate(tiny_tokens(12, 1))]
TARGETS = [Target(t, "task", "") for t in tiny_tokens(4, 2)]


def compute(
    path: Path,
    *,
    name: str = "",
    targets: list[Target] = TARGETS,
    beside: GradientStore | None = None,
) -> StoredPool:
    store = GradientStore(path, {"name": name})
    store.work(
        GradientEngine(tiny_trainable("llama", "lora")),
        POOL,
        targets,
        pad_id=0,
        token_budget=30,
        shard_examples=3,
        progress=Silent(),
        beside=[] if beside is None else [Beside(beside, None, None)],
    )
    return store.load(targets)


class StoppedError(Exception):
    """A kill between two shards."""


def stopped(_: object) -> None:
    raise StoppedError


def refused(*_: object) -> None:
    raise PermissionError(1, "no links here")


def stop_after(n_shards: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a pass and break it off after some of its shards."""
    done: list[object] = []

    def kill(point: object) -> None:
        done.append(point)
        if len(done) == n_shards:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "kill_point", kill)
        with pytest.raises(StoppedError):
            compute(path)


def test_a_pass_that_goes_on_equals_one_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compute(tmp_path / "whole")
    stop_after(2, tmp_path / "cut", monkeypatch)
    resumed = compute(tmp_path / "cut")
    assert resumed.ids == whole.ids
    assert resumed.facts.dots.tobytes() == whole.facts.dots.tobytes()
    assert resumed.facts.norms.tobytes() == whole.facts.norms.tobytes()
    assert not (tmp_path / "cut/directions.bin").exists()


@pytest.mark.parametrize("lost", ["own", "other", "neither", "no second names"])
def test_a_pass_beside_takes_its_targets_from_this_one(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compute(tmp_path / "whole").facts
    other = GradientStore(tmp_path / "other", {"name": "other"})
    if lost == "no second names":
        monkeypatch.setattr(disk.os, "link", refused)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "kill_point", stopped)
        with pytest.raises(StoppedError):
            compute(tmp_path / "own", beside=other)
    if lost in ("own", "other"):
        (tmp_path / lost / "directions.bin").unlink()
    found = compute(tmp_path / "own", beside=other), other.load(TARGETS)
    for pool in found:
        assert pool.facts.dots.tobytes() == whole.dots.tobytes()
        assert pool.facts.gram.tobytes() == whole.gram.tobytes()
    assert not list(tmp_path.glob("*/directions.bin"))


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_target_gradients_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    stop_after(1, tmp_path / "s", monkeypatch)
    file = tmp_path / "s/directions.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data if damage == "flip" else data[:-400])
    with pytest.raises(CorruptFileError, match="target gradients"):
        compute(tmp_path / "s")
    file.unlink()  # what the message advises
    expected = compute(tmp_path / "whole").facts.dots
    assert compute(tmp_path / "s").facts.dots.tobytes() == expected.tobytes()


def test_space_that_a_stopped_pass_has_taken_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(store_module, "check_free_space", lambda _, n_bytes: asked.append(n_bytes))
    stop_after(1, tmp_path / "s", monkeypatch)
    size = (tmp_path / "s/directions.bin").stat().st_size
    compute(tmp_path / "s")
    assert asked[1] == asked[0] - size


def test_a_pass_killed_at_its_very_end_leaves_no_target_gradients(tmp_path: Path) -> None:
    compute(tmp_path / "s")
    (tmp_path / "s/directions.bin").write_bytes(b"left over")
    compute(tmp_path / "s")
    assert not (tmp_path / "s/directions.bin").exists()


@pytest.mark.parametrize("part", ["shard-00001", "targets"])
def test_a_damaged_part_of_a_finished_pass_is_made_anew_once_it_is_removed(
    part: str, tmp_path: Path
) -> None:
    whole = compute(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / part)  # what the message of a damaged one advises
    again = compute(tmp_path / "s")
    assert again.facts.dots.tobytes() == whole.facts.dots.tobytes()
    assert again.facts.gram.tobytes() == whole.facts.gram.tobytes()


def test_a_shard_of_another_pass_is_refused(tmp_path: Path) -> None:
    compute(tmp_path / "a", name="a")
    compute(tmp_path / "b", name="b")
    (tmp_path / "a/shard-00001").rename(tmp_path / "away")
    (tmp_path / "b/shard-00001").rename(tmp_path / "a/shard-00001")
    with pytest.raises(IncompatibleRunError, match="made for something else"):
        compute(tmp_path / "a", name="a")


def test_targets_are_grouped_as_they_are_now_without_another_pass(tmp_path: Path) -> None:
    before = compute(tmp_path / "s")
    named = [Target(t.tokens, "other", f"g{k % 2}") for k, t in enumerate(TARGETS)]
    after = compute(tmp_path / "s", targets=named)
    assert after.facts.groups == ("g0", "g1", "g0", "g1")
    np.testing.assert_array_equal(after.of_task("other").dots, before.facts.dots)


def test_a_gradient_that_is_not_a_number_ends_the_pass_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = products_module.project_with_norm

    def broken(*arguments: object) -> object:
        dots, norm2 = exact(*arguments)  # pyright: ignore[reportArgumentType]
        return dots, norm2 * float("nan")

    monkeypatch.setattr(products_module, "project_with_norm", broken)
    with pytest.raises(DataError, match=r"loss or gradient of .* not a finite number"):
        compute(tmp_path / "s")
    assert not list(tmp_path.glob("s/shard-*"))
