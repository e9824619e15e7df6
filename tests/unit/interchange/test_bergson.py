"""Scores and indexes as bergson 2.5.1 lays them out, built here by hand from its documents."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selectune.cli import main
from selectune.data import read_examples
from selectune.errors import ConfigError, DataError, IncompatibleRunError, SelectuneError
from selectune.interchange.bergson import bergson_scores, bergson_similarity
from selectune.selection import Scores
from workspace import write_jsonl

POOL = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
IDS = tuple(example.id for example in read_examples(POOL))
TABLE = np.asarray([[0.5, -1.0], [0.25, 2.0], [-3.0, 0.0]])
SIZES = {"layers.0.q": 2, "layers.1.v": 3}
NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

MIXED = {
    "names": ["score_0", "written_0", "score_1", "written_1"],
    "formats": ["bfloat16", "bool", "float32", "bool"],
    "offsets": [0, 4, 8, 12],
    "itemsize": 16,
}


def as_stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Return numbers in their stored type; bfloat16 is the upper half of a float32."""
    if kind == "bfloat16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    return values.astype(NUMPY[kind])


def make_scores(folder: Path, table: np.ndarray = TABLE, kind: str = "float32") -> Path:
    folder.mkdir()
    n, m = table.shape
    size = np.dtype(NUMPY[kind]).itemsize
    pair = 1 << size.bit_length()  # score and flag, up to the next power of two
    names = [name for i in range(m) for name in (f"score_{i}", f"written_{i}")]
    offsets = [at for i in range(m) for at in (i * pair, i * pair + size)]
    shape: dict[str, Any] = {"names": names, "offsets": offsets, "itemsize": -(-m * pair // 8) * 8}
    rows = np.zeros(n, np.dtype({**shape, "formats": [NUMPY[kind], "?"] * m}))
    for i in range(m):
        rows[f"score_{i}"], rows[f"written_{i}"] = as_stored(table[:, i], kind), True
    (folder / "scores.bin").write_bytes(rows.tobytes())
    info = {"attribute_tokens": False, "num_items": n, "num_rows": n, "num_scores": m}
    info["dtype"] = {**shape, "formats": [kind, "bool"] * m}
    (folder / "info.json").write_text(json.dumps(info, indent=2))
    return folder


def make_index(
    folder: Path, rows: np.ndarray, kind: str = "float32", sizes: dict[str, int] = SIZES
) -> Path:
    folder.mkdir()
    (folder / "gradients.bin").write_bytes(as_stored(rows, kind).tobytes())
    info = {"attribute_tokens": False, "num_items": len(rows), "num_grads": len(rows)}
    told = {**info, "grad_sizes": sizes, "base_dtype": kind}
    (folder / "info.json").write_text(json.dumps(told, indent=2))
    return folder


def changed(folder: Path, **changes: object) -> Path:
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps({**info, **changes}))
    return folder


@pytest.mark.parametrize("kind", NUMPY)
def test_scores_come_by_id_with_every_query(kind: str, tmp_path: Path) -> None:
    found = bergson_scores(make_scores(tmp_path / "s", kind=kind), POOL, higher_is_better=True)
    assert found.ids == IDS
    assert found.score.tolist() == [0.5, 2.0, 0.0]  # exact in all three types
    assert found.columns["query:0"].tolist() == TABLE[:, 0].tolist()
    assert found.columns["query:1"].tolist() == TABLE[:, 1].tolist()


def test_the_mean_and_the_other_sign(tmp_path: Path) -> None:
    folder = make_scores(tmp_path / "s")
    found = bergson_scores(folder, POOL, aggregate="mean", higher_is_better=False)
    assert found.score.tolist() == [0.25, -1.125, 1.5]


def test_the_direction_is_bergsons_own_word_or_asked_for(tmp_path: Path) -> None:
    folder = make_scores(tmp_path / "s")
    with pytest.raises(ConfigError, match="nothing says whether high scores"):
        bergson_scores(folder, POOL)
    steps = [{"score": {"index_cfg": {}, "score_cfg": {"higher_is_better": False}}}]
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps, "metadata": {}}))
    assert bergson_scores(folder, POOL).score.tolist() == [1.0, -0.25, 3.0]
    assert bergson_scores(folder, POOL, higher_is_better=True).score.tolist() == [0.5, 2.0, 0.0]


