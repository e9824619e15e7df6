"""Layers that train in turns: the draw, and the session that switches them on and off.

A layer that is off has `requires_grad` off and no gradient, so autograd stops below the lowest
layer that is on, and optimizers leave its weights, moments and step count alone. Draws are
functions of seed and step: nothing of them has to be saved.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selectune.errors import ConfigError
from selectune.models import blocks
from selectune.training.layers import Layer, trainable_layers
from selectune.training.merging import MergedLayers
from selectune.training.method import Scene, refuse_missing, refuse_other_state
from selectune.training.retired import Retire, RetiredStates
from selectune.training.sampling_limits import refuse_unfit

_log = logging.getLogger(__name__)

# Streams of the seed; 1 and 2 draw target examples and picks.
CHOICE, SETS, PASSES = 3, 4, 5


# Options that several samplers have in common.
Share = (
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
)  # a number of layers, or a share of them
Hold = Annotated[int, Field(ge=1, description="steps for which a draw is kept (ours)")]
Merge = Annotated[
    bool,
    Field(
        description="run layers that stand still with merged LoRA factors, which saves time "
        "where hold is more than 1 (ours)"
    ),
]


@runtime_checkable
class Guide(Protocol):
    """Gives the odds of the layers, and learns them where a method does."""

    def look(self, step: int) -> dict[str, Any]:
        """Learn what is due before a step, and return facts about it."""
        ...

    def log_weights(self) -> Float[np.ndarray, " layers"]:
        """Return the logarithm of each layer's weight in the draw, up to a constant."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that a resumed run needs."""
        ...

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where another guide stopped."""
        ...


class Even:
    """All layers alike."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers

    def look(self, step: int) -> dict[str, Any]:
        """Learn nothing."""
        return {}

    def log_weights(self) -> Float[np.ndarray, " layers"]:
        """Return zeros."""
        return np.zeros(self._n_layers)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return nothing."""
        return {}, {}

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Need nothing."""


def log_sigmoid(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return log(1 / (1 + exp(-x))) without underflow."""
    return -np.logaddexp(0.0, -x)


def perturbed(
    log_weights: Float[np.ndarray, " n"], rng: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """Add Gumbel noise: the order of the sums is that of weighted draws without replacement."""
    return log_weights + rng.gumbel(size=len(log_weights))


def draw(log_weights: Float[np.ndarray, " n"], count: int, rng: np.random.Generator) -> list[int]:
    """Draw some of n without replacement, one after the other by their weights.

    Returns:
        Their places, ascending.
    """
    return sorted(np.argsort(-perturbed(log_weights, rng))[:count].tolist())


def count_of(layers: int | float, n_layers: int) -> int:
    """Return how many layers a number or a share of them is, at least 1.

    Raises:
        ConfigError: there are not so many.
    """
    if not isinstance(layers, int):
        # 0.29 * 100 is a little less than 29.
        return max(1, math.floor(layers * n_layers + 1e-9))
    if layers > n_layers:
        raise ConfigError(
            f"{layers} layers cannot be drawn of {n_layers}",
            where="layers",
            why=f"{n_layers} layers of the model have trainable parameters",
            do=f"use at most {n_layers}, or a share such as 0.25",
        )
    return layers


def active_layers(model: nn.Module) -> list[int]:
    """Return the decoder blocks that train right now, by index."""
    return [
        index
        for index, block in enumerate(blocks(model))
        if any(p.requires_grad for p in block.parameters())
    ]


def ready(scene: Scene) -> tuple[Scene, list[Layer]]:
    """Return the scene with the model under DDP's wrapper, and its layers.

    Raises:
        ConfigError: layers of this model cannot be switched on and off.
        SelectionError: no layer of the model trains.
    """
    refuse_unfit(scene)
    if isinstance(scene.model, DistributedDataParallel):
        scene = replace(scene, model=cast("nn.Module", scene.model.module))
    layers = trainable_layers(scene.model)
    refuse_missing(scene, {name: p for layer in layers for name, p in layer.parameters.items()})
    return scene, layers


class LayerSession:
    """Switches the layers of one model on and off.

    Args:
        scene: from `ready`.
        layers: from `ready`.
        guide: gives the odds.
        count: layers that are on at a time.
        hold: steps for which a draw is kept.
        is_merged: whether layers that are off run with merged LoRA factors.
        retire: what becomes of the optimizer's state of a layer that is switched off.
        about: the options, as they stand in a saved state.
    """

    def __init__(
        self,
        scene: Scene,
        layers: Sequence[Layer],
        guide: Guide,
        *,
        count: int,
        hold: int,
        is_merged: bool = False,
        retire: Retire = "keep",
        about: Mapping[str, Any],
    ) -> None:
        self.layers, self.guide = layers, guide
        self.active: list[int] = list(range(len(layers)))  # places among `layers`
        self._seed, self._count, self._hold = scene.seed, count, hold
        self._about = dict(about)
        self._merged = MergedLayers(layers) if is_merged else None
        self._states = RetiredStates(scene.optimizer, retire)
        self._step: int | None = None
        self._window: int | None = None  # the step that the draw was made for
        self._facts: dict[str, Any] = {}
        if is_merged and hold == 1:
            _log.warning(
                "merge=True with hold=1 merges layers anew in every step; set hold to 10 or so"
            )

    def begin_step(self, step: int) -> None:
        """Learn what is due, draw where it is due, and switch."""
        self._step = step
        self._facts = self.guide.look(step)
        window = step - step % self._hold
        if window != self._window:
            rng = np.random.default_rng([self._seed, window, CHOICE])
            self.active, self._window = draw(self.guide.log_weights(), self._count, rng), window
        self._switch(self.active)
        if self._merged is not None:
            self._merged.merge(set(range(len(self.layers))) - set(self.active))

    def expect(self, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Need nothing: layers do not depend on the batch."""

    def end_step(self) -> dict[str, Any]:
        """Return which layers were on."""
        facts = {"active": [self.layers[k].index for k in self.active], **self._facts}
        if self._step == 0:
            facts["layers"] = [layer.index for layer in self.layers]
        return facts

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that a resumed run needs."""
        facts, tensors = self.guide.state()
        return {**self._identity(), "active": self.active, "window": self._window, **facts}, tensors

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where another session stopped.

        Raises:
            IncompatibleRunError: it worked on other layers, with other options or another seed.
        """
        refuse_other_state(facts, self._identity())
        self.guide.load_state(facts, tensors)
        self.active, self._window = list(facts["active"]), facts["window"]
        if self._step is not None:  # in a bare loop the step has begun by now, from nothing
            self.begin_step(self._step)

    def close(self) -> None:
        """Switch everything on."""
        if self._merged is not None:
            self._merged.close()
        self._switch(range(len(self.layers)))

    def _identity(self) -> dict[str, Any]:
        names = [layer.name for layer in self.layers]
        return {"layers": names, "options": self._about, "seed": self._seed}

    def _switch(self, on: Collection[int]) -> None:
        for place, layer in enumerate(self.layers):
            is_on = place in on
            for p in layer.parameters.values():
                p.requires_grad_(is_on)
                if is_on:
                    self._states.bring_back(p)
                else:
                    # A gradient of the step before would move it once more: only None is skipped.
                    p.grad = None
                    self._states.put_away(p)
