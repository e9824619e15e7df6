"""From scores to a selection: an order, then quotas, near duplicates and the budget.

Rules only order examples; what fills the budget is written once. Every example that is left out
carries its reason.

Paper  Top-k: all of them. Round robin over targets: "Large-Scale Data Selection for Instruction
  Tuning", arXiv 2503.01807. Neighbours of each target: TSDS, "Data Selection for Task-Specific
  Model Finetuning", arXiv 2410.11303, its KNN-Uniform without the search of k. Quotas and
  near-duplicate drop: ours.
Cost   Seconds; near duplicates need the 5-grams of those candidates that reach the budget.
Fails  Top-k with several tasks: the one with the largest scores takes all; use round_robin.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from selectune.errors import SelectionError, nearest
from selectune.registry import Entry, selection_rule
from selectune.selection import Scores, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """A rule without options."""


@selection_rule("topk", options=NoOptions)
def topk(scores: Scores) -> list[str]:
    """Best first; ties go by id."""
    return scores.ranking()


def target_columns(scores: Scores) -> list[str]:
    """Return the columns with a score per task, else per subtask, else per target, else none."""
    for prefix in ("task:", "subtask:", "to:"):
        if columns := sorted(name for name in scores.columns if name.startswith(prefix)):
            return columns
    return []


@selection_rule("round_robin", options=NoOptions)
def round_robin(scores: Scores) -> list[str]:
    """Targets in turn take their best example that is left: tasks, else subtasks, else targets.

    Raises:
        SelectionError: the scores say nothing per target.
    """
    columns = _wanted(target_columns(scores), scores, "taken in turn", "round_robin")
    turns = [iter(scores.ranking(name)) for name in columns]
    order: dict[str, None] = {}
    while len(order) < len(scores):
        for turn in turns:
            best = next((i for i in turn if i not in order), None)
            if best is not None:
                order[best] = None
    return list(order)


@selection_rule("knn", options=NoOptions)
def knn(scores: Scores) -> list[str]:
    """The k nearest examples of every single target, with k as small as the budget takes.

    An example that several targets share counts once and is not replaced, unlike under round_robin.
    Of those that the largest k adds, the best scores come first.

    Raises:
        SelectionError: the scores say nothing per target.
    """
    single = sorted(name for name in scores.columns if name.startswith("to:"))
    columns = _wanted(single or target_columns(scores), scores, "ranked by neighbours", "knn")
    nearest_at = dict.fromkeys(scores.ids, len(scores))
    for name in columns:
        for k, example_id in enumerate(scores.ranking(name)):
            nearest_at[example_id] = min(nearest_at[example_id], k)
    return sorted(scores.ranking(), key=nearest_at.__getitem__)


def _wanted(columns: list[str], scores: Scores, doing: str, rule: str) -> list[str]:
    """Return the columns that a rule reads; refuse where there are none."""
    if not columns:
        raise SelectionError(
            f"scores of {scores.method} cannot be {doing}",
            where="select.rule",
            why=f"{rule} needs a score per target, and {scores.method} compares with none",
            do="use select.rule=topk",
        )
    return columns


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to keep: a number of examples, or of tokens."""

    examples: int | None = None
    tokens: int | None = None

    @classmethod
    def of(
        cls, asked: float | int | str, n_pool: int, n_pool_tokens: int | None = None
    ) -> "Budget":
        """Return the budget that a recipe's 0.05, 500 or "20000 tokens" means for a pool.

        Args:
            asked: as the recipe says it.
            n_pool: candidates.
            n_pool_tokens: tokens of all of them, where that is known.

        Raises:
            SelectionError: it is larger than the pool, or rounds to nothing.
        """
        if isinstance(asked, str):
            tokens = int(asked.split()[0])
            if n_pool_tokens is not None and tokens > n_pool_tokens:
                raise SelectionError(
                    f"a budget of {asked}, and the pool has {n_pool_tokens}",
                    where="select.budget",
                    why="the pool is smaller than the budget",
                    do=f'use at most "{n_pool_tokens} tokens", or a larger pool',
                )
            return cls(tokens=tokens)
        n = round(asked * n_pool) if isinstance(asked, float) else asked
        if n < 1 or n > n_pool:
            raise SelectionError(
                f"a budget of {asked} is {n} of {n_pool} examples",
                where="select.budget",
                why="a selection needs at least one example"
                if n < 1
                else "the pool is smaller than the budget",
                do="raise select.budget" if n < 1 else f"use at most {n_pool}, or a larger pool",
            )
        return cls(examples=n)


Quotas = Mapping[str, tuple[float, float]]


