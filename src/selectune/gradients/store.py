"""What a scoring pass leaves on disk: sharded, checksummed, resumable.

    store/
      targets/           Gram matrix, losses, lengths of the targets; ids, tasks, groups
      directions.bin     target gradients, only until the pool pass is done
      shard-00000/ ..    per example: id, dot products with every target, norm, loss, tokens
      pool/              which shards make up the finished pass

A shard is a fixed set of whole batches, laid out from all lengths before the first one runs, so a
killed pass, a resumed one and one shared by several processes compute the same numbers. Processes
that share a pass claim its parts one by one: the targets, each shard, the list at the end. From the
finished store any rank, aggregate, grouping or budget follows without another gradient.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectune.data import Tokens, collate, length_sorted_batches
from selectune.errors import CorruptFileError, DataError, IncompatibleRunError
from selectune.files import (
    Alone,
    Hands,
    KillPoint,
    Opened,
    check_free_space,
    is_complete,
    kill_point,
    open_dir,
    sha256_file,
    staged,
)
from selectune.files.disk import remove, share_file
from selectune.gradients.adam import AdamSteps
from selectune.gradients.directions import Directions
from selectune.gradients.engine import GradientEngine
from selectune.gradients.facts import GradientFacts
from selectune.gradients.kernels import Rows
from selectune.gradients.products import (
    ExactProducts,
    Products,
    ProjectedProducts,
    target_features,
)
from selectune.gradients.projection import Projection
from selectune.progress import Advance, Progress

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


@dataclass(frozen=True, slots=True)
class Worked:
    """How far a pass is, and how many of its shards this process has computed."""

    n_computed: int
    n_done: int
    n_shards: int

    @property
    def is_complete(self) -> bool:
        """Whether every shard is on disk."""
        return self.n_done == self.n_shards


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """Another pass over the same gradients: its store, and how it looks at them."""

    store: "GradientStore"
    adam: AdamSteps | None
    projection: Projection | None


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
        adam: AdamSteps | None = None,
        projection: Projection | None = None,
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
            adam: pool gradients are compared in the form that Adam gives them; None: as they are.
            projection: of pool and target gradients alike, before they are compared; None: none.

        Raises:
            IncompatibleRunError: the folder holds a pass of another identity.
            CorruptFileError: a finished part is damaged.
            StorageError: the disk cannot take the target gradients.
        """
        self.work(
            engine,
            pool,
            targets,
            pad_id=pad_id,
            token_budget=token_budget,
            shard_examples=shard_examples,
            progress=progress,
            adam=adam,
            projection=projection,
        )
        return self.load(targets)

    def work(
        self,
        engine: GradientEngine,
        pool: Sequence[Tokens],
        targets: Sequence[Target],
        *,
        pad_id: int,
        token_budget: int,
        shard_examples: int,
        progress: Progress,
        adam: AdamSteps | None = None,
        projection: Projection | None = None,
        hands: Hands | None = None,
        beside: Sequence[Beside] = (),
    ) -> Worked:
        """Run what is missing of the pass and is this process's to do.

        Args:
            engine: as for `compute`, and so are the arguments up to `projection`.
            pool: the candidates.
            targets: of all tasks together.
            pad_id: token id for padding.
            token_budget: padded tokens in one batch.
            shard_examples: examples in one shard, at least a batch.
            progress: told of every example.
            adam: the form in which pool gradients are compared.
            projection: of all gradients, before they are compared.
            hands: says which parts are this process's; None: all of them.
            beside: further passes, made of the rows that this one computes; what else they miss is
                left to them. Processes that share a pass name the same ones, and take passes in
                the same order.

        Returns:
            How far the pass is now. It can be read (`load`) once it is complete.

        Raises:
            IncompatibleRunError: the folder holds a pass of another identity.
            CorruptFileError: a finished part is damaged.
            StorageError: the disk cannot take the target gradients.
        """
        hands = hands or Alone()
        shards = _shards([len(t.input_ids) for t in pool], token_budget, shard_examples)
        everything = Worked(0, len(shards), len(shards))
        self._unseal(len(shards), hands)
        if self.is_complete():
            return everything
        with ExitStack() as stack:
            with hands.turn(self._part("targets"), lambda: self._has("targets", "targets")):
                # Others may have ended the pass since, and its directions are gone with that.
                if self.is_complete():
                    return everything
                own = Beside(self, adam, projection)
                products = [
                    (one.store, stack.enter_context(one.store._aimed(
                        engine, pool, targets, shards, pad_id, progress, one,
                        twin=None if one is own else self,
                    )))
                    for one in (own, *beside)
                ]  # fmt: skip
            n_computed, left = 0, list(range(len(shards)))
            with progress.phase("pool gradients", len(pool), "examples") as advance:
                while left:
                    busy: list[int] = []
                    for k in left:
                        batches = [[pool[i] for i in batch] for batch in shards[k]]
                        n = self._shard(engine, k, batches, products, pad_id, hands, advance)
                        if n is None:
                            busy.append(k)
                        else:
                            n_computed += n
                    if len(busy) == len(left):
                        if not hands.waits:
                            break
                        part = self._part(_shard_name(busy[0]))
                        with hands.turn(part, lambda: False):
                            pass  # done by now, or its process has died and it is free
                    left = busy
        left = [k for k in left if not self._has(_shard_name(k), "shard")]
        if not left:
            with hands.turn(self._part("targets"), lambda: True):
                self._seal(pool, len(shards))
        for one in beside:
            with hands.turn(one.store._part("targets"), lambda: True):
                one.store._seal(pool, len(shards))
        return Worked(n_computed, len(shards) - len(left), len(shards))

    @contextmanager
    def _aimed(
        self,
        engine: GradientEngine,
        pool: Sequence[Tokens],
        targets: Sequence[Target],
        shards: Sequence[Sequence[Sequence[int]]],
        pad_id: int,
        progress: Progress,
        how: Beside,
        *,
        twin: "GradientStore | None",
    ) -> Generator[Products]:
        """Run the targets where they are missing, and open what pool gradients meet them in.

        Those that `twin` has run of the same targets at the same model are taken from there.
        """
        with self._room(engine, len(pool), len(targets), twin) as directions:
            if not self._has("targets", "targets"):
                if twin is None:
                    losses = self._run_targets(engine, targets, directions, pad_id, progress)
                else:
                    table = twin._open("targets", "targets").read_table("targets.parquet")
                    losses = table["loss"].to_pylist()
                self._write_targets(engine, targets, losses, directions, how.projection)
            else:
                _probe_as_the_first(engine, targets, pool, shards, pad_id)
            yield self._products(engine, directions, how.adam, how.projection)

    def _unseal(self, n_shards: int, hands: Hands) -> None:
        """Open a pass that has lost a part since it ended: a damaged one is removed by hand."""

        def lacks() -> bool:
            parts = [("targets", "targets"), *((_shard_name(k), "shard") for k in range(n_shards))]
            return is_complete(self.path / "pool", kind="pool") and not all(
                is_complete(self.path / name, kind=kind) for name, kind in parts
            )

        if lacks():
            with hands.turn(self._part("pool"), lambda: not lacks()):
                if lacks():
                    remove(self.path / "pool")

    def _seal(self, pool: Sequence[Tokens], n_shards: int) -> None:
        """Write the list that ends a pass, once no shard is missing."""
        if self.is_complete() or not all(
            self._has(_shard_name(k), "shard") for k in range(n_shards)
        ):
            return
        meta = {"identity": self._identity, "n_shards": n_shards, "n_examples": len(pool)}
        with staged(self.path / "pool", kind="pool", meta=meta) as stage:
            stage.write_json("ids.json", [t.id for t in pool])

    def is_stale(self) -> bool:
        """Return whether the folder holds a pass of another identity, finished or not."""
        try:
            self._has("targets", "targets")
            self._has("pool", "pool")
        except IncompatibleRunError:
            return True
        return False

    def is_complete(self) -> bool:
        """Return whether the whole pass is on disk.

        Raises:
            IncompatibleRunError: the folder holds a pass of another identity.
        """
        return self._has("pool", "pool")

    def load(self, targets: Sequence[Target]) -> StoredPool:
        """Read the finished pass, examples in the pool's order.

        Args:
            targets: those of the pass, in its order; their tasks and groups are taken as they are
                now, since no gradient depends on them.

        Raises:
            CorruptFileError: a part is missing or damaged.
            IncompatibleRunError: a part belongs to another pass.
        """
        return self._read(
            [t.tokens.id for t in targets], [t.task for t in targets], [t.group for t in targets]
        )

    @classmethod
    def finished(cls, path: Path) -> "GradientStore":
        """Return the store of a finished pass, whatever it was made of.

        Raises:
            CorruptFileError: there is none, or it is damaged.
        """
        return cls(path, open_dir(path / "pool", kind="pool").meta["identity"])

    def read_again(self, groups: Mapping[str, str] | None = None) -> StoredPool:
        """Read the finished pass with the targets that it was made for.

        Args:
            groups: subtasks by target id, in place of those of the pass.

        Raises:
            CorruptFileError: a part is missing or damaged.
        """
        table = self._open("targets", "targets").read_table("targets.parquet")
        ids: list[str] = table["id"].to_pylist()
        own: list[str] = table["group"].to_pylist()
        new = [(groups or {}).get(i, group) for i, group in zip(ids, own, strict=True)]
        return self._read(ids, table["task"].to_pylist(), new)

    def _read(
        self, target_ids: Sequence[str], tasks: Sequence[str], groups: Sequence[str]
    ) -> StoredPool:
        # Here, so that a pass killed right after its last write does not leave them for ever.
        self._directions.unlink(missing_ok=True)
        done = self._open("pool", "pool")
        ids: list[str] = done.read_json("ids.json")
        tables: list[pa.Table] = []
        dots: list[np.ndarray] = []
        for k in range(done.meta["n_shards"]):
            shard = self._open(_shard_name(k), "shard")
            tables.append(shard.read_table("examples.parquet"))
            dots.append(_numpy(shard.read_tensors("dots.safetensors")["dots"]))
        table = pa.concat_tables(tables)
        place = {i: n for n, i in enumerate(table["id"].to_pylist())}
        order = [place[i] for i in ids]
        gram = self._open("targets", "targets").read_tensors("gram.safetensors")["gram"]
        facts = GradientFacts(
            np.concatenate(dots)[order],
            table["norm"].to_numpy()[order],
            _numpy(gram),
            tuple(target_ids),
            tuple(groups),
        )
        return StoredPool(
            tuple(ids),
            facts,
            table["loss"].to_numpy()[order],
            table["n_target_tokens"].to_numpy()[order],
            tuple(tasks),
        )

    @property
    def _directions(self) -> Path:
        return self.path / "directions.bin"

    def _part(self, name: str) -> str:
        return f"{self.path.name}/{name}"

    def _room(
        self,
        engine: GradientEngine,
        n_pool: int,
        n_targets: int,
        twin: "GradientStore | None",
    ) -> Directions:
        """Make room for the pass, and open its target gradients where they are still good.

        Missing ones are those of `twin`, where there is one.
        """
        file = self._directions
        self.path.mkdir(parents=True, exist_ok=True)
        if self._has("targets", "targets"):
            self._check_directions()
        if twin is not None and not self._has("targets", "targets"):
            share_file(twin._directions, file)
        sizes = {name: p.numel() for name, p in engine.parameters.items()}
        n_bytes = 4 * n_targets * (sum(sizes.values()) + n_pool) + 64 * n_pool
        there = file.stat().st_size if file.exists() else 0
        check_free_space(self.path, max(0, n_bytes - there))
        return Directions(file, sizes, n_targets, _device(engine))

    def _shard(
        self,
        engine: GradientEngine,
        k: int,
        batches: Sequence[Sequence[Tokens]],
        products: Sequence[tuple["GradientStore", Products]],
        pad_id: int,
        hands: Hands,
        advance: Advance,
    ) -> int | None:
        """Compute a shard that is missing and ours; return how many that were, None: not ours.

        The other stores get theirs from the same rows.
        """
        name, n_examples = _shard_name(k), sum(map(len, batches))
        if self._has(name, "shard"):
            advance(n_examples)
            return 0
        with hands.claim(self._part(name), k) as is_ours:
            if not is_ours:
                return None
            if self._has(name, "shard"):  # since we looked
                advance(n_examples)
                return 0
            columns = _empty_columns()
            missing = [(s, p) for s, p in products if s is self or not s._has(name, "shard")]
            for items in batches:
                _run_batch(engine, items, [p for _, p in missing], pad_id, columns)
                advance(len(items))
            # Ours at last: where it is, others look for nothing of the rest.
            for store, own in reversed(missing):
                store._write_shard(name, dict(columns), own)
            kill_point(KillPoint.STORE_SHARD_DONE)
        return 1

    def _check_directions(self) -> None:
        """Drop targets whose directions are gone: they have to be run again.

        Raises:
            CorruptFileError: the directions are not those that the targets left.
        """
        file = self._directions
        if not file.exists():
            shutil.rmtree(self.path / "targets")
            return
        expected, found = self._open("targets", "targets").meta.get("directions"), sha256_file(file)
        if found != expected:
            raise CorruptFileError(
                "the target gradients are not those that the pass wrote",
                where=str(file),
                why=f"expected sha256 {expected}, found {found}",
                do="remove this file: the same command computes it again and goes on",
            )

    def _has(self, name: str, kind: str) -> bool:
        if not is_complete(self.path / name, kind=kind):
            return False
        self._open(name, kind)
        return True

    def _open(self, name: str, kind: str) -> Opened:
        opened = open_dir(self.path / name, kind=kind)
        found = opened.meta["identity"]
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
        return opened

    def _run_targets(
        self,
        engine: GradientEngine,
        targets: Sequence[Target],
        directions: Directions,
        pad_id: int,
        progress: Progress,
    ) -> list[float]:
        """Write target gradients into `directions`, and return the losses of the targets."""
        losses: list[float] = []
        with progress.phase("target gradients", len(targets), "examples") as advance:
            for first in range(0, len(targets), _TARGET_BATCH):
                some = [t.tokens for t in targets[first : first + _TARGET_BATCH]]
                batch = collate(some, pad_id=pad_id, device=_device(engine))

                def keep(name: str, rows: Rows, first: int = first) -> None:
                    directions.write(name, first, rows.dense())

                losses += engine.run(batch, keep).tolist()
                advance(len(some))
        return losses

    def _write_targets(
        self,
        engine: GradientEngine,
        targets: Sequence[Target],
        losses: Sequence[float],
        directions: Directions,
        projection: Projection | None,
    ) -> None:
        """Write what the pass keeps of its targets once their gradients are in `directions`."""
        if projection is None:
            tensors = {"gram": directions.gram()}
        else:
            F = target_features(directions, list(engine.parameters), projection, len(targets))
            tensors = {"gram": (F.double() @ F.double().mT).cpu(), "features": F.cpu()}
        gram = tensors["gram"]
        _refuse_nan([t.tokens.id for t in targets], losses, gram.diagonal().tolist())
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
        meta = {"identity": self._identity, "directions": sha256_file(self._directions)}
        with staged(self.path / "targets", kind="targets", meta=meta) as stage:
            stage.write_table("targets.parquet", table)
            stage.write_tensors("gram.safetensors", tensors)

    def _products(
        self,
        engine: GradientEngine,
        directions: Directions,
        adam: AdamSteps | None,
        projection: Projection | None,
    ) -> Products:
        if projection is None:
            return ExactProducts(directions, engine.parameters, adam)
        # Not made anew: a Rademacher matrix costs seconds to draw.
        features = self._open("targets", "targets").read_torch("gram.safetensors")["features"]
        return ProjectedProducts(features.to(_device(engine)), projection, engine.parameters, adam)

    def _write_shard(self, name: str, columns: dict[str, list[Any]], products: Products) -> None:
        dots, norms = products.results()
        table = pa.table({"id": columns.pop("id"), "norm": norms.tolist(), **columns})
        with staged(self.path / name, kind="shard", meta={"identity": self._identity}) as stage:
            stage.write_table("examples.parquet", table)
            stage.write_tensors("dots.safetensors", {"dots": dots})


