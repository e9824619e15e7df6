"""From a recipe's file names to candidates, targets and held-out examples, all checked."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from selectune.data import (
    Example,
    ExampleSet,
    Tokenized,
    Tokens,
    demo_assets,
    duplicates,
    leakage,
    read_examples,
    tokenize,
)
from selectune.data.demo import COMMONSENSE, DemoAssets
from selectune.errors import ConfigError, DataError, nearest
from selectune.models import context_length
from selectune.recipe import DataSection, ModelSection, Recipe
from selectune.recipe.sections import ONLY_TASK
from selectune.selection import Selection

DEMO = "demo:"
Paths = str | list[str] | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Assets:
    """Where a recipe's names lead: `demo:` names stand for files in the user's cache."""

    model: ModelSection
    data: DataSection
    text: str | None = None  # of evaluate.text


class DemoNames:
    """Turns `demo:` names into paths; each part of the demo is fetched once, when it is named."""

    def __init__(self) -> None:
        self._fetched: dict[str, dict[str, Path]] = {}

    def path(self, name: str) -> str:
        """Return the path that a `demo:` name stands for, any other name as it is.

        Raises:
            ConfigError: an unknown demo name.
            StorageError: the demo's parts cannot be fetched.
        """
        if not name.startswith(DEMO):
            return name
        # "demo:pool/30" asks for 30 pool examples per task.
        size = name.removeprefix(f"{DEMO}pool/")
        if not size.isdigit():
            size = ""
        is_other = name.startswith(f"{DEMO}{COMMONSENSE.name}/")
        part = COMMONSENSE.name if is_other else size
        if part not in self._fetched:
            self._fetched[part] = (
                _commonsense()
                if is_other
                else _demo_names(demo_assets(n_pool=int(size)) if size else demo_assets())
            )
        known = self._fetched[part]
        if size:
            name = f"{DEMO}pool"
        if name not in known:
            raise ConfigError(
                f'"{name}" is no part of the demo', where="recipe", do=nearest(name, known)
            )
        return str(known[name])

    def paths(self, spec: Paths) -> Paths:
        """Return the same for one name, a list of them or a mapping to them."""
        if isinstance(spec, str):
            return self.path(spec)
        if isinstance(spec, Mapping):
            return {name: self.path(value) for name, value in spec.items()}
        return [self.path(value) for value in spec]


def resolve(recipe: Recipe) -> Assets:
    """Return the recipe's model and data sections with every `demo:` name made a path.

    Raises:
        ConfigError: an unknown demo name, or held-out tasks that are no target tasks.
        StorageError: the demo's parts cannot be fetched.
    """
    demo, data = DemoNames(), recipe.data
    changes = {key: demo.paths(getattr(data, key)) for key in ("pool", "target")}
    if data.heldout is not None:
        changes["heldout"] = demo.paths(data.heldout)
        tasks, held = _tasks(data.target), _tasks(data.heldout)
        if strange := sorted(held.keys() - tasks.keys()):
            raise ConfigError(
                f'held-out task "{strange[0]}" is no target task',
                where="data.heldout",
                why="evaluation is by task; data.heldout is named as data.target is",
                do=nearest(strange[0], tasks),
            )
    return Assets(
        recipe.model.model_copy(update={"base": demo.path(recipe.model.base)}),
        data.model_copy(update=changes),
        None if recipe.evaluate.text is None else demo.path(recipe.evaluate.text),
    )


def _demo_names(assets: DemoAssets, mix: str = "") -> dict[str, Path]:
    home = f"{DEMO}{mix}/" if mix else DEMO
    return {
        f"{DEMO}model": assets.model,
        f"{home}pool": assets.pool,
        **{f"{home}target/{task}": file for task, file in assets.targets.items()},
        **{f"{home}heldout/{task}": file for task, file in assets.heldout.items()},
        **{f"{home}text/{part}": file for part, file in assets.texts.items()},
    }


def _commonsense() -> dict[str, Path]:
    # About as much as OpenBookQA has, the smallest of the tasks.
    assets = demo_assets(n_pool=240, n_target=48, n_heldout=100, mix=COMMONSENSE)
    return _demo_names(assets, COMMONSENSE.name)


def _tasks(spec: str | Mapping[str, str]) -> dict[str, str]:
    return {ONLY_TASK: spec} if isinstance(spec, str) else dict(spec)


@dataclass(frozen=True)
class Prepared:
    """What a run works on.

    Args:
        rows: every row of the pool.
        candidates: those that may be chosen.
        dropped: why the others may not, by id.
        targets: target examples by task.
        heldout: held-out examples by task; empty where the recipe names none.
        notes: what a person should know, in sentences.
    """

    rows: tuple[Example, ...]
    candidates: tuple[Example, ...]
    dropped: Mapping[str, str]
    targets: Mapping[str, tuple[Example, ...]]
    heldout: Mapping[str, tuple[Example, ...]]
    notes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids, which hash all contents."""
        digest = hashlib.sha256()
        for part in (self.rows, *self.targets.values(), *self.heldout.values()):
            digest.update("\n".join(sorted(e.id for e in part)).encode() + b"\0")
        return digest.hexdigest()[:32]

    @cached_property
    def sources(self) -> dict[str, str]:
        """Source of every candidate, by id."""
        return {e.id: e.source for e in self.candidates}

    def chosen(self, selection: Selection) -> list[Example]:
        """Return the examples of a selection, best first."""
        return selection.examples(self.candidates)


