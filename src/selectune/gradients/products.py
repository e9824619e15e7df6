"""Inner products of pool gradients with the targets', batch by batch, in one of two spaces.

In the full space each parameter's products are added up as soon as its rows arrive, and freed. In a
projected space the parameters' projections have to be summed first. Where drawing the random matrix
costs the same for one example as for hundreds, gradients wait until there are many.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.gradients.adam import AdamSteps
from selectune.gradients.directions import Directions
from selectune.gradients.kernels import DenseRows, Rows, dense_parts, project_with_norm
from selectune.gradients.projection import Projection

# Gradients that wait for their projection: what is resident beside the model.
WAITING_BYTES = 1 << 30


@runtime_checkable
class Products(Protocol):
    """What a pool pass adds up; `take` is the consumer of the engine."""

    def take(self, name: str, rows: Rows) -> None:
        """Receive one parameter's rows of the batch at hand."""
        ...

    def close_batch(self, n: int) -> Float[Tensor, " n"]:
        """Say that a batch of n examples is complete; return its squared norms, unprojected."""
        ...

    def results(self) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
        """Return dot products with the targets, and norms, of all batches since the last call."""
        ...


class _Shaped:
    """What both kinds share: Adam's form of the rows, and which parameters gave none."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], adam: AdamSteps | None) -> None:
        self._parameters, self._adam = parameters, adam
        self._seen: set[str] = set()

    def parts(self, name: str, rows: Rows) -> Iterator[Float[Tensor, "n d"]]:
        """Yield flat gradients in Adam's form, a few examples at a time."""
        self._seen.add(name)
        for G in dense_parts(rows):
            if self._adam is not None:
                G = self._adam.moments[name].stepped(G, self._adam.form)
            yield G.flatten(1)

    def unseen(self, n: int) -> list[tuple[str, Rows]]:
        """Return zero gradients of what the batch did not touch: Adam moves it all the same."""
        if self._adam is None:
            return []
        return [
            (name, DenseRows(torch.zeros(n, *p.shape, device=p.device)))
            for name, p in self._parameters.items()
            if name not in self._seen
        ]

    def close_batch(self) -> None:
        """Forget what the batch touched, zero gradients of the rest included."""
        self._seen.clear()


class ExactProducts:
    """Products in the space of all trainable numbers.

    Args:
        directions: the target gradients.
        parameters: what the engine captures.
        adam: pool gradients are compared in the form that Adam gives them; None: as they are.
    """

    def __init__(
        self,
        directions: Directions,
        parameters: Mapping[str, nn.Parameter],
        adam: AdamSteps | None,
    ) -> None:
        self._directions = directions
        self._shaped = None if adam is None else _Shaped(parameters, adam)
        self._dots: Tensor | None = None
        self._norm2: Tensor | None = None
        self._done: list[tuple[Tensor, Tensor]] = []

    def take(self, name: str, rows: Rows) -> None:
        """Add one parameter's products."""
        V = self._directions.read(name)
        if self._shaped is None:
            dots, norm2 = project_with_norm(rows, V)
        else:
            parts = [(G @ V.mT, G.square().sum(1)) for G in self._shaped.parts(name, rows)]
            dots, norm2 = (torch.cat(column) for column in zip(*parts, strict=True))
        self._dots = dots if self._dots is None else self._dots + dots
        # Squares of hundreds of parameters: fp64 keeps the order of addition from showing.
        self._norm2 = norm2.double() if self._norm2 is None else self._norm2 + norm2.double()

    def close_batch(self, n: int) -> Float[Tensor, " n"]:
        """Put the sums of a batch aside."""
        if self._shaped is not None:
            for name, rows in self._shaped.unseen(n):
                self.take(name, rows)
            self._shaped.close_batch()
        assert self._dots is not None
        assert self._norm2 is not None
        norm2 = self._norm2
        # A Gram product of a gradient near 0 can round below 0.
        self._done.append((self._dots.float().cpu(), norm2.clamp(min=0).sqrt().cpu()))
        self._dots = self._norm2 = None
        return norm2

    def results(self) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
        """Return what was put aside."""
        return _emptied(self._done)


