"""Methods that act during training: one implementation, three ways to use it.

    with method.attach(model, optimizer): ...                # around a bare PyTorch loop
    Trainer(..., callbacks=[method.callback()])              # transformers and trl
    tune: {method: ist, options: {layers: 0.25}}             # a recipe

A method is a frozen dataclass of its options. `start` hooks it onto a model and gives a `Session`,
which is told of every optimizer step and holds all that changes while training.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from selectune.data import Batch
from selectune.errors import ConfigError, IncompatibleRunError

# How a training loss weighs the examples of a batch: by their target tokens (one mean over all
# tokens, as in transformers and trl), or all alike.
Weighting = Literal["token", "example"]
Collate = Callable[[list[Any]], Mapping[str, Any]]
MAX_LENGTH = 512  # tokens of a target example that is given as text


@runtime_checkable
class BatchSource(Protocol):
    """Examples that a method may draw for passes of its own."""

    @property
    def n(self) -> int:
        """How many examples there are."""
        ...

    def draw(self, indices: Sequence[int]) -> Batch:
        """Return these examples as one batch on the model's device."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a method is put to work on.

    Attributes:
        model: the unwrapped model, its `requires_grad` set.
        optimizer: holds every parameter that may train; None where the caller keeps it back.
        seed: of every draw.
        precision: autocast of the method's own passes: "float32", "bfloat16" or "float16".
        pool: the training examples, where the caller can give them.
        target: the examples that stand for the task, where there are some.
        weighting: how the training loss weighs examples, where the caller knows.
        tokenizer: for target examples that are given as text.
        collate_fn: for target examples that are given as tokens.
        max_length: tokens kept of a target example.
        n_steps: optimizer steps of the whole training, where the caller knows.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    seed: int = 0
    precision: str = "float32"
    pool: BatchSource | None = None
    target: BatchSource | None = None
    weighting: Weighting | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    collate_fn: Collate | None = None
    max_length: int = MAX_LENGTH
    n_steps: int | None = None


@runtime_checkable
class Session(Protocol):
    """A method at work on one model."""

    def begin_step(self, step: int) -> None:
        """Prepare optimizer step `step`, counted from 0, before its first forward pass."""
        ...

    def expect(self, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Hear of the labels of the coming forward pass, where the model is not given them.

        Args:
            labels: as in `Batch`.
            ids: of the examples, where they are known.
        """
        ...

    def end_step(self) -> dict[str, Any]:
        """Return the facts of the step just done, as plain JSON values; "stop" true ends it all."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that a resumed run needs: JSON facts, and tensors."""
        ...

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where another session stopped.

        Raises:
            IncompatibleRunError: it worked on other layers, or with other options.
        """
        ...

    def close(self) -> None:
        """Give the model back as it came; a second call does nothing."""
        ...


class Method:
    """The three ways to use a training method; a subclass gives its options and `start`."""

    __slots__ = ()

    @property
    def reads_target(self) -> bool:
        """Whether the method looks at the scene's target examples."""
        return False

    @property
    def optimizer(self) -> type[torch.optim.Optimizer] | None:
        """The only kind of optimizer that the method works with; None for any."""
        return None

    def start(self, scene: Scene) -> Session:
        """Hook the method onto a model.

        Raises:
            SelectuneError: the method cannot work on this model or with these options.
        """
        raise NotImplementedError

    @contextmanager
    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        pool: BatchSource | None = None,
        target: BatchSource | None = None,
        weighting: Weighting | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        precision: str = "float32",
        step: int = 0,
    ) -> Generator[Session]:
        """Use the method in a loop of your own; every `optimizer.step()` counts as one step.

        Args:
            model: with `requires_grad` set on all that may train.
            optimizer: made before, so that it holds the parameters of every layer.
            pool: training examples, for methods with passes of their own.
            target: examples that stand for the task.
            weighting: how the loop's loss weighs examples; None finds it out where it matters.
            tokenizer: for target examples that the method was given as text.
            seed: of every draw.
            precision: autocast of the method's own passes.
            step: the first step, where the loop goes on from an earlier one.
        """
        scene = Scene(model, optimizer, seed, precision, pool, target, weighting, tokenizer)
        session = self.start(scene)
        number = step

        def after_step(*_: object) -> None:
            nonlocal number
            session.end_step()
            number += 1
            session.begin_step(number)

        handle = optimizer.register_step_post_hook(after_step)
        try:
            session.begin_step(number)
            yield session
        finally:
            handle.remove()
            session.close()

    def callback(self, *, seed: int | None = None) -> TrainerCallback:
        """Return the method as a callback of transformers.Trainer or trl.SFTTrainer.

        Args:
            seed: of every draw; None takes the trainer's.
        """
        # It imports this file.
        from selectune.training.method_callback import MethodCallback

        return MethodCallback(self, seed=seed)


def refuse_other_state(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare what a saved state was made for with what it is loaded into.

    Raises:
        IncompatibleRunError: they differ; the first entry that does is named with both values.
    """
    for key, value in own.items():
        if saved.get(key) != value:
            raise IncompatibleRunError(
                f"the saved state has {'another' if key == 'seed' else 'other'} {key}",
                where="training method",
                why=f"it has {saved.get(key)}, this run has {value}",
                do="go on with the model, options and seed it was saved with",
            )


def refuse_missing(scene: Scene, parameters: dict[str, nn.Parameter]) -> None:
    """Check that the optimizer holds every parameter that may train.

    Raises:
        ConfigError: some are missing; they would never move.
    """
    if scene.optimizer is None:
        return
    held = {id(p) for group in scene.optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in held]
    if missing:
        raise ConfigError(
            f"the optimizer lacks {len(missing)} parameters that are to train",
            where=", ".join(missing[:3]),
            why="it was made while they were frozen, so they would never move",
            do="make the optimizer first, then attach the method",
        )
