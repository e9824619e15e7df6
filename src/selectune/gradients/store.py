"""What a scoring pass leaves on disk: sharded, checksummed, resumable.

    store/
      targets/           Gram matrix, losses, lengths of the targets; ids, tasks, groups
      directions.bin     target gradients, only until the pool pass is done
      shard-00000/ ..    per example: id, dot products with every target, norm, loss, tokens
      pool/              which shards make up the finished pass

A shard is a fixed set of whole batches, laid out from all lengths before the first one runs, so a
killed pass, a resumed one and one shared by several processes compute the same numbers. From the
finished store any rank, aggregate, grouping or budget follows without another gradient.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectune.data import Tokens, collate, length_sorted_batches
from selectune.errors import DataError, IncompatibleRunError
from selectune.files import KillPoint, check_free_space, is_complete, kill_point, open_dir, staged
from selectune.gradients.directions import Directions
from selectune.gradients.engine import GradientEngine
from selectune.gradients.facts import GradientFacts
from selectune.gradients.kernels import Rows, project_with_norm
from selectune.progress import Progress

# Dense gradients of a target batch are written out one parameter at a time; few examples keep a
# batch of them small beside the model.
_TARGET_BATCH = 8


@dataclass(frozen=True, slots=True)
class Target:
    """One target example: its tokens, the task it stands for, its subtask."""

    tokens: Tokens
    task: str
    group: str


@dataclass(frozen=True, slots=True, eq=False)
class StoredPool:
    """The finished pass: everything that scorers of this pool and these targets read."""

    ids: tuple[str, ...]
    facts: GradientFacts
    losses: Float[np.ndarray, " n"]
    n_target_tokens: Int[np.ndarray, " n"]
    tasks: tuple[str, ...]

    def of_task(self, task: str) -> GradientFacts:
        """Return the facts of one task's targets alone."""
        return self.facts.of([j for j, name in enumerate(self.tasks) if name == task])


