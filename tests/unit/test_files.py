import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from selectune import files
from selectune.errors import ConfigError, CorruptFileError, DataError, StorageError
from selectune.files import (
    CRASH_AT,
    MANIFEST,
    KillPoint,
    check_free_space,
    is_complete,
    kill_point,
    lock,
    open_dir,
    passes,
    seal,
    sha256_file,
    staged,
    sweep,
    write_file,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


def put(path: Path, text: str = "new") -> None:
    with staged(path, kind="test", meta={"text": text}) as stage:
        stage.write_text("text.txt", text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@settings(max_examples=40)
@given(meta=st.dictionaries(st.text(), JSON, max_size=3), value=JSON, data=st.binary())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, meta: dict, value: object, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("run") / "result"
    with staged(path, kind="test", meta=meta) as stage:
        stage.write_json("value.json", value)
        stage.write_bytes("a/b/data.bin", data)
    opened = open_dir(path, kind="test")
    assert opened.names == ("a/b/data.bin", "value.json")
    assert opened.meta == meta
    assert opened.read_json("value.json") == value
    assert opened.read_bytes("a/b/data.bin") == data


def test_meta_with_numbers_for_keys_is_read_back_as_text_keys(tmp_path: Path) -> None:
    with staged(tmp_path / "r", kind="test", meta={"by": {2: "b", 10: "j"}}):
        pass
    assert open_dir(tmp_path / "r", kind="test").meta == {"by": {"2": "b", "10": "j"}}


def test_meta_may_grow_until_the_block_ends(tmp_path: Path) -> None:
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        stage.meta["n"] = 3
    assert open_dir(tmp_path / "r", kind="test").meta == {"n": 3}


def test_tables_are_read_back_with_nulls_and_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": ["a", "ü", ""],
            "n": pa.array([1, None, 3], pa.int32()),
            "right": [True, None, False],
            "x": np.array([0.1, -np.inf, 3.0], dtype=np.float32),
        }
    )
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        stage.write_table("t.parquet", table)
        stage.write_table("empty.parquet", table.slice(0, 0))
    opened = open_dir(tmp_path / "r", kind="test")
    assert opened.read_table("t.parquet").equals(table)
    assert opened.read_table("t.parquet", schema=table.schema).equals(table)
    assert opened.read_table("empty.parquet").equals(table.slice(0, 0))


