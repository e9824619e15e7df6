"""The steps of a training method as tables: one row per step, one column per layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from selectune.report.contents import PER_LAYER, TrainingFacts, indices_in


def facts_of(
    arm: str, records: Sequence[tuple[int, Mapping[str, Any]]], n_tokens: Mapping[str, int]
) -> TrainingFacts | None:
    """Return the facts of an arm, None where no step told anything about layers.

    Lists go by place among the layers that train, "active" and "picks" by number in the model.
    "layers" of any record, the numbers in order of places, tells how they belong together. Without
    it they agree where all layers train; else the numbers that occur must tell.

    Args:
        arm: its name.
        records: step and its facts.
        n_tokens: target tokens of each example, by id.
    """
    named: set[int] = set()
    sizes: set[int] = set()
    for _, facts in records:
        named |= indices_in(facts)
        sizes |= {len(facts[key]) for key in PER_LAYER if facts.get(key) is not None}
    if not named and not sizes:
        return None
    told = next((list(facts["layers"]) for _, facts in records if facts.get("layers")), None)
    if told is not None:
        return TrainingFacts(
            arm=arm, n_layers=len(told), records=records, n_tokens=n_tokens, layers=told
        )
    n_layers = max(sizes) if sizes else max(named) + 1
    if not named or max(named) < n_layers:
        return TrainingFacts(arm=arm, n_layers=n_layers, records=records, n_tokens=n_tokens)
    layers = sorted(named)
    if len(layers) == n_layers:
        return TrainingFacts(
            arm=arm, n_layers=n_layers, records=records, n_tokens=n_tokens, layers=layers
        )
    kept = [(s, {k: v for k, v in f.items() if k not in PER_LAYER}) for s, f in records]
    return TrainingFacts(
        arm=arm, n_layers=len(layers), records=kept, n_tokens=n_tokens, layers=layers,
        note=f"{n_layers - len(layers)} of {n_layers} layers were never active, and the record "
        "does not say which: numbers that go by place (importance, alignment, tokens) are not "
        "drawn.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """What layers picked in one step.

    Attributes:
        step: its number.
        places: layers that picked, by place.
        picked: True where picked.
        n_tokens: target tokens of each example, NaN where not known.
    """

    step: int
    places: list[int]
    picked: Bool[np.ndarray, "l n"]
    n_tokens: Float[np.ndarray, " n"]


class Steps:
    """The records of one arm in order of steps; of a step told twice, the last counts."""

    def __init__(self, facts: TrainingFacts) -> None:
        self._records = sorted(dict(facts.records).items())
        self._n_tokens = facts.n_tokens
        self.layers = list(facts.layers or range(facts.n_layers))
        self.step: Int[np.ndarray, " s"] = np.asarray([s for s, _ in self._records], np.int64)

    def of(self, key: str) -> Float[np.ndarray, "s l"]:
        """Return one number per step and layer; NaN where it is absent, null or not finite."""
        table = np.full((len(self._records), len(self.layers)), np.nan)
        for row, (_, facts) in enumerate(self._records):
            if facts.get(key) is not None:
                table[row] = [np.nan if v is None else v for v in facts[key]]
        table[~np.isfinite(table)] = np.nan
        return table

    def active(self) -> Float[np.ndarray, "s l"]:
        """Return 1 where a layer was trained, 0 where not, NaN in steps that do not say."""
        place = {layer: i for i, layer in enumerate(self.layers)}
        table = np.full((len(self._records), len(self.layers)), np.nan)
        for row, (_, facts) in enumerate(self._records):
            if facts.get("active") is not None:
                table[row] = 0
                table[row, [place[i] for i in facts["active"]]] = 1
        return table

    def picks(self, *, newest_first: bool = False) -> Iterator[Picks]:
        """Give what was picked, step by step."""
        place = {layer: i for i, layer in enumerate(self.layers)}
        for step, facts in reversed(self._records) if newest_first else self._records:
            told: Mapping[str, str] = facts.get("picks") or {}
            by_place = {place[int(layer)]: picked for layer, picked in told.items()}
            places = sorted(by_place)
            if not places or not by_place[places[0]]:
                continue
            rows = [np.frombuffer(by_place[p].encode(), np.uint8) == ord("1") for p in places]
            ids: Sequence[str] = facts.get("examples") or ()
            lengths = [float(self._n_tokens.get(i, np.nan)) for i in ids]
            if len(ids) != len(rows[0]):  # ids of a part of the step say nothing about a place
                lengths = [np.nan] * len(rows[0])
            yield Picks(step, places, np.stack(rows), np.asarray(lengths, np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A table of steps, drawn as columns; neighbouring steps share one where there are many.

    Attributes:
        values: mean over the steps of a column, NaN where no step of it has a value.
        edges: step at which each column begins, and where the last one ends.
        per_column: steps in the widest column.
    """

    values: Float[np.ndarray, "c l"]
    edges: Float[np.ndarray, " c1"]
    per_column: int


def columns(
    steps: Int[np.ndarray, " s"], values: Float[np.ndarray, "s l"], most: int, end: int
) -> Columns:
    """Return at most `most` columns; each step is in exactly one.

    Args:
        steps: ascending.
        values: a row per step.
        most: columns that can be drawn.
        end: step at which the last column ends.
    """
    starts = np.unique(
        np.linspace(0, len(steps), min(most, len(steps)), endpoint=False).astype(int)
    )
    is_known = np.isfinite(values)
    total = np.add.reduceat(np.where(is_known, values, 0.0), starts)
    n = np.add.reduceat(is_known.astype(np.float64), starts)
    mean = np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)
    edges = np.append(steps[starts], end).astype(np.float64)
    return Columns(mean, edges, int(np.diff(np.append(starts, len(steps))).max()))


def mean_by_layer(table: Float[np.ndarray, "s l"]) -> Float[np.ndarray, " l"]:
    """Return each layer's mean over the steps that know it, NaN where none does."""
    is_known = np.isfinite(table)
    n = is_known.sum(0)
    total = np.where(is_known, table, 0.0).sum(0)
    return np.divide(total, n, out=np.full(table.shape[1], np.nan), where=n > 0)