class ProjectedProducts:
    """Products of random projections.

    Args:
        features: the targets' projections.
        projection: the random map.
        parameters: what the engine captures.
        adam: as for `ExactProducts`.
        waiting_bytes: gradients that may wait before they are projected together.
    """

    def __init__(
        self,
        features: Float[Tensor, "m k"],
        projection: Projection,
        parameters: Mapping[str, nn.Parameter],
        adam: AdamSteps | None,
        *,
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self._features, self._projection = features, projection
        self._shaped = _Shaped(parameters, adam)
        self._limit = waiting_bytes
        self._is_rounded = projection.precision == "bfloat16"
        # By parameter: the first example that a gradient belongs to, and the gradients.
        self._waiting: dict[str, list[tuple[int, Tensor]]] = {}
        self._n = self._n_bytes = 0
        self._out: Tensor | None = None
        self._norm2: Tensor | None = None
        self._done: list[tuple[Tensor, Tensor]] = []

    def take(self, name: str, rows: Rows) -> None:
        """Project one parameter's gradients, or let them wait."""
        waits = self._projection.is_dear_to_draw
        if self._out is None and not waits:
            self._out = self._features.new_zeros(rows.n, self._projection.dim)
        norm2: list[Tensor] = []
        first = 0
        for G in self._shaped.parts(name, rows):
            norm2.append(torch.linalg.vector_norm(G, dim=1).double().square())
            if self._out is not None:
                self._projection.add(self._out[first : first + len(G)], name, G)
            else:
                kept = G.bfloat16() if self._is_rounded and G.dtype == torch.float32 else G
                self._waiting.setdefault(name, []).append((self._n + first, kept))
                self._n_bytes += kept.numel() * kept.element_size()
            first += len(G)
        own = torch.cat(norm2)
        self._norm2 = own if self._norm2 is None else self._norm2 + own

    def close_batch(self, n: int) -> Float[Tensor, " n"]:
        """Put the projections of a batch aside, or project what waits when it has grown large."""
        for name, rows in self._shaped.unseen(n):
            self.take(name, rows)
        self._shaped.close_batch()
        assert self._norm2 is not None
        norm2, self._norm2 = self._norm2, None
        if self._out is not None:
            self._put_aside(self._out)
            self._out = None
            return norm2
        self._n += n
        if self._n_bytes >= self._limit:
            self._project()
        return norm2

    def _project(self) -> None:
        if not self._n:
            return
        out = self._features.new_zeros(self._n, self._projection.dim)
        while self._waiting:
            name, parts = self._waiting.popitem()
            together = torch.cat([G for _, G in parts])
            if len(together) == self._n:  # of every example that waits, in order
                self._projection.add(out, name, together)
                continue
            projected = out.new_zeros(len(together), out.shape[1])
            self._projection.add(projected, name, together)
            for (first, G), own in zip(parts, _split(projected, parts), strict=True):
                out[first : first + len(G)] += own
        self._put_aside(out)
        self._n = self._n_bytes = 0

    def _put_aside(self, out: Float[Tensor, "n k"]) -> None:
        self._done.append(((out @ self._features.mT).float().cpu(), out.double().norm(dim=1).cpu()))

    def results(self) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
        """Project what still waits, and return all that was put aside."""
        self._project()
        return _emptied(self._done)


def target_features(
    directions: Directions, names: Sequence[str], projection: Projection, n_targets: int
) -> Float[Tensor, "m k"]:
    """Return the projections of the target gradients, one row per target."""
    total: Tensor | None = None
    for name in names:
        V = directions.read(name)
        total = V.new_zeros(n_targets, projection.dim) if total is None else total
        projection.add(total, name, V)
    assert total is not None
    return total


def _split(projected: Tensor, parts: Sequence[tuple[int, Tensor]]) -> Sequence[Tensor]:
    return projected.split([len(G) for _, G in parts])


def _emptied(done: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    dots, norms = torch.cat([d for d, _ in done]), torch.cat([n for _, n in done])
    done.clear()
    return dots, norms