def test_a_table_whose_columns_repeat_much_is_read_back(tmp_path: Path) -> None:
    # A reader refuses what would inflate: a real pool with one source must not look like that.
    ids = [hashlib.sha256(b"%d" % i).hexdigest()[:16] + "-0" for i in range(20_000)]
    columns = {"id": ids, "source": ["commonsense"] * 20_000, "empty": pa.nulls(20_000, pa.int64())}
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        stage.write_table("t.parquet", pa.table(columns))
    found = open_dir(tmp_path / "r", kind="test").read_table("t.parquet")
    assert found.equals(pa.table(columns))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.arange(8.0, dtype=np.float16)[::2],
        np.array([True, False]),
        np.float32(3.0),
        np.zeros((0, 3)),
        np.array([1.0, 2.0], dtype=">f8"),
    ],
    ids=["transposed", "strided", "bool", "scalar", "empty", "big-endian"],
)
def test_arrays_are_read_back_whatever_their_memory_looks_like(
    array: np.ndarray, tmp_path: Path
) -> None:
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        stage.write_tensors("t.safetensors", {"x": array})
    found = open_dir(tmp_path / "r", kind="test").read_tensors("t.safetensors")["x"]
    assert found.shape == np.shape(array)
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_torch_tensors_are_read_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(4, 3).mul(100).to(dtype)
    tied = torch.nn.Parameter(torch.randn(2, 2))
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        tensors = {"x": x.T, "part": x[1:, ::2], "a": tied, "b": tied, "n": np.arange(3)}
        stage.write_tensors("t.safetensors", tensors)
    opened = open_dir(tmp_path / "r", kind="test")
    found = opened.read_torch("t.safetensors")
    assert torch.equal(found["x"], x.T)
    assert torch.equal(found["part"], x[1:, ::2])
    assert found["x"].dtype is dtype
    assert torch.equal(found["a"], tied)
    assert torch.equal(found["b"], tied)
    arrays = opened.read_tensors("t.safetensors")
    np.testing.assert_array_equal(arrays["x"], x.T.double().numpy())
    np.testing.assert_array_equal(arrays["n"], np.arange(3))


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        with staged(tmp_path / name, kind="test", meta={"k": 1}) as stage:
            stage.write_tensors("t.safetensors", {c: np.ones(3) for c in "qwertz"})
            stage.write_table("t.parquet", pa.table({"x": [1.5, 2.5]}))
            stage.write_json("j.json", dict.fromkeys("yxc" if name == "a" else "cxy", 0))
    for file in names(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_others_may_write_into_the_stage(tmp_path: Path) -> None:
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        (stage.path / "adapter").mkdir()
        (stage.path / "adapter" / "config.json").write_text("{}")
    opened = open_dir(tmp_path / "r", kind="test")
    assert opened.names == ("adapter/config.json",)
    assert opened.read_json("adapter/config.json") == {}


def test_importing_the_writer_imports_no_heavy_library() -> None:
    code = "import selectune.files, sys; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
    environ = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_block_leaves_the_older_result_and_no_temp_names(
    error: BaseException, tmp_path: Path
) -> None:
    put(tmp_path / "r", "old")

    def fail() -> None:
        with staged(tmp_path / "r", kind="test", meta={}) as stage:
            stage.write_text("text.txt", "new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == ["r"]
    assert open_dir(tmp_path / "r", kind="test").read_text("text.txt") == "old"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, {("a",): 1}], ids=repr)
def test_what_json_cannot_say_is_refused_and_nothing_is_left(value: object, tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"value\.json"),
        staged(tmp_path / "r", kind="test", meta={}) as stage,
    ):
        stage.write_json("value.json", value)
    with pytest.raises(DataError), staged(tmp_path / "r", kind="test", meta={"value": value}):
        pass
    assert names(tmp_path) == []


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"t\.safetensors"),
        staged(tmp_path / "r", kind="test", meta={}) as stage,
    ):
        stage.write_tensors("t.safetensors", {"x": np.array([None, "a"], dtype=object)})


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/../../b", "", ".", MANIFEST, "a\\b", "a//b"])
def test_a_name_that_leaves_the_stage_is_refused(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="cannot hold"),
        staged(tmp_path / "r", kind="test", meta={}) as stage,
    ):
        stage.write_bytes(name, b"x")
    assert names(tmp_path) == []


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with staged(tmp_path / "r", kind="test", meta={}) as stage:
        stage.write_bytes("a", b"x")
        with pytest.raises(StorageError, match="EEXIST"):
            stage.write_bytes("a", b"y")
    assert open_dir(tmp_path / "r", kind="test").read_bytes("a") == b"x"


def test_only_our_own_results_are_replaced(tmp_path: Path) -> None:
    put(tmp_path / "r", "old")
    put(tmp_path / "r", "new")
    assert open_dir(tmp_path / "r", kind="test").meta == {"text": "new"}
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"name": "a web app"}')
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "web", "file"):
        with pytest.raises(StorageError):
            put(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter-1.txt").read_text() == "years of work"
    assert names(tmp_path / "web") == [MANIFEST]
    assert (tmp_path / "file").read_text() == "text"


def test_a_damaged_result_can_be_replaced(tmp_path: Path) -> None:
    put(tmp_path / "r", "old")
    (tmp_path / "r" / MANIFEST).write_bytes(b"\0\0")
    put(tmp_path / "r", "new")
    assert open_dir(tmp_path / "r", kind="test").meta == {"text": "new"}


def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    left = tmp_path / ".r.staging-0123abcd"
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / ".other.staging-0123abcd").mkdir()
    put(tmp_path / "r")
    assert names(tmp_path) == [".other.staging-0123abcd", "r"]


