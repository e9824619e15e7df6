"""Damaged and malicious result folders: an error of ours, soon, and nothing outside is touched."""

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from selectune.errors import CorruptFileError, IncompatibleRunError, SelectuneError
from selectune.files import MANIFEST, is_complete, open_dir, staged

KIND = "hostile"
SCHEMA = pa.schema([("id", pa.string()), ("score", pa.float64())])


def make(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    with staged(path, kind=KIND, meta={"seed": seed, "identity": {"base": "tiny"}}) as stage:
        stage.write_json("facts.json", {"n": 3, "words": ["a", "b"], "seed": seed})
        table = pa.table({"id": ["a", "b", "c"], "score": rng.normal(size=3)}, schema=SCHEMA)
        stage.write_table("deep/scores.parquet", table)
        stage.write_tensors("w.safetensors", {"w": rng.normal(size=(2, 3)), "v": np.arange(4)})
    return path


def read_all(path: Path) -> None:
    opened = open_dir(path, kind=KIND)
    for name in opened.names:
        if name.endswith(".json"):
            opened.read_json(name)
        elif name.endswith(".parquet"):
            opened.read_table(name, schema=SCHEMA)
        elif name.endswith(".safetensors"):
            opened.read_tensors(name)
            opened.read_torch(name)
        else:
            opened.read_text(name)


def signed(path: Path, change: Callable[[dict[str, Any]], None] = lambda body: None) -> None:
    """Write a manifest over a folder as an attacker would: every checksum fits."""
    body: dict[str, Any] = {"format": f"selectune/{KIND}", "version": 1, "files": {}, "meta": {}}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.name != MANIFEST:
            data = file.read_bytes()
            facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            body["files"][file.relative_to(path).as_posix()] = facts
    change(body)
    text = json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"
    body["sha256"] = hashlib.sha256(text).hexdigest()
    (path / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


@pytest.fixture(autouse=True)
def _within_200_mb() -> Iterator[None]:
    # Warm: the parsers themselves are no part of what a file may cost.
    import safetensors.torch  # noqa: F401

    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
    before_bytes = memory_bytes("VmRSS")
    yield
    assert memory_bytes("VmHWM") - before_bytes < 200e6


def memory_bytes(field: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if field in s)
    return 1024 * int(line.split()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "result")


def test_the_folder_that_the_others_damage_is_sound(folder: Path) -> None:
    read_all(folder)
    signed(folder)
    read_all(folder)


FILES = ["facts.json", "deep/scores.parquet", "w.safetensors", MANIFEST]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_found(folder: Path, name: str) -> None:
    file = folder / name
    sound = file.read_bytes()
    k = max(1, len(sound) // 150)
    for position in range(0, len(sound), k):
        for flip in (0x01, 0x80):
            data = bytearray(sound)
            data[position] ^= flip
            file.write_bytes(data)
            # "version": 1 may become 3 or 9, and nobody can tell that from a newer file.
            with pytest.raises((CorruptFileError, IncompatibleRunError)) as caught:
                is_complete(folder, kind=KIND)
            if isinstance(caught.value, IncompatibleRunError):
                assert sound[position - 11 : position] == b'"version": '
    file.write_bytes(sound)
    read_all(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_found(folder: Path, name: str) -> None:
    file = folder / name
    sound = file.read_bytes()
    ends = {0, 1, 7, 8, 9, len(sound) - 1, *range(0, len(sound), max(1, len(sound) // 40))}
    for end in sorted(ends):
        file.write_bytes(sound[:end])
        with pytest.raises(CorruptFileError) as caught:
            open_dir(folder, kind=KIND)
        assert file.name in str(caught.value)
    file.write_bytes(sound + b"\n")
    with pytest.raises(CorruptFileError):
        open_dir(folder, kind=KIND)


def test_the_error_names_the_file_and_both_hashes(folder: Path) -> None:
    file = folder / "facts.json"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes().replace(b"3", b"4"))
    with pytest.raises(CorruptFileError) as caught:
        open_dir(folder, kind=KIND)
    assert caught.value.where == str(file)
    assert expected in caught.value.why
    assert hashlib.sha256(file.read_bytes()).hexdigest() in caught.value.why


def test_damage_after_opening_is_found_by_the_read(folder: Path) -> None:
    opened = open_dir(folder, kind=KIND)
    file = folder / "facts.json"
    file.write_bytes(file.read_bytes().replace(b"3", b"4"))
    with pytest.raises(CorruptFileError):
        opened.read_json("facts.json")


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_runs_are_found(tmp_path: Path, name: str) -> None:
    a, b = make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2)
    shutil.copy(b / name, a / name)
    with pytest.raises(CorruptFileError):
        open_dir(a, kind=KIND)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CorruptFileError):
        open_dir(folder, kind=KIND)


def test_a_result_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(CorruptFileError, match="selectune/other"):
        open_dir(folder, kind="other")


def test_a_newer_version_is_refused_with_both_numbers(folder: Path) -> None:
    signed(folder, lambda body: body.update(version=2, anything="new"))
    with pytest.raises(IncompatibleRunError, match="version 2, this selectune reads up to 1"):
        open_dir(folder, kind=KIND)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]])
def test_a_version_that_is_no_number_of_ours_is_refused(folder: Path, version: object) -> None:
    signed(folder, lambda body: body.update(version=version))
    with pytest.raises(CorruptFileError, match="version"):
        open_dir(folder, kind=KIND)


OUTSIDE = ["../outside.txt", "deep/../../outside.txt", "/etc/passwd", "./facts.json", "deep//x", ""]
OUTSIDE += ["a\0b", "..\\outside.txt", MANIFEST, ".facts.json.staging-00000000", "..", "x" * 2000]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_folder_is_refused_unopened(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "outside.txt").write_text("secret")
    facts = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    signed(folder, lambda body: body["files"].update({name: facts}))
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a: (opened.append(str(path)), real(path, *a))[1])
    with pytest.raises(CorruptFileError):
        open_dir(folder, kind=KIND)
    assert opened == [str(folder / MANIFEST)]


