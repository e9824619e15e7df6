"""What a report warns of: each warning where its threshold is passed, and none right before it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectune.data import Example, Tokens
from selectune.data.tokens import Tokenized
from selectune.pipeline import story
from selectune.pipeline.ground import Ground
from selectune.pipeline.prepare import Prepared, PreparedTokens
from selectune.progress import Silent
from selectune.recipe import load_recipe
from selectune.report import ReportData
from selectune.selection import Scores, Selection
from small_run import small_recipe

N = 40
IDS = tuple(f"e{n:02d}" for n in range(N))
CHOSEN = IDS[:10]
OFTEN = ["warmup.fraction=1.0"]  # 40 examples in batches of 4: ten steps
GIST = {"n_targets": 20, "rank": 10, "target_norms": [1.0] * 20}


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("story"))


def ground_of(
    path: Path, *changes: str, sources: Callable[[int], str], notes: tuple[str, ...]
) -> Ground:
    """Return the ground of a run over examples that grow longer by a token each."""
    recipe = load_recipe(path, [*OFTEN, *changes])
    ground = Ground(recipe, path.parent / "run", shared=None, tasks=None, progress=Silent())
    rows = tuple(
        Example(i, {"text": i}, sources(n), "", (), -1, f"pool.jsonl:{n}", {})
        for n, i in enumerate(IDS)
    )
    pool = tuple(Tokens(i, np.arange(n + 3), np.arange(n + 3) == n + 2) for n, i in enumerate(IDS))
    ground.prepared = Prepared(rows, rows, {}, {"colours": ()}, {}, notes)
    targets = {"colours": Tokenized((), 0, ())}
    ground.tokens = PreparedTokens(Tokenized(pool, 0, ()), targets, {})
    return ground


def reversed_until(k: int) -> np.ndarray:
    """Return scores whose Spearman correlation with length is 1 - 2 k(k^2 - 1) / n(n^2 - 1)."""
    ranks = np.concatenate([np.arange(k)[::-1], np.arange(k, N)])
    return (ranks + 1.0) / 100


def told(
    path: Path,
    *changes: str,
    method: str = "gist",
    about: Mapping[str, Any] = GIST,
    sources: Callable[[int], str] = lambda n: "ab"[n % 2],
    notes: tuple[str, ...] = ("form found",),
    score: np.ndarray | None = None,
    energy: np.ndarray | None = None,
    norm: np.ndarray | None = None,
) -> list[str]:
    """Return the warnings of a report in which all but what is given is as it should be."""
    scores = Scores(
        method,
        IDS,
        reversed_until(30) if score is None else score,
        {
            "energy": np.full(N, 0.5) if energy is None else energy,
            "norm": np.ones(N) if norm is None else norm,
        },
        about={"tasks": {"colours": dict(about)}},
    )
    ground = ground_of(path, *changes, sources=sources, notes=notes)
    selection = Selection(CHOSEN, frozenset(IDS))
    data: ReportData = story.tell(
        ground, scores=scores, selection=selection, arms=[], answers={}, verdict=None, tokens=[],
        run={},
    )  # fmt: skip
    return list(data.warnings)


def with_first(values: float, n: int, rest: float) -> np.ndarray:
    """Return one value for the first n examples, and another for the rest."""
    return np.where(np.arange(N) < n, values, rest)


def of_targets(**changes: object) -> dict[str, Any]:
    return {"about": {**GIST, **changes}}


def from_a(n: int) -> Callable[[int], str]:
    """Let the first n examples come from a, and the others from b."""
    return lambda k: "a" if k < n else "b"


def test_a_sound_selection_is_warned_of_nothing(recipe_path: Path) -> None:
    assert told(recipe_path) == []


# The first of each pair warns; the second lies on the other side of the threshold.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "length": (
        {"score": reversed_until(25)},
        {"score": reversed_until(26)},
        "Scores follow the length of the examples (Spearman +0.51)",
    ),
    "length, the short ones first": (
        {"score": 1 - reversed_until(25)},
        {"score": 1 - reversed_until(26)},
        "Scores follow the length of the examples (Spearman -0.51)",
    ),
    "few targets": (
        of_targets(n_targets=7, rank=6),
        of_targets(n_targets=8, rank=6),
        "Task colours has 7 target examples: fewer than 8 make a fragile space.",
    ),
    "nothing filtered": (
        of_targets(rank=18),
        of_targets(rank=17),
        "Task colours uses rank 18 of 20 targets: nothing is filtered.",
    ),
    "near a target": (
        of_targets(near_targets=[["e01", "t0", 0.9999]]),
        of_targets(near_targets=[]),
        "Gradients of the pool nearly equal those of targets of colours (cosine above 0.999), as "
        "a copy's would: e01 to t0.",
    ),
    "near many targets": (
        of_targets(near_targets=[[f"e{n}", f"t{n}", 0.9999] for n in range(9)]),
        of_targets(near_targets=[]),
        "Gradients of the pool nearly equal those of targets of colours (cosine above 0.999), as "
        "a copy's would: e0 to t0, e1 to t1, e2 to t2, e3 to t3, e4 to t4 and 4 more.",
    ),
    "few directions": (
        of_targets(rank=3),
        of_targets(rank=4),
        "Task colours has rank 3: a cosine in so few dimensions saturates.",
    ),
    "long targets": (  # two of twenty hold 2 * 9 of 36, which is no more than half
        of_targets(target_norms=[1.0] * 18 + [3.01, 3.01]),
        of_targets(target_norms=[1.0] * 18 + [3.0, 3.0]),
        "A tenth of the targets of colours hold more than half of the gradient energy",
    ),
    "one long target of few": (
        of_targets(target_norms=[1.0] * 7 + [3.0]),
        of_targets(target_norms=[1.0] * 6 + [3.0]),  # of so few it says nothing
        "A tenth of the targets of colours hold more than half of the gradient energy",
    ),
    "little energy": (
        {"energy": with_first(0.09, 10, 0.5)},
        {"energy": with_first(0.1, 10, 0.01)},
        "The target space holds 9% of the median chosen gradient",
    ),
    "learnt already": (
        {"norm": with_first(0.0099, 2, 1.0)},
        {"norm": with_first(0.01, 2, 1.0)},
        "2 chosen examples have gradients below 1 % of the median: learnt already.",
    ),
    "pointing away": (
        {"score": np.concatenate([[0.0, -0.1], reversed_until(30)[2:]])},
        {"score": np.concatenate([reversed_until(30)[:-1], [-1.0]])},  # one that was not chosen
        "2 chosen examples point away from the target: the budget is too large.",
    ),
    "one source": (
        {"sources": from_a(10)},
        {"sources": from_a(9)},
        "100% of the selection come from a.",
    ),
    "no warm-up": (
        {"changes": ["warmup.epochs=0"]},
        {},
        "The adapter was never warmed up: scores rest on lora_B alone.",
    ),
    "short warm-up": (
        {"changes": ["warmup.fraction=0.7"]},
        {"changes": ["warmup.fraction=0.8"]},
        "The warm-up had 7 steps: raise warmup.epochs or warmup.fraction.",
    ),
    "one step of warm-up": (
        {"changes": ["warmup.fraction=0.1"]},
        {"changes": ["warmup.fraction=0.4", "warmup.epochs=2"]},
        "The warm-up had 1 step: raise warmup.epochs or warmup.fraction.",
    ),
    "notes": (
        {"notes": ("form found", "3 rows left out")},
        {"notes": ("3 rows left out",)},  # the first one tells the form
        "3 rows left out",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_warning_stands_where_its_threshold_is_passed_and_not_before(
    recipe_path: Path, name: str
) -> None:
    beyond, before, says = CASES[name]

    def warnings(case: dict[str, Any]) -> list[str]:
        given = dict(case)
        return told(recipe_path, *given.pop("changes", ()), **given)

    [warning] = warnings(beyond)
    assert warning.startswith(says)
    assert warnings(before) == []


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("length", {"score": reversed_until(0)}),  # as it is meant
        ("perplexity", {"score": reversed_until(30) - 10}),  # its scores have no direction
        ("perplexity", {"changes": ["warmup.epochs=0"]}),  # it reads no gradients
        ("grad_cosine", {"about": {"n_targets": 20}}),  # it has no rank
        ("gist", {"sources": lambda _: "a"}),  # there is no other source
    ],
)
def test_what_a_method_or_pool_cannot_help_is_not_warned_of(
    recipe_path: Path, method: str, given: dict[str, Any]
) -> None:
    case = dict(given)
    assert told(recipe_path, *case.pop("changes", ()), method=method, **case) == []


def test_each_task_is_warned_of_by_its_name(recipe_path: Path) -> None:
    ground = ground_of(recipe_path, sources=lambda n: "ab"[n % 2], notes=("form found",))
    about = {"tasks": {"good": GIST, "bad": {**GIST, "rank": 2}}}
    columns = {"energy": np.full(N, 0.5), "norm": np.ones(N)}
    scores = Scores("gist", IDS, reversed_until(30), columns, about=about)
    data = story.tell(
        ground, scores=scores, selection=Selection(CHOSEN, frozenset(IDS)), arms=[], answers={},
        verdict=None, tokens=[], run={},
    )  # fmt: skip
    assert [w.split(":")[0] for w in data.warnings] == ["Task bad has rank 2"]