@pytest.mark.parametrize("who", ["open_dir", "is_complete", "staged", "sweep"])
def test_a_promotion_cut_in_the_middle_is_undone(who: str, tmp_path: Path) -> None:
    put(tmp_path / "r", "old")
    os.rename(tmp_path / "r", tmp_path / ".r.replaced")
    if who == "open_dir":
        open_dir(tmp_path / "r", kind="test")
    elif who == "is_complete":
        assert is_complete(tmp_path / "r", kind="test")
    elif who == "sweep":
        assert sweep(tmp_path) == [tmp_path / ".r.replaced"]
    else:
        with pytest.raises(ValueError, match="x"), staged(tmp_path / "r", kind="test", meta={}):
            raise ValueError("x")
    assert names(tmp_path) == ["r"]
    assert open_dir(tmp_path / "r", kind="test").meta == {"text": "old"}


def test_what_is_left_of_a_removed_older_result_is_never_put_back(tmp_path: Path) -> None:
    (tmp_path / ".r.replaced").mkdir()
    (tmp_path / ".r.replaced" / "text.txt").write_text("the manifest went first")
    assert not is_complete(tmp_path / "r", kind="test")
    put(tmp_path / "r")
    assert names(tmp_path) == ["r"]


def test_a_reader_deletes_nothing(tmp_path: Path) -> None:
    put(tmp_path / "r", "new")
    put(tmp_path / ".r.replaced", "old")  # a writer may be just before its last fsync
    assert open_dir(tmp_path / "r", kind="test").meta == {"text": "new"}
    assert names(tmp_path) == [".r.replaced", "r"]


def test_a_reader_that_meets_the_gap_does_not_stop_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "r", "old")
    seen: list[str] = []

    def read_in_the_gap(point: KillPoint) -> None:
        if point is KillPoint.PROMOTE_OLD_MOVED and not seen:
            seen.append(open_dir(tmp_path / "r", kind="test").meta["text"])

    monkeypatch.setattr("selectune.files.stage.kill_point", read_in_the_gap)
    put(tmp_path / "r", "new")
    assert seen == ["old"]
    assert open_dir(tmp_path / "r", kind="test").meta == {"text": "new"}
    assert names(tmp_path) == ["r"]


def test_sweep_removes_temp_names_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "deep" / "r")
    kept = ["a.staging-0123abcd", ".r.staging-xyz", ".lock", ".r.replaced.txt"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / "deep" / ".r.staging-0123abcd").mkdir()
    (tmp_path / ".run.json.staging-89abcdef").write_text("half")
    (tmp_path / ".link.staging-89abcdef").symlink_to(tmp_path / "deep")
    put(tmp_path / "deep" / ".r.replaced", "older")
    assert len(sweep(tmp_path)) == 4
    assert names(tmp_path) == sorted([*kept, "deep"])
    assert names(tmp_path / "deep") == ["r"]
    assert open_dir(tmp_path / "deep" / "r", kind="test").meta == {"text": "new"}
    assert sweep(tmp_path / "missing") == []


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [no_space(), SafetensorError("Error: I/O error: No space left on device (os error 28)")],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_under_anothers_writer_is_explained(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="full"),
        staged(tmp_path / "r", kind="test", meta={}),
    ):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [FileNotFoundError("input"), SafetensorError("bad header")])
def test_other_errors_of_the_block_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), staged(tmp_path / "r", kind="test", meta={}):
        raise error


def test_an_output_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for write in (
        lambda: put(tmp_path / "file" / "r"),
        lambda: write_file(tmp_path / "file" / "x", b""),
        lambda: lock(tmp_path / "file").__enter__(),
    ):
        with pytest.raises(StorageError, match="ENOTDIR"):
            write()