def _shard_name(k: int) -> str:
    return f"shard-{k:05d}"


def _probe_as_the_first(
    engine: GradientEngine,
    targets: Sequence[Target],
    pool: Sequence[Tokens],
    shards: Sequence[Sequence[Sequence[int]]],
    pad_id: int,
) -> None:
    """Probe the engine on the batch on which the process that ran the targets probed its own.

    What fails the probe takes another route to its numbers, with other roundings.
    """
    items = [t.tokens for t in targets[:_TARGET_BATCH]]
    if len(items) == 1:  # no last word: see `GradientEngine.probe`
        batches = (batch for shard in shards for batch in shard if len(batch) > 1)
        items = [pool[i] for i in next(batches, [])] or items
    engine.probe(collate(items, pad_id=pad_id, device=_device(engine)))


def _empty_columns() -> dict[str, list[Any]]:
    return {"id": [], "loss": [], "n_target_tokens": []}


def _run_batch(
    engine: GradientEngine,
    items: Sequence[Tokens],
    products: Sequence[Products],
    pad_id: int,
    columns: dict[str, list[Any]],
) -> None:
    def take(name: str, rows: Rows) -> None:
        for one in products:
            one.take(name, rows)

    batch = collate(items, pad_id=pad_id, device=_device(engine))
    losses = engine.run(batch, take).tolist()
    for one in products:
        norm2 = one.close_batch(len(items))
        _refuse_nan([t.id for t in items], losses, norm2.tolist())
    columns["id"] += [t.id for t in items]
    columns["loss"] += losses
    columns["n_target_tokens"] += [int(t.is_target.sum()) for t in items]


def _device(engine: GradientEngine) -> torch.device:
    return next(iter(engine.parameters.values())).device


def _numpy(values: Any) -> np.ndarray:  # noqa: ANN401
    return values.numpy() if isinstance(values, Tensor) else np.asarray(values)


def _refuse_nan(ids: Sequence[str], losses: Sequence[float], norms2: Sequence[float]) -> None:
    facts = zip(ids, losses, norms2, strict=True)
    bad = [i for i, *numbers in facts if not np.isfinite(numbers).all()]
    if bad:
        raise DataError(
            f"the loss or gradient of {len(bad)} examples is not a finite number",
            where=f"example {', '.join(bad[:3])}",
            why="the model overflowed on them, or its weights hold NaN",
            do="use model.dtype=float32; if that does not help, take these rows out",
        )


def _shards(
    lengths: Sequence[int], token_budget: int, shard_examples: int
) -> list[list[list[int]]]:
    """Return batches of example numbers, grouped into shards of about `shard_examples`."""
    shards: list[list[list[int]]] = [[]]
    n = 0
    for batch in length_sorted_batches(lengths, token_budget=token_budget):
        if n >= shard_examples:
            shards.append([])
            n = 0
        shards[-1].append(batch)
        n += len(batch)
    return shards
