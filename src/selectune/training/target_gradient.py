"""The target gradient of every layer: from a few target examples, refreshed as training goes on."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from selectune.data import narrowed
from selectune.errors import ConfigError
from selectune.gradients.engine import GradientEngine
from selectune.gradients.kernels import Rows, total
from selectune.training.layers import Layer
from selectune.training.method import BatchSource
from selectune.training.ranks import add_up, rank, world

_STREAM = 1  # of the seed; 2 draws the picks


class TargetGradient:
    """One mean gradient per parameter, kept between refreshes.

    Args:
        engine: of the model.
        layers: whose parameters are wanted.
        source: of target examples.
        size: target examples per refresh, drawn anew each time, over all processes.
        momentum: share of the old gradient that stays.
        seed: of the draws.
        apart: enters a state in which the model's own gates stand open and dropout is off.
    """

    def __init__(
        self,
        engine: GradientEngine,
        layers: Sequence[Layer],
        source: BatchSource,
        *,
        size: int,
        momentum: float,
        seed: int,
        apart: Callable[[], AbstractContextManager[None]],
    ) -> None:
        if size % world():
            raise ConfigError(
                f"{size} target examples cannot be split over {world()} processes",
                where="target_batch",
                do=f"use a multiple of {world()}",
            )
        self._engine, self._layers, self._source = engine, layers, source
        self._size, self._momentum, self._seed = min(size, source.n), momentum, seed
        self._apart = apart
        self.gradients: dict[str, Tensor] = {}

    def refresh(self, step: int) -> list[float | None]:
        """Take the target gradient anew; return per layer its cosine with the one before."""
        rng = np.random.default_rng([self._seed, step, _STREAM])
        drawn = rng.choice(self._source.n, self._size, replace=False)[rank() :: world()]
        found: dict[str, Tensor] = {}

        def add(name: str, rows: Rows) -> None:
            share = total(rows).div_(self._size)
            found[name] = found[name].add_(share) if name in found else share

        # Fewer targets than processes leave one without any, and an example without a target
        # token asks for nothing.
        if drawn.size and (batch := self._source.draw(drawn.tolist())).ids:
            with self._apart():
                for part in narrowed(batch):
                    self._engine.run(part, add)
        for name, p in self._engine.parameters.items():  # the same ones in all processes
            if p.requires_grad and name not in found:
                found[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        names = sorted(found)
        new = dict(zip(names, add_up([found[name] for name in names]), strict=True))
        cosines = [_cosine(layer.parameters, new, self.gradients) for layer in self._layers]
        if self._momentum:
            for name in new.keys() & self.gradients.keys():
                new[name].lerp_(self.gradients[name], self._momentum)
        self.gradients = new
        return cosines


def _cosine(
    names: Mapping[str, object], new: Mapping[str, Tensor], old: Mapping[str, Tensor]
) -> float | None:
    both = [(new[n].flatten(), old[n].flatten()) for n in names if n in new and n in old]
    if not both:
        return None
    a, b = (torch.cat(list(parts)) for parts in zip(*both, strict=True))
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else None