@pytest.mark.parametrize("what", ["file", "folder", "manifest", "pipe", "folder for a file"])
def test_a_file_that_is_not_a_plain_file_is_refused(folder: Path, what: str) -> None:
    elsewhere = folder.parent / "elsewhere"
    if what == "folder":
        shutil.move(folder / "deep", elsewhere)
        (folder / "deep").symlink_to(elsewhere)
    elif what == "pipe":
        (folder / "facts.json").unlink()
        os.mkfifo(folder / "facts.json")
    elif what == "folder for a file":
        (folder / "facts.json").unlink()
        (folder / "facts.json").mkdir()
    else:
        name = "facts.json" if what == "file" else MANIFEST
        shutil.move(folder / name, elsewhere)
        (folder / name).symlink_to(elsewhere)
    with pytest.raises(CorruptFileError, match=r"link|not a regular file"):
        open_dir(folder, kind=KIND)


DEEP = b"[" * 200_000 + b"]" * 200_000
MANIFESTS = {
    "empty": b"",
    "not JSON": b"hello",
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "null": b"null",
    "deep": DEEP,
    "deep in meta": b'{"format": "selectune/hostile", "version": 1, "meta": ' + DEEP + b"}",
    "NaN": b'{"format": NaN}',
    "no format": b"{}",
    "foreign": b'{"format": "other/hostile", "version": 1}',
    "a number of many digits": b'{"version": ' + b"9" * 100_000 + b"}",
    "too large": b" " * (17 << 20),
}


@pytest.mark.parametrize("case", sorted(MANIFESTS))
def test_a_manifest_that_is_none_is_refused(folder: Path, case: str) -> None:
    (folder / MANIFEST).write_bytes(MANIFESTS[case])
    with pytest.raises(CorruptFileError):
        open_dir(folder, kind=KIND)