def test_scores_that_were_never_written_are_refused(tmp_path: Path) -> None:
    folder = make_scores(tmp_path / "s", TABLE[:, :1])
    data = bytearray((folder / "scores.bin").read_bytes())
    data[8 + 4] = 0  # the flag of the second row
    (folder / "scores.bin").write_bytes(data)
    with pytest.raises(DataError, match="1 of 3 scores in s were never written"):
        bergson_scores(folder, POOL, higher_is_better=True)


def test_flags_that_are_no_flags_are_refused(tmp_path: Path) -> None:
    folder = make_scores(tmp_path / "s")
    info = folder / "info.json"
    info.write_text(info.read_text().replace('"bool"', '"float32"'))
    with pytest.raises(DataError, match="its row is described"):
        bergson_scores(folder, POOL, higher_is_better=True)


@pytest.mark.parametrize("kind", NUMPY)
def test_an_index_is_compared_with_a_query_as_a_plain_loop_does(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Small whole numbers: exact in every type.
    pool, query = rng.integers(-4, 5, (3, 5)) * 1.0, rng.integers(-4, 5, (2, 5)) * 1.0
    pool[2] = 0
    ours, theirs = make_index(tmp_path / "p", pool, kind), make_index(tmp_path / "q", query, kind)
    dots = [[sum(a * b for a, b in zip(x, q, strict=True)) for q in query] for x in pool]
    found = bergson_similarity(ours, theirs, POOL, similarity="dot", aggregate="mean")
    assert (found.ids, found.score.tolist()) == (IDS, [sum(row) / 2 for row in dots])
    cosine = bergson_similarity(ours, theirs, POOL)
    for k, q in enumerate(query):
        for n, x in enumerate(pool):
            length = (sum(a * a for a in x) * sum(b * b for b in q)) ** 0.5
            expected = dots[n][k] / length if length else 0.0
            assert cosine.columns[f"query:{k}"][n] == pytest.approx(expected, rel=1e-12)
    assert cosine.score[2] == 0.0


def test_modules_are_matched_by_name_and_old_indexes_are_read(tmp_path: Path) -> None:
    pool = np.asarray([[1, 2, 3, 4, 5], [0, 1, 0, 1, 0], [2, 0, 0, 0, 1]]) * 1.0
    ours = make_index(tmp_path / "p", pool)
    turned = {"layers.1.v": 3, "layers.0.q": 2}
    theirs = make_index(tmp_path / "q", pool[:1, [2, 3, 4, 0, 1]], sizes=turned)
    expected = [55.0, 6.0, 7.0]
    assert bergson_similarity(ours, theirs, POOL, similarity="dot").score.tolist() == expected
    formats = {"names": list(SIZES), "formats": ["(2,)<f4", "(3,)<f4"], "itemsize": 20}
    for key in ("base_dtype", "attribute_tokens", "num_items"):
        info = json.loads((ours / "info.json").read_text())
        (ours / "info.json").write_text(json.dumps({k: v for k, v in info.items() if k != key}))
    changed(ours, dtype=formats)
    assert bergson_similarity(ours, theirs, POOL, similarity="dot").score.tolist() == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attribute_tokens": True}, "a row per token"),
        ({"num_items": 4, "num_rows": 4}, "promises"),
        ({"num_items": -1}, "num_items is -1"),
        ({"num_scores": 2**70}, "described"),
        ({"num_scores": 1}, "described as"),
        ({"dtype": "O"}, "described as"),
        ({"dtype": {"names": ["score_0"], "formats": ["O"]}}, "described as"),
        ({"dtype": MIXED}, "described as"),
    ],
)
def test_odd_descriptions_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = changed(make_scores(tmp_path / "s"), **changes)
    with pytest.raises(DataError, match=words):
        bergson_scores(folder, POOL, higher_is_better=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attribute_tokens": True}, "a row per token"),
        ({"num_grads": 4}, "promises"),
        ({"num_grads": True}, "num_grads is True"),
        ({"num_grads": 3.0}, "num_grads is 3.0"),
        ({"grad_sizes": [2, 3]}, "grad_sizes are"),
        ({"grad_sizes": {}}, "grad_sizes are"),
        ({"grad_sizes": {"q": 2, "v": "3"}}, "grad_sizes are"),
        ({"grad_sizes": {"q": 2**70}}, "promises"),
        ({"base_dtype": "bool"}, "of the type 'bool'"),
        ({"base_dtype": ["float32"]}, "of the type .'float32'"),
        ({"base_dtype": {"float32": 1}}, "of the type"),
        ({"base_dtype": 4}, "of the type 4"),
        # As an older index, which tells its type in that of a row.
        ({"base_dtype": None}, "of the type"),
        ({"base_dtype": None, "dtype": "<f4"}, "of the type"),
        ({"base_dtype": None, "dtype": ["<f4"]}, "of the type"),
        ({"base_dtype": None, "dtype": {"formats": []}}, "of the type"),
        ({"base_dtype": None, "dtype": {"formats": "<f4"}}, "of the type"),
        ({"base_dtype": None, "dtype": {"formats": {"q": "<f4"}}}, "of the type"),
        ({"base_dtype": None, "dtype": {"formats": [["<f4"]]}}, "of the type"),
        ({"base_dtype": None, "dtype": {"formats": ["O"]}}, "of the type .*'O'"),
    ],
)
def test_odd_descriptions_of_an_index_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = changed(make_index(tmp_path / "p", np.ones((3, 5))), **changes)
    with pytest.raises(DataError, match=words):
        bergson_similarity(folder, folder, POOL)