class GradientStore:
    """One scoring pass over a pool, kept in a folder.

    Args:
        path: the folder.
        identity: plain facts that decide every number: base, adapter, data, precision, batches.
            A folder made under another identity is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._identity = dict(identity)

    def compute(
        self,
        engine: GradientEngine,
        pool: Sequence[Tokens],
        targets: Sequence[Target],
        *,
        pad_id: int,
        token_budget: int,
        shard_examples: int,
        progress: Progress,
    ) -> StoredPool:
        """Run what is still missing of the pass, and return the whole of it.

        Args:
            engine: at the checkpoint where gradients are taken.
            pool: the candidates.
            targets: of all tasks together; they share the one pool pass.
            pad_id: token id for padding.
            token_budget: padded tokens in one batch.
            shard_examples: examples in one shard, at least a batch.
            progress: told of every example.

        Raises:
            IncompatibleRunError: the folder holds a pass of another identity.
            CorruptFileError: a finished part is damaged.
            StorageError: the disk cannot take the target gradients.
        """
        if self.is_complete():
            return self.load()
        sizes = {name: p.numel() for name, p in engine.parameters.items()}
        n_bytes = 4 * len(targets) * (sum(sizes.values()) + len(pool)) + 64 * len(pool)
        check_free_space(self.path, n_bytes)
        self.path.mkdir(parents=True, exist_ok=True)
        device = next(iter(engine.parameters.values())).device
        file = self.path / "directions.bin"
        if not file.exists() and is_complete(self.path / "targets", kind="targets"):
            # Killed between the two: without the directions the targets have to be run again.
            shutil.rmtree(self.path / "targets")
        with Directions(file, sizes, len(targets), device) as directions:
            if not self._has("targets", "targets"):
                self._run_targets(engine, targets, directions, pad_id, progress)
            shards = _shards([len(t.input_ids) for t in pool], token_budget, shard_examples)
            with progress.phase("pool gradients", len(pool), "examples") as advance:
                for k, batches in enumerate(shards):
                    name = f"shard-{k:05d}"
                    if not self._has(name, "shard"):
                        columns = _empty_columns()
                        for batch in batches:
                            items = [pool[i] for i in batch]
                            _run_batch(engine, items, directions, pad_id, columns)
                            advance(len(items))
                        self._write_shard(name, columns)
                        kill_point(KillPoint.STORE_SHARD_DONE)
                    else:
                        advance(sum(len(batch) for batch in batches))
        meta = {"identity": self._identity, "n_shards": len(shards), "n_examples": len(pool)}
        with staged(self.path / "pool", kind="pool", meta=meta) as stage:
            stage.write_json("ids.json", [t.id for t in pool])
        file.unlink()
        return self.load()

    def is_complete(self) -> bool:
        """Return whether the whole pass is on disk.

        Raises:
            IncompatibleRunError: the folder holds a pass of another identity.
        """
        return self._has("pool", "pool")

    def load(self) -> StoredPool:
        """Read the finished pass, examples in the pool's order.

        Raises:
            CorruptFileError: a part is missing or damaged.
        """
        done = open_dir(self.path / "pool", kind="pool")
        ids: list[str] = done.read_json("ids.json")
        tables: list[pa.Table] = []
        dots: list[np.ndarray] = []
        for k in range(done.meta["n_shards"]):
            shard = open_dir(self.path / f"shard-{k:05d}", kind="shard")
            tables.append(shard.read_table("examples.parquet"))
            dots.append(_numpy(shard.read_tensors("dots.safetensors")["dots"]))
        table = pa.concat_tables(tables)
        place = {i: n for n, i in enumerate(table["id"].to_pylist())}
        order = [place[i] for i in ids]
        targets = open_dir(self.path / "targets", kind="targets")
        names = targets.read_table("targets.parquet")
        facts = GradientFacts(
            np.concatenate(dots)[order],
            table["norm"].to_numpy()[order],
            _numpy(targets.read_tensors("gram.safetensors")["gram"]),
            tuple(names["id"].to_pylist()),
            tuple(names["group"].to_pylist()),
        )
        return StoredPool(
            tuple(ids),
            facts,
            table["loss"].to_numpy()[order],
            table["n_target_tokens"].to_numpy()[order],
            tuple(names["task"].to_pylist()),
        )

    def _has(self, name: str, kind: str) -> bool:
        path = self.path / name
        if not is_complete(path, kind=kind):
            return False
        found = open_dir(path, kind=kind).meta["identity"]
        if found != self._identity:
            changed = [
                f"{key}: {found.get(key)!r} then, {self._identity.get(key)!r} now"
                for key in sorted({*found, *self._identity})
                if found.get(key) != self._identity.get(key)
            ]
            raise IncompatibleRunError(
                "the gradient store was made for something else",
                where=str(self.path),
                why="; ".join(changed),
                do="choose another output folder, or remove this one to compute anew",
            )
        return True

    def _run_targets(
        self,
        engine: GradientEngine,
        targets: Sequence[Target],
        directions: Directions,
        pad_id: int,
        progress: Progress,
    ) -> None:
        losses: list[float] = []
        with progress.phase("target gradients", len(targets), "examples") as advance:
            for first in range(0, len(targets), _TARGET_BATCH):
                some = [t.tokens for t in targets[first : first + _TARGET_BATCH]]
                batch = collate(some, pad_id=pad_id, device=_device(engine))

                def keep(name: str, rows: Rows, first: int = first) -> None:
                    directions.write(name, first, rows.dense())

                losses += engine.run(batch, keep).tolist()
                advance(len(some))
        _refuse_nan([t.tokens.id for t in targets], losses)
        directions.sync()
        table = pa.table(
            {
                "id": [t.tokens.id for t in targets],
                "task": [t.task for t in targets],
                "group": [t.group for t in targets],
                "loss": losses,
                "n_target_tokens": [int(t.tokens.is_target.sum()) for t in targets],
            }
        )
        meta = {"identity": self._identity}
        with staged(self.path / "targets", kind="targets", meta=meta) as stage:
            stage.write_table("targets.parquet", table)
            stage.write_tensors("gram.safetensors", {"gram": directions.gram()})

    def _write_shard(self, name: str, columns: dict[str, list[Any]]) -> None:
        dots = torch.cat(columns.pop("dots"))
        with staged(self.path / name, kind="shard", meta={"identity": self._identity}) as stage:
            stage.write_table("examples.parquet", pa.table(columns))
            stage.write_tensors("dots.safetensors", {"dots": dots})


def _empty_columns() -> dict[str, list[Any]]:
    return {"id": [], "norm": [], "loss": [], "n_target_tokens": [], "dots": []}


def _run_batch(
    engine: GradientEngine,
    items: Sequence[Tokens],
    directions: Directions,
    pad_id: int,
    columns: dict[str, list[Any]],
) -> None:
    batch = collate(items, pad_id=pad_id, device=_device(engine))
    dots: Tensor | None = None
    norm2: Tensor | None = None

    def add(name: str, rows: Rows) -> None:
        nonlocal dots, norm2
        a, n2 = project_with_norm(rows, directions.read(name))
        dots = a if dots is None else dots + a
        # Squares of hundreds of parameters: fp64 keeps the order of addition from showing.
        norm2 = n2.double() if norm2 is None else norm2 + n2.double()

    losses = engine.run(batch, add).tolist()
    _refuse_nan([t.id for t in items], losses)
    assert dots is not None
    assert norm2 is not None
    columns["id"] += [t.id for t in items]
    columns["loss"] += losses
    columns["norm"] += norm2.sqrt().tolist()
    columns["n_target_tokens"] += [int(t.is_target.sum()) for t in items]
    columns["dots"].append(dots.float().cpu())


def _device(engine: GradientEngine) -> torch.device:
    return next(iter(engine.parameters.values())).device


def _numpy(values: Any) -> np.ndarray:  # noqa: ANN401
    return values.numpy() if isinstance(values, Tensor) else np.asarray(values)


def _refuse_nan(ids: Sequence[str], losses: Sequence[float]) -> None:
    bad = [i for i, loss in zip(ids, losses, strict=True) if not np.isfinite(loss)]
    if bad:
        raise DataError(
            f"the loss of {len(bad)} examples is not a finite number",
            where=f"example {', '.join(bad[:3])}",
            why="the model overflowed on them, or its weights hold NaN",
            do="use model.dtype=float32; if that does not help, take these rows out",
        )


def _shards(
    lengths: Sequence[int], token_budget: int, shard_examples: int
) -> list[list[list[int]]]:
    """Return batches of example numbers, grouped into shards of about `shard_examples`."""
    shards: list[list[list[int]]] = [[]]
    for batch in length_sorted_batches(lengths, token_budget=token_budget):
        if sum(map(len, shards[-1])) >= shard_examples:
            shards.append([])
        shards[-1].append(batch)
    return shards


def identity_text(identity: Mapping[str, Any]) -> str:
    """Return an identity as one canonical line, for names and comparison."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":"))