def select(
    scores: Scores,
    rule: Entry,
    budget: Budget,
    *,
    sources: Mapping[str, str],
    n_tokens: Mapping[str, int],
    quotas: Quotas | None = None,
    dropped: Mapping[str, str] | None = None,
    is_near: Callable[[str], str | None] | None = None,
    fingerprint: str = "",
) -> Selection:
    """Fill the budget in the rule's order.

    Args:
        scores: of the candidates.
        rule: a registered selection rule.
        budget: how much to keep.
        sources: each candidate's source, for quotas.
        n_tokens: each candidate's length, for token budgets.
        quotas: source -> least and most share of the selection.
        dropped: examples that were no candidates, with the reason.
        is_near: returns the chosen example that a candidate nearly equals, else None; a candidate
            it lets pass counts as chosen for later calls.
        fingerprint: stored with the selection.

    Raises:
        SelectionError: the candidates cannot fill the budget under the quotas.
    """
    quotas = quotas or {}
    for source in quotas:
        if source not in set(sources.values()):
            raise SelectionError(
                f'a quota names the source "{source}", which the pool does not have',
                where="select.quotas",
                why=f"its sources are {', '.join(sorted(set(sources.values())))}",
                do=nearest(source, set(sources.values())),
            )
    reasons = dict(dropped or {})
    place = {example_id: k for k, example_id in enumerate(scores.ranking(), start=1)}
    fill = _Fill(budget, quotas, sources, n_tokens)
    score_of = dict(zip(scores.ids, scores.score.tolist(), strict=True))
    for example_id in rule.function(scores):
        label = f"rank {place[example_id]}, score {score_of[example_id]:.4f}"
        if fill.is_full:
            reasons[example_id] = f"{label}: past the budget"
        elif not fill.allows(example_id):
            reasons[example_id] = f"{label}: quota of {sources[example_id]}"
        elif is_near is not None and (other := is_near(example_id)) is not None:
            reasons[example_id] = f"{label}: nearly equal to {other}"
        elif fill.take(example_id):
            reasons[example_id] = label
        else:
            reasons[example_id] = f"{label}: past the budget"
    fill.check(len(scores))
    about = {
        "method": scores.method,
        "rule": rule.name,
        "n_candidates": len(scores),
        "n_dropped": len(dropped or {}),
    }
    universe: frozenset[str] = frozenset([*scores.ids, *(dropped or {})])
    return Selection(tuple(fill.chosen), universe, reasons, fingerprint, about)


class _Fill:
    """The state of filling one budget under quotas."""

    def __init__(
        self,
        budget: Budget,
        quotas: Quotas,
        sources: Mapping[str, str],
        n_tokens: Mapping[str, int],
    ) -> None:
        self.chosen: list[str] = []
        self.is_full = False
        self._budget, self._sources, self._n_tokens = budget, sources, n_tokens
        self._tokens = 0
        if quotas and budget.examples is None:
            raise SelectionError(
                "quotas need a budget in examples",
                where="select.quotas",
                why="a share of a selection of unknown size is unknown",
                do="give select.budget as a share or a count",
            )
        n = budget.examples or 0
        self._least = {s: math.ceil(low * n - 1e-9) for s, (low, _) in quotas.items()}
        self._most = {s: math.floor(high * n + 1e-9) for s, (_, high) in quotas.items()}
        self._count = dict.fromkeys(set(sources.values()), 0)

    def _owed(self) -> Iterator[tuple[str, int]]:
        for source, least in self._least.items():
            if self._count[source] < least:
                yield source, least - self._count[source]

    def allows(self, example_id: str) -> bool:
        """Return whether quotas leave room: below the maximum, and enough left for the minima."""
        source = self._sources[example_id]
        if self._count[source] >= self._most.get(source, len(self._sources)):
            return False
        owed = dict(self._owed())
        left = (self._budget.examples or 0) - len(self.chosen)
        return not owed or source in owed or left > sum(owed.values())

    def take(self, example_id: str) -> bool:
        tokens = self._tokens + self._n_tokens[example_id]
        if self._budget.tokens is not None and tokens > self._budget.tokens:
            self.is_full = True
            return False
        self.chosen.append(example_id)
        self._count[self._sources[example_id]] += 1
        self._tokens = tokens
        self.is_full = len(self.chosen) == self._budget.examples
        return True

    def check(self, n_candidates: int) -> None:
        """Raise where the candidates ran out before the budget did."""
        wanted = self._budget.examples
        if not self.chosen or (wanted is not None and len(self.chosen) < wanted):
            raise SelectionError(
                f"only {len(self.chosen)} of {n_candidates} candidates could be chosen, "
                f"{wanted or 'at least 1'} are wanted",
                where="select",
                why="the pool is smaller than the budget after leakage, duplicates and quotas",
                do="lower select.budget, widen select.quotas, or give a larger pool",
            )