def test_is_complete_tells_missing_and_unfinished_from_done(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "r", kind="test")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "text.txt").write_text("half")
    assert not is_complete(tmp_path / "r", kind="test")
    with pytest.raises(CorruptFileError, match="not a finished result"):
        open_dir(tmp_path / "r", kind="test")
    seal(tmp_path / "r", kind="test", meta={})
    assert is_complete(tmp_path / "r", kind="test")


def test_sealing_again_covers_what_changed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one")
    seal(tmp_path, kind="test", meta={"n": 1})
    (tmp_path / "text.txt").write_text("two")
    with pytest.raises(CorruptFileError):
        is_complete(tmp_path, kind="test")
    (tmp_path / f".{MANIFEST}.staging-0123abcd").write_text("of a killed seal")
    seal(tmp_path, kind="test", meta={"n": 2})
    assert open_dir(tmp_path, kind="test").read_text("text.txt") == "two"
    assert names(tmp_path) == [MANIFEST, "text.txt"]


def test_a_link_in_a_result_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="not a plain file"),
        staged(tmp_path / "r", kind="test", meta={}) as stage,
    ):
        (stage.path / "link").symlink_to("/etc/passwd")


def test_asking_for_a_file_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    put(tmp_path / "r")
    opened = open_dir(tmp_path / "r", kind="test")
    for name in ("txt.text", "../r/text.txt", MANIFEST):
        with pytest.raises(CorruptFileError, match=r"text\.txt"):
            opened.read_bytes(name)


def test_a_single_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run.json"
    write_file(file, b"old")
    (file.parent / ".run.json.staging-0123abcd").write_text("of a killed write")
    write_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert names(file.parent) == ["run.json"]
    assert sha256_file(file) == hashlib.sha256(b"new").hexdigest()


def test_a_second_writer_of_a_run_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        with pytest.raises(StorageError, match=f"process {os.getpid()} on") as caught:
            lock(tmp_path / "run").__enter__()
        assert caught.value.where == str(tmp_path / "run")
        with lock(tmp_path / "other"):
            pass
    with lock(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("selectune.files.rundir.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="without locks"), lock(tmp_path):
        pass


def test_too_little_space_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_500_000

    monkeypatch.setattr("selectune.files.rundir.shutil.disk_usage", lambda path: Usage)
    check_free_space(tmp_path / "not" / "yet", 1_500_000)
    with pytest.raises(StorageError, match=r"2\.5 GB are needed on disk, 1\.5 MB are free"):
        check_free_space(tmp_path / "not" / "yet", 2_500_000_000)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sent: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    passes.clear()
    return sent


def test_a_kill_point_strikes_at_the_wished_passing_only(
    signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_point(KillPoint.SCORES_DONE)
    assert signals == []
    monkeypatch.setenv(CRASH_AT, "scores.done:3:TERM")
    kill_point(KillPoint.SCORES_DONE)
    kill_point(KillPoint.REPORT_DONE)
    assert signals == []
    kill_point(KillPoint.SCORES_DONE)
    kill_point(KillPoint.SCORES_DONE)
    assert signals == [signal.SIGTERM]
    assert passes == {KillPoint.SCORES_DONE: 4, KillPoint.REPORT_DONE: 1}


@pytest.mark.parametrize(
    ("wish", "say"),
    [
        ("scores.dne:1:KILL", 'did you mean "scores.done"'),
        ("scores.done:0:KILL", "name:count:SIGNAL"),
        ("scores.done:1:HUP", "KILL, TERM, INT"),
        ("scores.done", "scores.done:1:KILL"),
    ],
)
def test_a_wish_for_no_kill_point_is_refused(
    wish: str, say: str, signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CRASH_AT, wish)
    with pytest.raises(ConfigError, match=say):
        kill_point(KillPoint.REPORT_DONE)
    assert signals == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[int], None] = os.fsync

    def files_only(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    put(tmp_path / "r")
    assert is_complete(tmp_path / "r", kind="test")
