"""Values that print, compare, combine and save: the scores of a pool, and what was chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from selectune.errors import IncompatibleRunError, SelectionError, nearest
from selectune.files import open_dir, staged


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One number per example (higher is better), with what explains it.

    Args:
        method: the scorer's name.
        ids: the examples, in the order of every column.
        score: what ranks them; NaN is refused.
        columns: further numbers per example, such as `energy` or one score per task.
        best_target: id of the target that each example matches best; empty when none does.
        about: plain facts of the whole table, such as the rank that was chosen.
    """

    method: str
    ids: tuple[str, ...]
    score: Float[np.ndarray, " n"]
    columns: Mapping[str, Float[np.ndarray, " n"]] = field(default_factory=dict[str, Any])
    best_target: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuse tables that could rank nothing or rank wrongly."""
        n = len(self.ids)
        for name, column in {"score": self.score, **self.columns}.items():
            if len(column) != n:
                raise SelectionError(
                    f'column "{name}" holds {len(column)} numbers for {n} examples',
                    why="every column has one number per example",
                )
        taken = sorted({"id", "score", "best_target"} & set(self.columns))
        if taken:
            raise SelectionError(
                f'a further column of scores is called "{taken[0]}"',
                why="that is a name of a column that all scores have",
                do="give it another name",
            )
        if len(set(self.ids)) != n:
            raise SelectionError("an example id stands twice in the scores")
        if np.isnan(self.score).any():
            bad = [self.ids[i] for i in np.flatnonzero(np.isnan(self.score))[:3]]
            raise SelectionError(
                f"{int(np.isnan(self.score).sum())} scores of {self.method} are not a number",
                where=f"examples {', '.join(bad)}",
                why="a loss or gradient overflowed or the example has no target token",
                do="inspect these rows, or use model.dtype=float32",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Scores({self.method}, {len(self)} examples, columns: {sorted(self.columns)})"

    def __getitem__(self, example_id: str) -> float:
        try:
            return float(self.score[self.ids.index(example_id)])
        except ValueError:
            raise SelectionError(
                f'no example "{example_id}" in these scores', do=nearest(example_id, self.ids)
            ) from None

    def ranking(self, column: str = "score") -> list[str]:
        """Return the ids, best first; ties go by id, so pool order never matters."""
        values = self.score if column == "score" else self.columns[column]
        # lexsort sorts by its last key first; -inf marks "last" and survives the minus sign.
        order = np.lexsort((np.asarray(self.ids), -values))
        return [self.ids[i] for i in order]

    def to_table(self) -> pa.Table:
        """Return an Arrow table: id, score, the further columns, best_target."""
        data: dict[str, Any] = {"id": list(self.ids), "score": self.score, **self.columns}
        if self.best_target:
            data["best_target"] = list(self.best_target)
        return pa.table(data)

    @classmethod
    def from_table(cls, table: pa.Table, method: str, about: Mapping[str, Any]) -> "Scores":
        """Return the scores that `to_table` wrote."""
        names = [n for n in table.column_names if n not in ("id", "score", "best_target")]
        known = table.column_names
        return cls(
            method,
            tuple(table["id"].to_pylist()),
            table["score"].to_numpy(),
            {name: table[name].to_numpy() for name in names},
            tuple(table["best_target"].to_pylist()) if "best_target" in known else (),
            dict(about),
        )

    def save(self, path: str | Path) -> None:
        """Write one file of scores by id, .parquet or .jsonl, that `load` reads back.

        Raises:
            ConfigError: the name ends in something else.
            DataError: a number is infinite, and the file JSONL.
        """
        from selectune.interchange.scores import write_scores

        write_scores(self, Path(path))

    @classmethod
    def load(
        cls, path: str | Path, *, column: str = "score", higher_is_better: bool = True
    ) -> "Scores":
        """Read a .parquet or .jsonl file of scores by id, ours or another tool's.

        Args:
            path: the file; it needs the columns `id` and `column`.
            column: what ranks.
            higher_is_better: False turns the sign of `column` round.

        Raises:
            ConfigError: the name ends in something else, or the column is not there.
            DataError: the file cannot be read, or a row has no id or no score.
        """
        # An arrow that points up, as in `Selection.examples`: who only ranks pays for no import.
        from selectune.interchange.scores import read_scores

        return read_scores(Path(path), column=column, higher_is_better=higher_is_better)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is worth training: an immutable set of examples that prints, combines and saves.

    Args:
        ids: the chosen examples, best first.
        universe: every example that could have been chosen.
        reasons: why each was chosen or dropped, per id.
        fingerprint: the base weights and settings that the scores were made with.
        about: plain facts, such as method, rule and budget.
    """

    ids: tuple[str, ...]
    universe: frozenset[str]
    reasons: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)
    fingerprint: str = ""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)

    def __post_init__(self) -> None:
        """Refuse ids that the pool does not hold."""
        strange = [i for i in self.ids if i not in self.universe]
        if strange:
            raise SelectionError(
                f"{len(strange)} selected ids are not in the pool",
                where=", ".join(strange[:3]),
                do=nearest(strange[0], self.universe),
            )
        if len(set(self.ids)) != len(self.ids):
            raise SelectionError("an example is selected twice")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, example_id: object) -> bool:
        return example_id in self.ids

    def __repr__(self) -> str:
        return f"Selection({len(self.ids)} of {len(self.universe)} examples)"

    def _with(self, ids: Iterable[str], other: "Selection | None" = None) -> "Selection":
        if other is not None and other.universe != self.universe:
            raise SelectionError(
                "two selections of different pools cannot be combined",
                why=f"one was made from {len(self.universe)} examples, "
                f"the other from {len(other.universe)}, and they differ",
            )
        reasons = {**(other.reasons if other else {}), **self.reasons}
        return Selection(tuple(ids), self.universe, reasons, self.fingerprint)

    def __and__(self, other: "Selection") -> "Selection":
        chosen = set(other.ids)
        return self._with((i for i in self.ids if i in chosen), other)

    def __or__(self, other: "Selection") -> "Selection":
        return self._with(dict.fromkeys((*self.ids, *other.ids)), other)

    def __invert__(self) -> "Selection":
        return self._with(sorted(self.universe - set(self.ids)))

    def examples(self, pool: Any) -> Any:  # noqa: ANN401
        """Return the chosen items of `pool`, best first.

        Args:
            pool: a datasets.Dataset or a list of rows, as it was scored, or a sequence of anything
                with an `id`.

        Returns:
            A Dataset for a Dataset, else a list.

        Raises:
            SelectionError: the pool lacks a chosen example.
        """
        if pool and not hasattr(pool[0], "id"):
            # The one arrow that points up: a user's rows get their ids from the data package,
            # and a user of selections alone does not pay for importing it.
            from selectune.data import read_examples

            place = {e.id: k for k, e in enumerate(read_examples(pool))}
            rows = [place[i] for i in self._found_in(place)]
            return pool.select(rows) if hasattr(pool, "select") else [pool[k] for k in rows]
        by_id = {item.id: item for item in pool}
        return [by_id[i] for i in self._found_in(by_id)]

    def _found_in(self, by_id: Mapping[str, Any]) -> tuple[str, ...]:
        missing = [i for i in self.ids if i not in by_id]
        if missing:
            raise SelectionError(
                f"{len(missing)} of {len(self.ids)} chosen examples are not in this pool",
                where=", ".join(missing[:3]),
                why="the selection was made from another pool, or the pool has changed since",
                do="score and select again on this pool",
            )
        return self.ids

    def save_pretrained(self, path: str | Path) -> None:
        """Write a checksummed folder that `from_pretrained` reads back."""
        universe = sorted(self.universe)
        rank = {example_id: i for i, example_id in enumerate(self.ids)}
        table = pa.table(
            {
                "id": universe,
                "rank": pa.array([rank.get(i) for i in universe], pa.int64()),
                "reason": [self.reasons.get(i, "") for i in universe],
            }
        )
        meta = {"fingerprint": self.fingerprint, "about": dict(self.about)}
        with staged(Path(path), kind="selection", meta=meta) as stage:
            stage.write_table("selection.parquet", table)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, fingerprint: str | None = None) -> "Selection":
        """Read a folder that `save_pretrained` wrote.

        Raises:
            CorruptFileError: a file is not what the manifest says.
            IncompatibleRunError: it was made for another base than `fingerprint`.
        """
        opened = open_dir(Path(path), kind="selection")
        made_for = opened.meta["fingerprint"]
        if fingerprint is not None and fingerprint != made_for:
            raise IncompatibleRunError(
                "this selection was made for another base or another setting",
                where=str(path),
                why=f"expected fingerprint {fingerprint}, found {made_for}",
                do="select again with this model, or load the model it was made for",
            )
        rows = opened.read_table("selection.parquet").to_pylist()
        chosen = sorted((r for r in rows if r["rank"] is not None), key=lambda r: r["rank"])
        return cls(
            tuple(r["id"] for r in chosen),
            frozenset(r["id"] for r in rows),
            {r["id"]: r["reason"] for r in rows if r["reason"]},
            made_for,
            opened.meta["about"],
        )
