"""Choose anew, while a model trains, what it goes on training on.

    train on the selection -> step s: gradients of the targets and of a shortlist at the model as it
    is now -> a new selection -> go on, optimizer and learning rate as if nothing had happened

The shortlist is the first selection and the next best examples by the first scores, four times as
many as the selection holds. A training is cut into phases; each is a training of its own that ends
in a checkpoint, from which the next goes on with other examples. The order of an epoch is drawn
over the examples of the phase, and entered where the phase begins.

Ours, after the fourth limitation of GIST: one static space for the whole training.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selectune.data import Tokens
from selectune.errors import SelectionError
from selectune.files import is_complete, open_dir, staged
from selectune.methods.rules import Budget
from selectune.models import Base
from selectune.pipeline.ground import Ground, digest
from selectune.pipeline.scoring import score_shortlist
from selectune.recipe import TuneSection
from selectune.recipe.methods import FULL, PLAIN
from selectune.registry import get
from selectune.selection import Scores, Selection
from selectune.training import TuneResult
from selectune.training.checkpoints import KIND as CHECKPOINT
from selectune.training.chosen import fingerprint_of
from selectune.training.tune import KIND as ADAPTER
from selectune.training.tune import Phase

KIND = "refresh"
SHORTLIST = 4  # times the selection
# Trains on examples in a folder, for one phase, and returns what was trained.
Train = Callable[[list[Tokens], Path, Phase | None], tuple[Base, nn.Module, TuneResult]]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What a selection was chosen by, and is chosen by again.

    Attributes:
        scores: the first ones.
        options: of their scorer.
        quotas: in place of the recipe's; None for the recipe's.
    """

    scores: Scores
    options: Mapping[str, Any]
    quotas: Mapping[str, tuple[float, float]] | None = None

    def shortlist(self, selection: Selection) -> list[str]:
        """Return the first selection and the next best, four times as many."""
        chosen = set(selection.ids)
        rest = [i for i in self.scores.ranking() if i not in chosen]
        return [*selection.ids, *rest[: (SHORTLIST - 1) * len(chosen)]]


@dataclass(frozen=True, slots=True)
class Refresh:
    """One new selection.

    Attributes:
        step: after which it was made.
        n_new: examples that the selection before did not hold.
        n: of the selection.
        n_shortlist: examples that were scored.
    """

    step: int
    n_new: int
    n: int
    n_shortlist: int


def reads_the_model(method: str) -> bool:
    """Return whether a scorer looks at gradients, which change while a model trains."""
    return "gradients" in get("data_scorer", method).needs


def refresh_steps(every: int | float, n_steps: int) -> list[int]:
    """Return after which steps a selection is made anew.

    Args:
        every: so many steps, or a share of the training.
        n_steps: of the training.
    """
    if isinstance(every, int):
        return list(range(every, n_steps, every))
    found = {round(k * every * n_steps) for k in range(1, math.ceil(1 / every))}
    return sorted(step for step in found if 0 < step < n_steps)


