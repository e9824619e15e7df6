"""Token scores of chosen examples: taken in shards, told as a table, and used to mask a loss."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectune.data import Tokens, collate, length_sorted_batches, preview
from selectune.data.tokens import fingerprint_of
from selectune.errors import ConfigError, nearest
from selectune.files import open_dir, staged, write_file, write_parquet
from selectune.gradients.engine import GradientEngine
from selectune.gradients.token_scores import (
    Direction,
    loss_scores,
    position_scores,
    task_direction,
)
from selectune.models import Base, trainable_fingerprint
from selectune.pipeline.ground import Ground, digest
from selectune.pipeline.measure import Measured
from selectune.pipeline.scoring import scored_model
from selectune.recipe import Recipe, TokensSection

Form = Literal["loss", "position"]
FILES = ("tokens.jsonl", "tokens.parquet")
_RULE = "energy:0.95"
_KIND = "tokens"


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """How far each token of some examples asks for the direction of one task.

    Args:
        task: whose direction it is.
        form: by whose loss asks, or by the position where modules answer.
        ids: the examples.
        scores: one array per example, one number per token; NaN where a token has none. They add
            up to the inner product of the example's gradient with the direction.
        rank: of the target space that the direction was taken in.
        norm: length of the direction.
    """

    task: str
    form: Form
    ids: tuple[str, ...]
    scores: tuple[Float[np.ndarray, " _"], ...]
    rank: int
    norm: float

    def to_json(self) -> dict[str, Any]:
        """Return what all tokens together say, as plain values."""
        values = np.concatenate(self.scores)
        return {
            "rank": self.rank,
            "norm": self.norm,
            "n_tokens": int((~np.isnan(values)).sum()),
            "n_positive": int((values > 0).sum()),
        }


def rank_rule(recipe: Recipe, section: TokensSection | None) -> int | str:
    """Return which directions of the target space token scores are taken in."""
    if section is not None and section.rank is not None:
        return section.rank
    own = recipe.score.options.get("rank") if recipe.score.method == "gist" else None
    return _RULE if own is None else own


def token_scores(
    ground: Ground, items: Sequence[Tokens], *, rule: int | str, form: Form = "loss", label: str
) -> list[TokenScores]:
    """Score every token of some examples for each task of the run; resume, or read what is there.

    Args:
        ground: of the run.
        items: the examples.
        rule: which directions of the target space count, as `rank_of` takes it.
        form: by whose loss asks, or by the position where modules answer.
        label: what the examples are called where the step and its price are told.

    Returns:
        One for each task, examples in the order given.

    Raises:
        SelectionError: the target gradients are zero or not finite.
        ConfigError: the model has no forward-mode derivative.
        CoverageError: what trains cannot be split by position.
    """
    base, model, untold = scored_model(ground)
    identity = {
        "base": base.fingerprint,
        "adapter": trainable_fingerprint(model),
        **untold,
        "items": fingerprint_of(items),
        "precision": base.precision,
        "token_budget": ground.recipe.score.token_budget,
        "shard_examples": ground.recipe.score.shard_examples,
        "rule": rule,
        "form": form,
    }
    return [
        _Pass(ground, base, model, task, form, identity).run(items, f"tokens {task} of {label}")
        for task in ground.tasks
    ]


class _Pass:
    """The pass over some examples for one task."""

    def __init__(
        self,
        ground: Ground,
        base: Base,
        model: nn.Module,
        task: str,
        form: Form,
        identity: Mapping[str, Any],
    ) -> None:
        self._ground, self._base, self._task = ground, base, task
        self._targets = list(ground.tokens.targets[task])
        self._rule: int | str = identity["rule"]
        self._form: Form = form
        self._engine = GradientEngine(model, precision=base.precision)
        self._fingerprint = digest({**identity, "targets": fingerprint_of(self._targets)})
        # By content: the selection and its controls stand side by side.
        name = f"tokens/{self._fingerprint[:16]}"
        self._path = ground.place("tokens", name, self._fingerprint)

    def run(self, items: Sequence[Tokens], step: str) -> TokenScores:
        """Do what is missing, and read the whole.

        Args:
            items: the examples.
            step: what this is called where it is told.
        """
        size = self._ground.recipe.score.shard_examples
        shards = [items[start : start + size] for start in range(0, len(items), size)]
        with self._ground.making(self._path):
            self._work(shards, step)
        self._ground.recall(step, self._path)
        return self._read(items, len(shards))

    def _work(self, shards: Sequence[Sequence[Tokens]], step: str) -> None:
        missing = [k for k in range(len(shards)) if not self._has(k)]
        if not missing:
            return
        with Measured() as measured:
            direction = self._found_direction()
            n_left = sum(len(shards[k]) for k in missing)
            with self._ground.progress.phase(step, n_left, "examples") as advance:
                for k in missing:
                    self._compute(k, shards[k], direction)
                    advance(len(shards[k]))
        self._ground.keep_price(self._path, measured)

    def _has(self, k: int) -> bool:
        return self._ground.is_done(self._shard(k), _KIND, self._fingerprint)

    def _shard(self, k: int) -> Path:
        return self._path / f"shard-{k:05d}"

    def _compute(self, k: int, items: Sequence[Tokens], direction: Direction) -> None:
        scores: list[Tensor] = [torch.zeros(0)] * len(items)
        lengths = [len(t.input_ids) for t in items]
        budget = self._ground.recipe.score.token_budget
        for rows in length_sorted_batches(lengths, token_budget=budget):
            few = [items[n] for n in rows]
            for n, values in zip(rows, self._batch(few, direction), strict=True):
                scores[n] = values
        meta = {
            "fingerprint": self._fingerprint,
            "rank": direction.rank,
            "norm": direction.norm,
            "task": self._task,
        }
        with staged(self._shard(k), kind=_KIND, meta=meta) as stage:
            stage.write_tensors("scores.safetensors", {"scores": torch.cat(scores)})

    def _batch(self, items: Sequence[Tokens], direction: Direction) -> list[Tensor]:
        device = self._base.device
        batch = collate(items, pad_id=self._base.pad_id, device=device)
        if self._form == "position":
            found = position_scores(self._engine, batch, direction.parts).float().cpu()
            return [row[: len(t.input_ids)] for row, t in zip(found, items, strict=True)]
        model, precision = self._engine.model, self._base.precision
        found = loss_scores(model, batch, direction.parts, precision).float().cpu()
        whole: list[Tensor] = []
        for row, t in zip(found, items, strict=True):
            values = torch.full((len(t.input_ids),), torch.nan)
            values[torch.from_numpy(t.is_target)] = row[: int(t.is_target.sum())]  # pyright: ignore[reportUnknownMemberType]
            whole.append(values)
        return whole

    def _found_direction(self) -> Direction:
        name = f"direction of {self._task}"
        with self._ground.progress.phase(name, len(self._targets), "examples") as advance:
            return task_direction(
                self._engine,
                self._targets,
                rule=self._rule,
                seed=self._ground.recipe.seed,
                file=self._path / "directions.bin",
                pad_id=self._base.pad_id,
                token_budget=self._ground.recipe.score.token_budget,
                advance=advance,
            )

    def _read(self, items: Sequence[Tokens], n_shards: int) -> TokenScores:
        opened = [open_dir(self._shard(k), kind=_KIND) for k in range(n_shards)]
        parts = [one.read_tensors("scores.safetensors")["scores"] for one in opened]
        ends = np.cumsum([len(t.input_ids) for t in items])
        scores = np.split(np.concatenate(parts), ends[:-1])
        meta = opened[0].meta
        ids = tuple(t.id for t in items)
        return TokenScores(self._task, self._form, ids, tuple(scores), meta["rank"], meta["norm"])


def keep_tokens(
    ground: Ground, items: Sequence[Tokens], section: TokensSection, *, name: str
) -> list[Tokens]:
    """Return the examples with the loss on some of their target tokens only.

    With several tasks a token counts by its mean over their directions, each of length 1.

    Args:
        ground: of the run.
        items: the examples.
        section: which tokens stay.
        name: of the arm, for a note.
    """
    by_task = token_scores(ground, items, rule=rank_rule(ground.recipe, section), label=name)
    kept: list[Tokens] = []
    for k, item in enumerate(items):
        unit = np.mean([one.scores[k] / one.norm for one in by_task], axis=0)
        stays = kept_of(unit[item.is_target].astype(np.float64), section.keep)
        if section.shuffled:
            seed = hashlib.sha256(f"tokens:{ground.recipe.seed}:{item.id}".encode()).digest()
            stays = np.random.default_rng(int.from_bytes(seed[:8], "little")).permutation(stays)
        is_target = item.is_target.copy()
        is_target[item.is_target] = stays
        kept.append(Tokens(item.id, item.input_ids, is_target))
    n_before, n_kept = (int(sum(t.is_target.sum() for t in some)) for some in (items, kept))
    ground.progress.note(f"{name}: {n_kept:,} of {n_before:,} loss tokens train")
    return kept


def kept_of(scores: Float[np.ndarray, " k"], keep: str | float) -> Bool[np.ndarray, " k"]:
    """Return which target tokens of one example train: at least the best one.

    Args:
        scores: of its target tokens; of equal ones the earlier stays.
        keep: "positive", or a share of them.
    """
    n = int((scores > 0).sum()) if isinstance(keep, str) else round(keep * len(scores))
    stays = np.zeros(len(scores), bool)
    stays[np.argsort(-scores, kind="stable")[: max(1, n)]] = True
    return stays


def named(ground: Ground, ids: Sequence[str]) -> list[Tokens]:
    """Return the candidates of these ids.

    Raises:
        ConfigError: the pool holds no such candidate.
    """
    by_id = {t.id: t for t in ground.tokens.pool}
    missing = [i for i in ids if i not in by_id]
    if missing:
        raise ConfigError(
            f'no candidate is called "{missing[0]}"',
            where="command line, --ids",
            why=f"the pool has {len(by_id):,} candidates; ids stand in selected.jsonl and "
            "scores.parquet",
            do=nearest(missing[0], by_id),
        )
    return [by_id[i] for i in dict.fromkeys(ids)]


def write_tokens(
    out: Path, ground: Ground, ids: Sequence[str], by_task: Sequence[TokenScores]
) -> None:
    """Write one row per example and task: the tokens as text, and the score of each.

    Args:
        out: the run's folder.
        ground: of the run.
        ids: the examples, in the order of the rows.
        by_task: their scores.
    """
    place = {example_id: k for k, example_id in enumerate(by_task[0].ids)}
    rows: list[dict[str, Any]] = []
    for example_id in ids:
        item = ground.tokens.by_id[example_id]
        pieces = [text for text, _ in preview(item, ground.tokenizer)]
        for found in by_task:
            values = found.scores[place[example_id]].astype(np.float64)
            rows.append(
                {
                    "id": item.id,
                    "task": found.task,
                    "form": found.form,
                    "score": float(np.nansum(values)),
                    "tokens": pieces,
                    "is_target": item.is_target.tolist(),
                    "scores": [None if np.isnan(v) else float(v) for v in values],
                }
            )
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_file(out / FILES[0], ("\n".join(lines) + "\n").encode())
    form = pa.schema(
        [
            ("id", pa.string()),
            ("task", pa.string()),
            ("form", pa.string()),
            ("score", pa.float64()),
            ("tokens", pa.list_(pa.string())),
            ("is_target", pa.list_(pa.bool_())),
            ("scores", pa.list_(pa.float64())),
        ]
    )
    write_parquet(out / FILES[1], pa.Table.from_pylist(rows, schema=form))


def read_tokens(out: Path) -> list[dict[str, Any]]:
    """Return the rows of `write_tokens`; whoever reads has checked the file's sha256."""
    return pq.read_table(pa.BufferReader((out / FILES[1]).read_bytes())).to_pylist()