@pytest.mark.parametrize("value", [None, True, -1, 0.5, 2**70, "<f4", ["<f4"], {"a": ["<f4"]}, {}])
def test_no_key_of_a_description_is_trusted(value: object, tmp_path: Path) -> None:
    scores, index = make_scores(tmp_path / "s"), make_index(tmp_path / "p", np.ones((3, 5)))

    def try_each(folder: Path, read: Callable[[], object]) -> None:
        info = json.loads((folder / "info.json").read_text())
        tried = [{**info, key: value} for key in info]
        for key, held in info.items():
            if isinstance(held, dict):
                tried += [{**info, key: {**held, inner: value}} for inner in held]
        for one in tried:
            (folder / "info.json").write_text(json.dumps(one))
            with suppress(DataError, IncompatibleRunError):
                read()

    try_each(scores, lambda: bergson_scores(scores, POOL, higher_is_better=True))
    try_each(index, lambda: bergson_similarity(index, index, POOL))


def test_what_cannot_be_joined_is_said(tmp_path: Path) -> None:
    def words(action: Callable[[], object]) -> str:
        with pytest.raises(SelectuneError) as found:
            action()
        return str(found.value)

    scores = make_scores(tmp_path / "s")
    short = words(lambda: bergson_scores(scores, POOL[:2], higher_is_better=True))
    assert "s has 3 rows, the pool 2" in short
    pool = make_index(tmp_path / "p", np.ones((3, 5)))
    other = make_index(tmp_path / "o", np.ones((1, 5)), sizes={"layers.0.q": 5})
    assert "indexes of other modules" in words(lambda: bergson_similarity(pool, other, POOL))
    query = make_index(tmp_path / "q", np.full((1, 5), np.nan))
    assert "is no number" in words(lambda: bergson_similarity(pool, query, POOL))
    for k, folder in enumerate((pool, query)):
        (folder / "processor_config.yaml").write_text(f"projection_dim: {16 + k}\n")
    assert "processed their gradients differently" in words(
        lambda: bergson_similarity(pool, query, POOL)
    )
    (pool / "processor_config.yaml").unlink()
    for pair in ((pool, query), (query, pool)):
        alone = words(lambda pair=pair: bergson_similarity(*pair, POOL))
        assert f"there is no processor_config.yaml in {pool}, and one in {query}" in alone
    (query / "processor_config.yaml").unlink()
    (pool / "gradients.bin").write_bytes(b"\x80\x04.")
    assert "the disk holds 3" in words(lambda: bergson_similarity(pool, query, POOL))
    assert "there is no info.json" in words(lambda: bergson_similarity(tmp_path, query, POOL))
    with pytest.raises(IncompatibleRunError):
        bergson_scores(scores, POOL[:1], higher_is_better=True)


def test_the_verb_hands_them_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pool.jsonl"), POOL)
    make_scores(tmp_path / "s")
    words = ["scores", "s", "--pool", "pool.jsonl", "--higher-is-better", "--to", "s.jsonl"]
    assert main(words) == 0
    assert "3 examples scored by bergson" in capfd.readouterr().out
    assert Scores.load("s.jsonl").ranking() == [IDS[1], IDS[0], IDS[2]]
    make_index(tmp_path / "p", np.ones((3, 5)))
    assert main(["scores", "p", "--pool", "pool.jsonl", "--query", "p", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["best"][IDS[0]] == pytest.approx(1.0)
    assert main(["scores", "p", "--pool", "pool.jsonl"]) == 2
    assert "--query" in capfd.readouterr().err
    assert main(["scores", "s"]) == 2
    assert "--pool" in capfd.readouterr().err