def read_data(data: DataSection) -> Prepared:
    """Read pool, targets and held-out data; drop leaks and repeats as the recipe says.

    Raises:
        DataError: a file is missing, malformed or empty, or leakage is found and forbidden.
    """
    pool = read_examples(data.pool, what="pool", form=data.format)
    targets = read_tasks(data.target, "target", data.format)
    heldout = read_tasks(data.heldout, "heldout", data.format) if data.heldout else {}
    notes = [f"pool: {len(pool)} rows, read as {pool.form}"]
    dropped: dict[str, str] = {}
    repeats = duplicates(pool)
    if repeats.n and data.duplicates == "drop":
        dropped |= {i: f"equals the earlier row {first}" for i, first in repeats.matches.items()}
    if repeats.n:
        verb = "dropped" if data.duplicates == "drop" else "kept"
        notes.append(f"{repeats.n} pool rows equal an earlier one: {verb}")
    leaks = leakage(pool, targets, heldout)
    if leaks.n and data.leakage == "error":
        raise DataError(
            f"{leaks.n} pool rows equal a target or held-out row",
            where=", ".join(list(leaks.matches)[:3]),
            why="trained on them, the evaluation would measure memory",
            do="take them out, or set data.leakage=drop",
        )
    if leaks.n:
        verb = "dropped" if data.leakage == "drop" else "kept, and the evaluation is tainted"
        notes.append(f"{leaks.n} pool rows equal a target or held-out row: {verb}")
    if data.leakage == "drop":
        dropped |= {i: f"leak: equals {other}" for i, other in leaks.matches.items()}
    both = leakage(_all(targets), {}, heldout)
    if both.n and data.leakage == "error":
        raise DataError(
            f"{both.n} target rows equal a held-out row",
            where=", ".join(list(both.matches)[:3]),
            why="the selection would have seen what it is evaluated on",
            do="take them out, or set data.leakage=drop",
        )
    if both.n:
        verb = "dropped" if data.leakage == "drop" else "kept, and the evaluation is tainted"
        notes.append(f"{both.n} target rows equal a held-out row: {verb}")
    if data.leakage == "drop":
        targets = {t: tuple(e for e in es if e.id not in both.matches) for t, es in targets.items()}
    for task, examples in targets.items():
        if not examples:
            raise DataError(
                f"no target row of task {task} is left",
                where=str(data.target),
                why="all of them equal held-out rows, which the selection may not see",
                do="give target rows that data.heldout does not hold",
            )
    candidates = tuple(e for e in pool if e.id not in dropped)
    if not candidates:
        raise DataError(
            "no pool row is left to choose from",
            where=str(data.pool),
            why=f"all {len(pool)} rows equal target, held-out or earlier rows",
            do="give a pool that differs from the target",
        )
    return Prepared(tuple(pool), candidates, dropped, targets, heldout, tuple(notes))


def read_tasks(
    spec: str | Mapping[str, str], what: str, form: str
) -> dict[str, tuple[Example, ...]]:
    """Return the examples of every task; a file without a name is one task.

    Raises:
        DataError: a file is missing, malformed or empty.
    """
    found: dict[str, tuple[Example, ...]] = {}
    for task, path in _tasks(spec).items():
        examples: ExampleSet = read_examples(path, what=what, form=form)
        found[task] = tuple(examples)
    return found


def _all(tasks: Mapping[str, Sequence[Example]]) -> list[Example]:
    return [example for examples in tasks.values() for example in examples]


@dataclass(frozen=True)
class PreparedTokens:
    """The tokens of a run, and which candidates lost all their target tokens to the cut."""

    pool: Tokenized
    targets: Mapping[str, Tokenized]
    dropped: Mapping[str, str]

    @cached_property
    def by_id(self) -> dict[str, Tokens]:
        """Pool tokens by example id."""
        return {t.id: t for t in self.pool}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all token ids and loss masks, in pool order."""
        digest = hashlib.sha256()
        for part in (self.pool, *self.targets.values()):
            for t in part:
                digest.update(t.id.encode())
                digest.update(t.input_ids.tobytes() + t.is_target.tobytes())
        return digest.hexdigest()[:32]


def tokenize_all(
    prepared: Prepared, assets: Assets, tokenizer: PreTrainedTokenizerBase
) -> PreparedTokens:
    """Tokenise pool and targets.

    Raises:
        ConfigError: `data.max_length` is past the model's context.
        DataError: too many examples have no target token left.
    """
    data = assets.data
    context = context_length(assets.model)
    if context is not None and data.max_length > context:
        raise ConfigError(
            f"data.max_length is {data.max_length}, the model's context is {context}",
            where="data.max_length",
            why="positions past the context have no meaning to the model",
            do=f"use data.max_length={context} or less",
        )

    def run(examples: Sequence[Example]) -> Tokenized:
        return tokenize(
            examples,
            tokenizer,
            max_length=data.max_length,
            loss_on=data.loss_on,
            max_empty_share=data.max_empty,
        )

    pool = run(prepared.candidates)
    dropped = dict.fromkeys(pool.empty_ids, "no target token is left within data.max_length")
    targets = {task: run(examples) for task, examples in prepared.targets.items()}
    for what, tokenized in {"pool": pool, **{f"target {t}": x for t, x in targets.items()}}.items():
        if not len(tokenized):
            raise DataError(
                f"no example of the {what} has a target token within {data.max_length} tokens",
                where="data.max_length",
                why="their prompts alone fill it",
                do="raise data.max_length, or shorten the prompts",
            )
    return PreparedTokens(pool, targets, dropped)