def test_a_key_that_stands_twice_is_refused(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"version": 1', '"version": 1, "version": 1'))
    with pytest.raises(CorruptFileError, match="twice"):
        open_dir(folder, kind=KIND)


ENTRIES = [
    None,
    [],
    {"facts.json": None},
    {"facts.json": {}},
    {"facts.json": {"bytes": "3", "sha256": "0"}},
    {"facts.json": {"bytes": -1, "sha256": "0"}},
    {"facts.json": {"bytes": 3, "sha256": 0}},
    {"facts.json": {"bytes": 3, "sha256": "0", "more": 1}},
    {"facts.json": {"bytes": 2**70, "sha256": "0"}},
]


@pytest.mark.parametrize("files", ENTRIES, ids=repr)
def test_entries_of_another_shape_are_refused(folder: Path, files: object) -> None:
    signed(folder, lambda body: body.update(files=files))
    with pytest.raises(CorruptFileError):
        open_dir(folder, kind=KIND)


@pytest.mark.parametrize("meta", [None, [], "text"])
def test_meta_of_another_shape_is_refused(folder: Path, meta: object) -> None:
    signed(folder, lambda body: body.update(meta=meta))
    with pytest.raises(CorruptFileError):
        open_dir(folder, kind=KIND)


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2
TENSOR_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header of 2^63 bytes": tensor_file({}, length=2**63),
    "header of 2^64 - 1 bytes": tensor_file({}, length=2**64 - 1),
    "header over the limit": tensor_file({}, b" " * 10, length=200_000_000),
    "header past the end": tensor_file({}, length=3),
    "not JSON": tensor_file(b"hello!!!"),
    "not UTF-8": tensor_file(b"\xff" * 8),
    "a list": tensor_file([]),
    "deep": tensor_file(DEEP),
    "a tensor twice": tensor_file(
        TWICE[: len(TWICE) // 2] + TWICE[len(TWICE) // 2 + 1 : -1] + b"}", b"1234"
    ),
    "overlap": tensor_file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"x" * 12),
    "hole": tensor_file({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"x" * 12),
    "bytes left over": tensor_file({"a": entry(0, 4, [1])}, b"x" * 12),
    "data missing": tensor_file({"a": entry(0, 400, [100])}, b"x" * 4),
    "backwards": tensor_file({"a": entry(4, 0, [1])}, b"x" * 4),
    "shape of another size": tensor_file({"a": entry(0, 4, [5])}, b"x" * 4),
    "shape that overflows": tensor_file({"a": entry(0, 4, [2**62, 2**62])}, b"x" * 4),
    "negative shape": tensor_file({"a": entry(0, 4, [-1])}, b"x" * 4),
    "unknown type": tensor_file({"a": entry(0, 4, [1], "F99")}, b"x" * 4),
    "entry of text": tensor_file({"a": "text"}, b"x" * 4),
}


@pytest.mark.parametrize("reader", ["read_tensors", "read_torch"])
@pytest.mark.parametrize("case", sorted(TENSOR_FILES))
def test_a_tensor_file_that_is_unsound_is_refused_though_its_checksum_fits(
    folder: Path, case: str, reader: str
) -> None:
    (folder / "w.safetensors").write_bytes(TENSOR_FILES[case])
    signed(folder)
    opened = open_dir(folder, kind=KIND)
    read = opened.read_tensors if reader == "read_tensors" else opened.read_torch
    with pytest.raises(CorruptFileError, match="safetensors"):
        read("w.safetensors")


def test_tensors_under_other_names_than_expected_are_refused(folder: Path) -> None:
    opened = open_dir(folder, kind=KIND)
    assert set(opened.read_tensors("w.safetensors", expect={"v", "w"})) == {"v", "w"}
    for expect in ({"w"}, {"v", "w", "x"}):
        with pytest.raises(CorruptFileError, match="expects tensors"):
            opened.read_tensors("w.safetensors", expect=expect)


# A pickle that would make a file, written out by hand: os.mkdir(CANARY) when loaded.
def canary_pickle(path: Path) -> bytes:
    return f"cposix\nmkdir\n(V{path}\ntR.".encode()


_unpickled: list[str] = []
_listening = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _listening and event == "pickle.find_class":
        _unpickled.append(str(args))


sys.addaudithook(_audit)  # cannot be removed again, so it is deaf outside the test


@pytest.mark.parametrize("name", ["w.safetensors", "deep/scores.parquet", "facts.json"])
def test_a_pickle_under_another_name_is_refused_and_never_run(folder: Path, name: str) -> None:
    global _listening
    canary = folder.parent / "canary"
    (folder / name).write_bytes(canary_pickle(canary))
    signed(folder)
    _listening = True
    try:
        with pytest.raises(CorruptFileError):
            read_all(folder)
    finally:
        _listening = False
    assert not _unpickled
    assert not canary.exists()


def table_file(table: pa.Table, **options: Any) -> bytes:  # noqa: ANN401
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def table_files() -> dict[str, bytes]:
    sound = table_file(pa.table({"id": ["a"], "score": [1.0]}), use_dictionary=False)
    nothing = pa.table({"id": pa.nulls(10_000_000, pa.bool_())})
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 100_000])
    return {
        "empty": b"",
        "only the magic": b"PAR1PAR1",
        "no footer": sound[:-12],
        "footer longer than the file": sound[:-8] + struct.pack("<I", 2**31) + b"PAR1",
        "a column missing": table_file(pa.table({"id": ["a"]}), use_dictionary=False),
        "a column of another type": table_file(
            pa.table({"id": ["a"], "score": ["high"]}), use_dictionary=False
        ),
        "nulls without end": table_file(nothing, use_dictionary=False),
        "one long word a thousand times": table_file(pa.table({"id": words.dictionary_decode()})),
        "compressed a thousandfold": table_file(
            pa.table({"id": ["a" * 80_000_000], "score": [1.0]}),
            use_dictionary=False,
            compression="zstd",
            write_statistics=False,
        ),
    }


