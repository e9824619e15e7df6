import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectune.errors import SelectionError
from selectune.methods.rules import Budget, select
from selectune.registry import get, methods
from selectune.selection import Scores, Selection

N = 20
IDS = tuple(f"e{n:02d}" for n in range(N))
SOURCES = {i: "abc"[n % 3] for n, i in enumerate(IDS)}
LENGTHS = {i: 5 + n for n, i in enumerate(IDS)}


def scores(seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    columns = {"to:t0": rng.normal(size=N), "to:t1": rng.normal(size=N)}
    return Scores("gist", IDS, np.maximum(columns["to:t0"], columns["to:t1"]), columns)


def run(rule: str, budget: float | int | str, **options: object) -> Selection:
    return select(
        scores(), get("selection_rule", rule), Budget.of(budget, N),
        sources=SOURCES, n_tokens=LENGTHS, **options,
    )  # fmt: skip


@pytest.mark.parametrize("rule", [e.name for e in methods("selection_rule")])
@pytest.mark.parametrize("budget", [1, 7, 20, 0.5, 1.0])
def test_budgets_are_met_exactly(rule: str, budget: float) -> None:
    wanted = budget if isinstance(budget, int) else round(budget * N)
    assert len(run(rule, budget)) == wanted


def test_topk_takes_the_best() -> None:
    chosen = run("topk", 6)
    worst = min(scores()[i] for i in chosen.ids)
    assert all(scores()[i] <= worst for i in IDS if i not in chosen)
    assert list(chosen.ids) == scores().ranking()[:6]


def test_equal_scores_go_by_id_in_any_pool_order() -> None:
    flat = Scores("x", IDS, np.zeros(N))
    back = Scores("x", IDS[::-1], np.zeros(N))
    assert flat.ranking() == back.ranking() == sorted(IDS)


def test_round_robin_lets_targets_take_turns() -> None:
    chosen = run("round_robin", 4)
    table = scores()
    first, second = table.ranking("to:t0"), table.ranking("to:t1")
    expected: list[str] = []
    for k in range(4):
        turn = first if k % 2 == 0 else second
        expected.append(next(i for i in turn if i not in expected))
    assert list(chosen.ids) == expected


def taken_in_turn(table: Scores, columns: list[str], n: int) -> list[str]:
    """Return what columns take in turn, each the best that is left; ties go by id."""
    taken: list[str] = []
    for k in range(n):
        column = table.columns[columns[k % len(columns)]]
        left = [(-value, i) for i, value in zip(table.ids, column, strict=True) if i not in taken]
        taken.append(min(left)[1])
    return taken


@pytest.mark.parametrize(
    ("kinds", "turns"),
    [
        (("task:b", "task:a", "task:c"), ("task:a", "task:b", "task:c")),
        (("subtask:y", "subtask:x"), ("subtask:x", "subtask:y")),
        (("to:t1", "subtask:y", "subtask:x", "to:t0"), ("subtask:x", "subtask:y")),
        (("to:t0", "subtask:x", "subtask:y", "task:b", "task:a"), ("task:a", "task:b")),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_round_robin_goes_by_tasks_else_by_subtasks_else_by_targets(
    kinds: tuple[str, ...], turns: tuple[str, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Few values, so that there are ties; the column energy belongs to nobody.
    columns = {name: rng.integers(0, 6, size=N).astype(float) for name in (*kinds, "energy")}
    table = Scores("gist", IDS, rng.normal(size=N), columns)
    rule, kwargs = get("selection_rule", "round_robin"), {"sources": SOURCES, "n_tokens": LENGTHS}
    for n in (1, 7, N):
        chosen = select(table, rule, Budget(examples=n), **kwargs)
        assert list(chosen.ids) == taken_in_turn(table, list(turns), n)


def test_round_robin_on_one_target_equals_topk() -> None:
    rng = np.random.default_rng(3)
    column = rng.normal(size=N)
    table = Scores("gist", IDS, column, {"to:t0": column})
    kwargs = {"sources": SOURCES, "n_tokens": LENGTHS}
    budget = Budget(examples=9)
    a = select(table, get("selection_rule", "round_robin"), budget, **kwargs)
    b = select(table, get("selection_rule", "topk"), budget, **kwargs)
    assert a.ids == b.ids


@pytest.mark.parametrize(
    ("rule", "says"), [("round_robin", "cannot be taken in turn"), ("knn", "by neighbours")]
)
def test_scores_per_target_are_needed(rule: str, says: str) -> None:
    table = Scores("length", IDS, np.arange(N, dtype=float))
    with pytest.raises(SelectionError, match=says):
        select(
            table, get("selection_rule", rule), Budget(examples=2),
            sources=SOURCES, n_tokens=LENGTHS,
        )  # fmt: skip


@given(st.integers(0, 50), st.integers(1, N))
def test_knn_takes_the_nearest_of_every_target(seed: int, n: int) -> None:
    table = scores(seed)
    chosen = select(
        table, get("selection_rule", "knn"), Budget(examples=n), sources=SOURCES, n_tokens=LENGTHS
    )

    def union(k: int) -> set[str]:
        return {i for name in ("to:t0", "to:t1") for i in table.ranking(name)[:k]}

    k = next(k for k in range(N + 1) if len(union(k)) >= n)
    inner, ring = union(k - 1), union(k) - union(k - 1)
    assert inner <= set(chosen.ids) <= union(k)
    kept = [table[i] for i in ring if i in chosen]
    assert all(table[i] <= min(kept, default=np.inf) for i in ring if i not in chosen)


def test_knn_counts_an_example_that_targets_share_once() -> None:
    same = np.arange(N, dtype=float)
    table = Scores("gist", IDS, same, {"to:t0": same, "to:t1": same, "task:a": -same})
    chosen = select(
        table, get("selection_rule", "knn"), Budget(examples=3), sources=SOURCES, n_tokens=LENGTHS
    )
    assert list(chosen.ids) == ["e19", "e18", "e17"]


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.integers(1, N))
def test_quotas_are_kept_and_refused_only_where_they_cannot_be(bounds: list[float], n: int) -> None:
    least, most = int(np.ceil(bounds[0] * n - 1e-9)), int(np.floor(bounds[1] * n + 1e-9))
    n_a = sum(source == "a" for source in SOURCES.values())
    # So many of a that there are enough of a, and enough of the others for the rest.
    can_be = any(least <= k <= most and k <= n_a and n - k <= N - n_a for k in range(n + 1))
    quotas = {"a": (bounds[0], bounds[1])}
    if not can_be:
        with pytest.raises(SelectionError, match="could be chosen"):
            run("topk", n, quotas=quotas)
        return
    chosen = run("topk", n, quotas=quotas)
    assert len(chosen) == n
    assert least <= sum(SOURCES[i] == "a" for i in chosen.ids) <= most


def test_a_token_budget_is_not_exceeded() -> None:
    chosen = run("topk", "60 tokens")
    total = sum(LENGTHS[i] for i in chosen.ids)
    following = next(i for i in scores().ranking() if i not in chosen)
    assert total <= 60 < total + LENGTHS[following]


def test_every_example_left_out_has_a_reason() -> None:
    near = {"e03": "e07"}
    chosen = run(
        "topk", 5, dropped={"x1": "leak: equals t4"}, is_near=near.get, quotas={"b": (0.0, 0.2)}
    )
    assert set(chosen.reasons) == {*IDS, "x1"}
    assert "e03" not in chosen
    assert chosen.reasons["x1"] == "leak: equals t4"
    assert any("quota of b" in reason for reason in chosen.reasons.values())


@pytest.mark.parametrize(("budget", "words"), [(21, "smaller than"), (0.001, "at least one")])
def test_impossible_budgets_are_refused(budget: float, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        run("topk", budget)


def test_a_quota_of_an_unknown_source_is_refused() -> None:
    with pytest.raises(SelectionError, match='"d", which the pool does not have'):
        run("topk", 3, quotas={"d": (0.1, 0.5)})
