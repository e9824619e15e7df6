from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from selectune.errors import CorruptFileError, IncompatibleRunError, SelectionError
from selectune.selection import Scores, Selection

ALL = frozenset("abcdef")


@dataclass(frozen=True)
class Item:
    id: str


def pick(ids: str) -> Selection:
    return Selection(tuple(ids), ALL, {i: f"because {i}" for i in ids}, "base0")


def test_selections_combine_as_sets_do() -> None:
    assert (pick("cab") & pick("bcd")).ids == ("c", "b")
    assert (pick("ca") | pick("ad")).ids == ("c", "a", "d")
    assert (~pick("cab")).ids == ("d", "e", "f")
    assert (~~pick("abc")).ids == ("a", "b", "c")


def test_a_selection_is_a_value() -> None:
    assert pick("ab") == pick("ab")
    assert pick("ab") != pick("ba")
    assert "a" in pick("ab")
    assert repr(pick("ab")) == "Selection(2 of 6 examples)"


def test_other_pools_are_not_mixed() -> None:
    with pytest.raises(SelectionError, match="different pools"):
        pick("ab") & Selection(("a",), frozenset("ab"))


def test_unknown_and_repeated_ids_are_refused() -> None:
    with pytest.raises(SelectionError, match="not in the pool"):
        Selection(("z",), ALL)
    with pytest.raises(SelectionError, match="twice"):
        Selection(("a", "a"), ALL)


def test_examples_come_best_first_whatever_the_pool_order() -> None:
    pool = [Item(i) for i in "fedcba"]
    assert [e.id for e in pick("cab").examples(pool)] == ["c", "a", "b"]
    with pytest.raises(SelectionError, match="1 of 3 chosen examples are not in this pool"):
        pick("cab").examples(pool[:3] + pool[4:])


def test_saving_and_loading_gives_the_same_selection(tmp_path: Path) -> None:
    pick("cab").save_pretrained(tmp_path / "s")
    loaded = Selection.from_pretrained(tmp_path / "s", fingerprint="base0")
    assert loaded == pick("cab")
    assert loaded.reasons == pick("cab").reasons


def test_another_base_and_a_flipped_byte_are_refused(tmp_path: Path) -> None:
    pick("cab").save_pretrained(tmp_path / "s")
    with pytest.raises(IncompatibleRunError, match="another base"):
        Selection.from_pretrained(tmp_path / "s", fingerprint="base1")
    file = tmp_path / "s" / "selection.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError):
        Selection.from_pretrained(tmp_path / "s")


def test_scores_survive_a_table() -> None:
    scores = Scores("gist", ("a", "b"), np.array([0.5, 1.5]), {"energy": np.array([0.1, 0.2])},
                    ("t1", "t0"), {"rank": 3})  # fmt: skip
    back = Scores.from_table(scores.to_table(), "gist", {"rank": 3})
    assert back.ids == scores.ids
    assert back.best_target == scores.best_target
    assert back.about == scores.about
    np.testing.assert_array_equal(back.columns["energy"], scores.columns["energy"])


@pytest.mark.parametrize(
    ("ids", "score", "words"),
    [
        (("a", "b"), [1.0], "1 numbers for 2 examples"),
        (("a", "a"), [1.0, 2.0], "twice"),
        (("a", "b"), [1.0, float("nan")], "1 scores of x are not a number"),
    ],
)
def test_unsound_scores_are_refused(ids: tuple[str, ...], score: list[float], words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        Scores("x", ids, np.asarray(score))


def test_an_unknown_id_offers_the_nearest() -> None:
    scores = Scores("x", ("alpha", "beta"), np.array([1.0, 2.0]))
    with pytest.raises(SelectionError, match="did you mean"):
        scores["alpa"]
