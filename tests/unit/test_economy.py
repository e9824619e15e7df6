"""Cheaper gradient passes: what they read, what a recipe says of them, and the probe of `fast`."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from selectune.data import Tokens
from selectune.data.tokens import clipped
from selectune.errors import ConfigError
from selectune.pipeline import economy
from selectune.pipeline.economy import Economy
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import load_recipe
from small_run import small_recipe


class Notes(Silent):
    """A progress that keeps what is noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast")
    small_recipe(folder)
    return folder


def scored(folder: Path, out: str, *overrides: str) -> tuple[dict[str, float], dict, list[str]]:
    """Return each example's score, what the table says about itself, and the notes."""
    notes = Notes()
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    outcome = Run(recipe, out=folder / out, progress=notes).score()
    table = pq.read_table(folder / out / "scores.parquet")
    about = json.loads(table.schema.metadata[b"selectune"])["about"]
    by_id = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    return by_id, about, [*notes.said, *outcome.lines()]


def ranks(values: list[float]) -> list[float]:
    """Return mean ranks by counting: the slow way."""
    return [sum(o < v for o in values) + (values.count(v) - 1) / 2 for v in values]


@pytest.mark.parametrize("method", ["gist", "less"])
def test_fast_tells_the_correlation_of_a_probe_scored_both_ways(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(economy, "KNEE", {"layers": "top:1", "max_length": "50%"})
    monkeypatch.setattr(economy, "PROBE_EXAMPLES", 20)
    common = [f"score.method={method}", "warmup.schedule_epochs=1"]
    full, about, _ = scored(folder, f"{method}-full", *common)
    assert "fast" not in about
    pool = Run(load_recipe(folder / "recipe.yaml"), out=folder / "pool").ground.tokens.pool
    half = int(np.sort(pool.lengths)[(len(pool) + 1) // 2 - 1])
    by_hand = ["score.layers=top:1", f"score.max_length={half}"]
    cheap, _, _ = scored(folder, f"{method}-cheap", *common, *by_hand)
    fast, about, said = scored(folder, f"{method}-fast", *common, "score.fast=true")
    assert cheap == fast != full
    told = about["fast"]
    assert told["settings"] == {"layers": "top:1", "max_length": half}
    assert told["n_probe"] == len(set(told["ids"])) == 20
    both = [ranks([table[i] for i in told["ids"]]) for table in (full, fast)]
    assert told["spearman"] == pytest.approx(np.corrcoef(*both)[0, 1], abs=6e-5)
    line = f"Spearman {told['spearman']:.3f} with full scores on 20 random examples"
    assert sum(line in text for text in said) == 2  # before the pass, and at the end
    record = json.loads((folder / f"{method}-fast/run.json").read_text())
    assert record["steps"]["score"]["facts"]["about"]["fast"] == told
    again, _, _ = scored(folder, f"{method}-fast", *common, "score.fast=true")
    assert again == fast


@pytest.mark.parametrize(
    ("n", "targets", "max_length", "start"),
    [
        (10, [9], 10, 0),  # short enough
        (10, [8, 9], 4, 6),  # the prompt loses its beginning
        (10, [3, 4, 5, 6, 7, 8, 9], 4, 1),  # a long answer keeps half a window of prompt
        (10, [1, 2, 3], 4, 0),
        (10, [1, 9], 4, 0),  # a later turn may be lost
        (10, [9], 2, 8),
    ],
)
def test_a_window_holds_the_first_target_and_what_fits_around_it(
    n: int, targets: list[int], max_length: int, start: int
) -> None:
    is_target = np.isin(np.arange(n), targets)
    window = clipped(Tokens("x", np.arange(n), is_target), max_length)
    assert window.input_ids.tolist() == list(range(start, min(n, start + max_length)))
    kept = [t - start for t in targets if start < t < start + max_length]
    assert np.flatnonzero(window.is_target).tolist() == kept
    assert kept
    assert is_target.sum() == len(targets)  # the example itself is left alone


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["score.layers=8"], "score.layers"),
        (["score.layers=top:0"], "score.layers"),
        (["score.max_length=129"], "longer than any example"),
        (["score.max_length=100%"], "score.max_length"),
        (["score.max_length=0%"], "score.max_length"),
        (["score.method=length", "score.fast=true"], "score.fast would not be used"),
        (["score.method=perplexity", "score.layers=top:1"], "score.layers would not be used"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    folder: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(folder / "recipe.yaml", overrides)


def test_own_values_come_before_those_of_fast(folder: Path) -> None:
    own = ["score.layers=top:2", "score.precision=float32"]
    recipe = load_recipe(folder / "recipe.yaml", ["score.fast=true", *own])
    found = economy.economy_of(recipe.score, np.arange(1, 101))
    assert found == Economy("top:2", 90, "float32")
    assert economy.KNEE["max_length"] == "90%"


@pytest.mark.parametrize(
    ("share", "lengths", "n"),
    [
        ("90%", range(1, 11), 9),
        ("91%", range(1, 11), 10),
        ("99%", [5], 5),
        ("50%", [9, 3, 7, 7], 7),
        ("1%", [1, 30], 2),  # no shorter than a window can be
    ],
)
def test_a_share_of_examples_stays_whole(share: str, lengths: Sequence[int], n: int) -> None:
    found = economy.length_of(share, np.asarray(lengths))
    assert found == n
    assert sum(x <= found for x in lengths) >= int(share[:-1]) / 100 * len(lengths)
