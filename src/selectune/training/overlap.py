"""Train until the space of the target gradients has come to rest.

    omega = ||P_1^T P_2||_F^2 / max(r_1, r_2)    P_1, P_2: 95 % spaces at one check and the next

Every so many steps the gradients of the target examples are taken, and their space is compared with
that of the check before. Training ends after the step where it was nearly the same for so many
checks in a row. Of several tasks the one that overlaps least counts.

Ours, after the fourth limitation of GIST: one static space after a warm-up of fixed length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selectune.files import check_free_space
from selectune.gradients.directions import Directions
from selectune.gradients.engine import GradientEngine, dropout_off
from selectune.gradients.kernels import Rows
from selectune.gradients.subspace import overlap, rank_by_energy, spectrum
from selectune.training.method import Method, Scene, Session

SHARE = 0.95  # of the target gradients' energy, as GIST's rule for its rank
_BATCH = 8  # target examples whose dense gradients are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilOverlap(Method):
    """When the space of the target gradients counts as settled.

    Args:
        every: steps between two checks.
        above: overlap of two checks that counts as nearly the same.
        times: how many such overlaps in a row end the training.
        tasks: of each target example, in the scene's order.
        folder: where the target gradients of two checks lie.
    """

    every: int
    above: float
    times: int
    tasks: tuple[str, ...] = field(repr=False)
    folder: Path = field(repr=False)

    @property
    def reads_target(self) -> bool:
        """Yes."""
        return True

    def start(self, scene: Scene) -> Session:
        """Look at the target examples from time to time."""
        return _Watching(self, scene)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """One check: target gradients on disk, and the weights that they belong to."""

    V: Directions
    gram: Float[np.ndarray, "m m"]
    weights: dict[str, Tensor]


class _Watching:
    """The checks of one training."""

    def __init__(self, how: UntilOverlap, scene: Scene) -> None:
        assert scene.target is not None
        self._how, self._scene, self._source = how, scene, scene.target
        with dropout_off(scene.model):  # the engine puts a model in eval mode
            self._engine = GradientEngine(scene.model, precision=scene.precision)
        self._sizes = {name: p.numel() for name, p in self._engine.parameters.items()}
        how.folder.mkdir(parents=True, exist_ok=True)
        check_free_space(how.folder, 8 * self._source.n * sum(self._sizes.values()))
        self._step = self._n_looks = self._n_in_a_row = 0
        self._last: _Look | None = None

    def begin_step(self, step: int) -> None:
        self._step = step

    def expect(self, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Look at no training example."""

    def end_step(self) -> dict[str, Any]:
        if (self._step + 1) % self._how.every:
            return {}
        before, self._last = self._last, self._look()
        if before is None:
            return {"overlap": None}
        found = self._overlap(before, self._last)
        before.V.close()
        self._n_in_a_row = self._n_in_a_row + 1 if found > self._how.above else 0
        return {"overlap": found, "stop": self._n_in_a_row >= self._how.times}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        weights = {} if self._last is None else self._last.weights
        return {"n_in_a_row": self._n_in_a_row}, weights

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._n_in_a_row = int(facts["n_in_a_row"])
        if tensors:
            # The gradients of the last check are many; its weights lead back to them.
            now = self._weights()
            self._put(tensors)
            self._last = self._look()
            self._put(now)

    def close(self) -> None:
        if self._last is not None:
            self._last.V.close()
            self._last = None

    def _look(self) -> _Look:
        path = self._how.folder / f"{self._n_looks % 2}.bin"
        self._n_looks += 1
        path.unlink(missing_ok=True)
        device = next(iter(self._engine.parameters.values())).device
        directions = Directions(path, self._sizes, self._source.n, device)
        with dropout_off(self._scene.model), torch.autocast(device.type, enabled=False):
            for first in range(0, self._source.n, _BATCH):
                last = min(first + _BATCH, self._source.n)

                def keep(name: str, rows: Rows, first: int = first) -> None:
                    directions.write(name, first, rows.dense())

                self._engine.run(self._source.draw(range(first, last)), keep)
        # A cast made here must not outlive it in an autocast that the loop is inside of.
        torch.clear_autocast_cache()
        return _Look(directions, directions.gram().numpy(), self._weights())

    def _overlap(self, one: _Look, other: _Look) -> float:
        cross = one.V.cross(other.V).numpy()
        found: list[float] = []
        for task in dict.fromkeys(self._how.tasks):
            rows = [j for j, name in enumerate(self._how.tasks) if name == task]
            own = np.ix_(rows, rows)
            spaces = spectrum(one.gram[own]), spectrum(other.gram[own])
            ranks = rank_by_energy(spaces[0], SHARE), rank_by_energy(spaces[1], SHARE)
            found.append(overlap(*spaces, cross[own], ranks))
        return min(found)

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._engine.parameters.items()}

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._engine.parameters.items():
                p.copy_(weights[name])
