"""What the steps of one run share: data, tokens, the base model, and where results lie."""

import json
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data import Tokens, read_examples
from selectune.digests import digest as digest
from selectune.errors import CorruptFileError, IncompatibleRunError
from selectune.files import Alone, Hands, is_complete, open_dir, write_file
from selectune.files.disk import remove
from selectune.gradients.facts import StateFacts
from selectune.gradients.store import StoredPool
from selectune.gradients.view import View
from selectune.models import (
    Base,
    choose_device,
    choose_precision,
    load_base,
    load_tokenizer,
    model_is_package,
    pad_id_of,
)
from selectune.pipeline.measure import Measured
from selectune.pipeline.prepare import (
    Assets,
    Prepared,
    PreparedTokens,
    read_data,
    resolve,
    tokenize_all,
)
from selectune.progress import Progress
from selectune.recipe import Recipe, TuneSection
from selectune.training import TuneResult, tune
from selectune.training.chosen import chosen_method
from selectune.training.method import Method
from selectune.training.tune import Phase, find_tuned


class Ground:
    """The shared ground of a run.

    Args:
        recipe: what to do.
        out: the run's folder.
        shared: where work that several runs have in common lies under its fingerprint; None keeps
            everything in `out` under plain names.
        tasks: the target tasks this run is about; None for all of the recipe's.
        progress: told of every long step.
        checkpoint_epochs: epochs of the warm-up that end in a checkpoint, for scorers that read
            them; None to look which ones the recipe names.
        asked: the recipe that names the scorers which will read gradients; None: `recipe` does.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        shared: Path | None,
        tasks: Sequence[str] | None,
        progress: Progress,
        checkpoint_epochs: int | None = None,
        asked: Recipe | None = None,
    ) -> None:
        self.recipe, self.out, self.shared = recipe, out, shared
        self.asked = asked or recipe
        self.checkpoint_epochs = checkpoint_epochs
        self.progress = progress
        self._tasks = tasks
        self.costs: dict[str, dict[str, Any]] = {}
        self._prices: dict[str, dict[Path, dict[str, Any]]] = {}
        self._base_fingerprint: str | None = None
        self.expected_base: str | None = None
        self.hands: Hands = Alone()  # others, where processes share the work
        self.stored: StoredPool | None = None
        # Passes at the first n checkpoints with their learning rates, by n and how they look.
        self.passes: dict[tuple[int, View], list[tuple[StoredPool, float]]] = {}
        self.states: StateFacts | None = None

    @cached_property
    def assets(self) -> Assets:
        """The recipe's model and data, `demo:` names made paths."""
        return resolve(self.recipe)

    @cached_property
    def prepared(self) -> Prepared:
        """Pool, targets and held-out examples."""
        prepared = read_data(self.assets.data)
        for note in prepared.notes:
            self.progress.note(note)
        return prepared

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(self.assets.model)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """A hash of how text becomes tokens."""
        core: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        words = self.tokenizer.get_vocab() if core is None else core.to_str()
        special = self.tokenizer.special_tokens_map
        template = self.tokenizer.chat_template
        return digest({"words": words, "special": str(special), "template": template})

    @cached_property
    def tokens(self) -> PreparedTokens:
        """Tokens of pool and targets."""
        tokens = tokenize_all(self.prepared, self.assets, self.tokenizer)
        if tokens.pool.n_truncated:
            self.progress.note(f"{tokens.pool.n_truncated} pool examples were cut to max_length")
        if tokens.dropped:
            self.progress.note(f"{len(tokens.dropped)} pool examples kept no target token: dropped")
        for task, targets in tokens.targets.items():
            if n := len(targets.empty_ids):
                self.progress.note(f"{n} targets of {task} kept no target token: left out")
        return tokens

    @cached_property
    def texts(self) -> list[str]:
        """Plain text to measure forgetting with; empty where the recipe names none."""
        path = self.assets.text
        if path is None:
            return []
        rows = read_examples(path, what="text", form="text")
        return [e.content["text"] for e in rows]

    @property
    def tasks(self) -> list[str]:
        """The target tasks this run is about."""
        return list(self._tasks or self.prepared.targets)

    def focus(self, tasks: Sequence[str]) -> None:
        """Be about other tasks from now on; the gradient store serves all of them."""
        self._tasks = list(tasks)

    def borrow(self, other: "Ground") -> None:
        """Take data and tokens from a ground of the same data section, instead of reading anew."""
        is_same = self.recipe.model == other.recipe.model
        # An emulator of the other's model reads the same tokens, and is another model.
        model = other.assets.model if is_same else self.recipe.model
        self.assets = replace(other.assets, model=model)
        self.prepared = other.prepared
        self.tokenizer, self.tokens = other.tokenizer, other.tokens
        self.texts = other.texts

    @property
    def dropped(self) -> dict[str, str]:
        """Pool examples that are no candidates, with the reason."""
        return {**self.prepared.dropped, **self.tokens.dropped}

    def base(self) -> Base:
        """Load the untouched base; every step that trains or adapts it takes a fresh one.

        Raises:
            IncompatibleRunError: it is not the base that earlier steps of the run saw.
        """
        section = self.assets.model
        # What trains on an emulator goes back to the model: its start is not to be rounded.
        as_stored = model_is_package(section.base) and self._precision != "float32"
        base = load_base(section, adapter=self.recipe.adapter, as_stored=as_stored)
        if base.fingerprint != (self.expected_base or base.fingerprint):
            raise IncompatibleRunError(
                "the base model has changed since the run began",
                where=self.assets.model.base,
                why=f"the scores were made with {self.expected_base}, its weights are now "
                f"{base.fingerprint}",
                do="choose another output folder, or put the base back",
            )
        self._base_fingerprint = self.expected_base = base.fingerprint
        return base

    @property
    def seen_base(self) -> str | None:
        """The fingerprint of the base's weights, None as long as no step needed them."""
        return self._base_fingerprint

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base's weights."""
        if self._base_fingerprint is None:
            self.base()
        assert self._base_fingerprint is not None
        return self._base_fingerprint

    def place(self, kind: str, name: str, fingerprint: str) -> Path:
        """Return the folder of one result: a plain name, or its fingerprint where it is shared."""
        if self.shared is not None:
            return self.shared / kind / fingerprint[:16]
        return self.out / name

    def is_done(self, path: Path, kind: str, fingerprint: str) -> bool:
        """Return whether a staged result is there, made from the same inputs.

        One of other inputs is stale and removed: `Record` lets no input change unless it was
        allowed by name.

        Raises:
            CorruptFileError: it is damaged.
        """
        if not is_complete(path, kind=kind):
            return False
        if open_dir(path, kind=kind).meta["fingerprint"] == fingerprint:
            return True
        remove(path)
        return False

    @property
    def _precision(self) -> str:
        section = self.assets.model
        return choose_precision(section.dtype, choose_device(section.device))

    @property
    def _numerics(self) -> dict[str, Any]:
        """What decides the numbers of a training, beside its examples and options."""
        return {
            "seed": self.recipe.seed,
            "pad_id": pad_id_of(self.tokenizer),
            "precision": self._precision,
            "device": choose_device(self.assets.model.device).type,
        }

    def trained(
        self,
        items: Sequence[Tokens],
        options: TuneSection,
        *,
        path: Path,
        fingerprint: str,
        target: Sequence[Tokens] = (),
    ) -> TuneResult | None:
        """Return a finished training without loading a model; None where there is none.

        The arguments are those of `train`; where the weights started follows from them.
        """
        method = chosen_method(options)
        return find_tuned(
            items, options, output=path, fingerprint=fingerprint, method=method, target=target,
            **self._numerics,
        )  # fmt: skip

    def train(
        self,
        model: nn.Module,
        items: Sequence[Tokens],
        options: TuneSection,
        *,
        path: Path,
        fingerprint: str,
        name: str,
        target: Sequence[Tokens] = (),
        stop_after_epochs: int | None = None,
        method: Method | None = None,
        phase: Phase | None = None,
    ) -> TuneResult:
        """Train a model on examples, resume, or read what is finished; told to the progress.

        Args:
            model: what trains.
            items: the examples.
            options: learning rate, epochs, training method and so on.
            path: where checkpoints and the result lie.
            fingerprint: of everything but examples and options.
            name: of the arm.
            target: examples that stand for the task, for methods that look at them.
            stop_after_epochs: end there, whatever the schedule.
            method: acts during training; None for the one that the options name.
            phase: the part of a training that sees these examples; None for all of it.
        """
        step = options.batch_size * options.accumulation
        n_steps = (stop_after_epochs or options.epochs) * -(-len(items) // step)
        n_steps = (phase.end if phase else None) or n_steps
        method = method or chosen_method(options)
        with self.progress.phase(name, n_steps, "steps") as advance:

            def log(line: dict[str, Any]) -> None:
                if "step" in line:
                    advance(1)
                elif "warning" in line:
                    self.progress.note(str(line["warning"]))
                elif line.get("start"):
                    advance(int(line["start"]))

            def run() -> TuneResult:
                return tune(
                    model,
                    items,
                    options,
                    output=path,
                    fingerprint=fingerprint,
                    name=name,
                    log=log,
                    method=method,
                    target=target,
                    stop_after_epochs=stop_after_epochs,
                    phase=phase,
                    **self._numerics,
                )

            try:
                return run()
            except IncompatibleRunError:
                if not isinstance(self.hands, Alone):
                    raise  # another process may be using it
                remove(path)  # stale, as in `is_done`
                return run()

    def making(self, path: Path) -> AbstractContextManager[None]:
        """Hold a result while it is looked for or made: of several processes one makes it."""
        # What is shared may lie outside of this run's folder: kind and fingerprint name it.
        return self.hands.turn(f"{path.parent.name}/{path.name}", path.exists)

    @contextmanager
    def charge(self, step: str, path: Path) -> Generator[None]:
        """Measure a step whose result goes to `path`, and keep the price beside it."""
        with Measured() as measured:
            yield
        self.keep_price(path, measured)
        self.recall(step, path)

    def keep_price(self, path: Path, price: Measured, *, is_part: bool = False) -> None:
        """Keep what a result cost beside it.

        Args:
            path: of the result.
            price: what it cost this process.
            is_part: others may have done the rest of it.
        """
        part = f".{self.hands.name}" if is_part and self.hands.name else ""
        name = f"{path.name}{part}.cost.json"
        write_file(path.with_name(name), json.dumps(price.to_json()).encode())

    def recall(self, step: str, path: Path) -> None:
        """Read what a finished step cost: seconds of all processes that shared it, highest peak.

        A step of several results, as the evaluation of several tasks, costs what all of them do.
        """
        found: dict[str, Any] = {}
        for file in sorted(path.parent.glob(f"{path.name}.*cost.json")):
            try:
                price: dict[str, Any] = json.loads(file.read_bytes())
                for key, value in price.items():
                    if key == "seconds":
                        found[key] = round(found.get(key, 0.0) + value, 3)
                    else:
                        found[key] = max(found.get(key, 0), value)
            except (ValueError, TypeError, AttributeError) as error:
                raise CorruptFileError("a price cannot be read", where=str(file)) from error
        if found:
            self._prices.setdefault(step, {})[path] = found
            parts = self._prices[step].values()
            self.costs[step] = {
                key: round(sum(p[key] for p in parts), 3) if key == "seconds"
                else max(p.get(key, 0) for p in parts)
                for key in found
            }  # fmt: skip

    def forget(self, path: Path) -> None:
        """Remove a result of other inputs, and what it cost."""
        remove(path)
        for file in path.parent.glob(f"{path.name}.*cost.json"):
            file.unlink()