TABLE_CASES = [
    "empty",
    "only the magic",
    "no footer",
    "footer longer than the file",
    "a column missing",
    "a column of another type",
    "nulls without end",
    "one long word a thousand times",
    "compressed a thousandfold",
]


@pytest.mark.parametrize("case", TABLE_CASES)
def test_a_table_that_is_unsound_is_refused_though_its_checksum_fits(
    table_files: dict[str, bytes], folder: Path, case: str
) -> None:
    (folder / "deep/scores.parquet").write_bytes(table_files[case])
    signed(folder)
    with pytest.raises(CorruptFileError, match=r"scores\.parquet"):
        open_dir(folder, kind=KIND).read_table("deep/scores.parquet", schema=SCHEMA)


@pytest.mark.parametrize("data", [b'{"a": 1, "a": 2}', b"NaN", b"[Infinity]", DEEP, b"\xff", b""])
def test_json_that_is_unsound_is_refused_though_its_checksum_fits(
    folder: Path, data: bytes
) -> None:
    (folder / "facts.json").write_bytes(data)
    signed(folder)
    with pytest.raises(CorruptFileError, match=r"facts\.json"):
        open_dir(folder, kind=KIND).read_json("facts.json")


@settings(max_examples=60)
@given(data=st.data(), suffix=st.sampled_from(["json", "parquet", "safetensors"]))
def test_any_bytes_give_a_value_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    # Sound files with a piece replaced reach deeper into the parsers than noise does.
    folder = make(tmp_path_factory.mktemp("fuzz") / "result")
    file = next(folder.rglob(f"*.{suffix}"), folder / "facts.json")
    sound = file.read_bytes()
    start = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(start, min(len(sound), start + 20)))
    file.write_bytes(sound[:start] + data.draw(st.binary(max_size=20)) + sound[end:])
    signed(folder)
    try:
        read_all(folder)
    except SelectuneError:
        return