def n_rescored(tuning: TuneSection, method: str, n_chosen: int, n_pool: int) -> int:
    """Return how many examples a training scores again, over all its new selections.

    Args:
        tuning: how it trains.
        method: scorer of its selection.
        n_chosen: examples that it trains on.
        n_pool: candidates.
    """
    if tuning.reselect_every is None or method in (FULL, PLAIN) or not reads_the_model(method):
        return 0
    n_steps = tuning.epochs * -(-n_chosen // (tuning.batch_size * tuning.accumulation))
    return len(refresh_steps(tuning.reselect_every, n_steps)) * min(SHORTLIST * n_chosen, n_pool)


class Phases:
    """The phases of one training.

    Args:
        ground: of the run.
        folder: where phases and refreshes lie; the phases go when the training is done.
        made_from: fingerprint of all that decides the training.
        source: of its selections.
        first: the first one.
        ends: after which steps the others are made.
        name: of the arm.
    """

    def __init__(
        self,
        ground: Ground,
        folder: Path,
        *,
        made_from: str,
        source: Source,
        first: Selection,
        ends: Sequence[int],
        name: str,
    ) -> None:
        self.ground, self.folder, self.made_from = ground, folder, made_from
        self.source, self.ends, self.name = source, ends, name
        shortlist = set(source.shortlist(first))
        self._shortlist = [t for t in ground.tokens.pool if t.id in shortlist]
        self._chosen = [first.ids]

    def run(self, train: Train, final: Path) -> tuple[TuneResult, list[Refresh]]:
        """Train all phases, resume, or read what is there.

        Args:
            train: trains one phase.
            final: where the last one leaves its result, which is that of the whole.

        Raises:
            SelectionError: the scorer cannot say anything at the model of some step.
        """
        refreshes = [self._refreshed(k, train) for k in range(len(self.ends))]
        if not self.ends:
            return train(self._items(0), final, None)[2], []
        last = len(self.ends) - 1
        start = self._checkpoint(last)
        if not is_complete(final / "adapter", ADAPTER):
            start = self._reached(last, train)
        result = train(self._items(-1), final, Phase(start=start, behind=self._behind(last + 1)))[2]
        for k in range(len(self.ends)):
            shutil.rmtree(self._path(k), ignore_errors=True)
        return result, refreshes

    def _items(self, k: int) -> list[Tokens]:
        chosen = set(self._chosen[k])
        return [t for t in self.ground.tokens.pool if t.id in chosen]

    def _behind(self, k: int) -> tuple[str, ...]:
        return tuple(f"{self.ends[j]}:{fingerprint_of(self._items(j))}" for j in range(k))

    def _path(self, k: int) -> Path:
        return self.folder / f"phase-{k + 1}"

    def _checkpoint(self, k: int) -> Path:
        return self._path(k) / f"checkpoint-{self.ends[k]}"

    def _reached(self, k: int, train: Train) -> Path:
        """Return the checkpoint at the end of a phase; train where it is not there."""
        path = self._checkpoint(k)
        if not is_complete(path, CHECKPOINT):
            self._phase(k, train)
        return path

    def _phase(self, k: int, train: Train) -> tuple[Base, nn.Module]:
        if is_complete(self._path(k) / "adapter", ADAPTER) and not self._checkpoint(k).exists():
            shutil.rmtree(self._path(k))  # half of it was removed: it leads nowhere
        start = None if k == 0 else self._reached(k - 1, train)
        phase = Phase(end=self.ends[k], start=start, behind=self._behind(k))
        base, model, _ = train(self._items(k), self._path(k), phase)
        return base, model

    def _refreshed(self, k: int, train: Train) -> Refresh:
        """Make selection k + 1, or read it."""
        path, step = self.folder / f"refresh-{k + 1}", f"refresh {k + 1} {self.name}"
        before = self._chosen[k]
        made_from = digest({"of": self.made_from, "k": k, "before": sorted(before)})
        if self.ground.is_done(path, KIND, made_from):
            self.ground.recall(step, path)
        else:
            base, model = self._phase(k, train)
            with self.ground.charge(step, path):
                self._choose(base, model, path, made_from)
        opened = open_dir(path, kind=KIND)
        ids: list[str] = opened.read_json("chosen.json")
        self._chosen.append(tuple(ids))
        n_new = len(set(ids) - set(before))
        return Refresh(self.ends[k], n_new, len(ids), len(self._shortlist))

    def _choose(self, base: Base, model: nn.Module, path: Path, made_from: str) -> None:
        # It imports this file.
        from selectune.pipeline.arms import choose

        store = path.with_name(f"{path.name}-store")
        scores = score_shortlist(
            self.ground,
            self.source.scores.method,
            dict(self.source.options),
            base=base,
            model=model,
            tokens=self._shortlist,
            path=store,
            made_from=made_from,
        )
        n = len(self._chosen[0])
        chosen = choose(
            self.ground,
            scores,
            made_from,
            quotas=self.source.quotas,
            budget=Budget(examples=n),
        )
        if len(chosen) != n:
            raise SelectionError(
                f"a new selection has {len(chosen)} examples, the first has {n}",
                where="tune.reselect_every",
                why="a training of one schedule needs as many steps in each epoch",
                do="use another select.rule, or remove tune.reselect_every",
            )
        with staged(path, kind=KIND, meta={"fingerprint": made_from}) as stage:
            stage.write_json("chosen.json", list(chosen.ids))
            stage.write_table("scores.parquet", scores.to_table())
        shutil.rmtree(store, ignore_errors=True)
