"""SpIEL in plain loops: dense gradients, one dictionary of deltas per weight, no shared code.

step t = 1, 2, ...    one optimizer step on the deltas of the entries that train
exchange              where t mod every = accumulate: all entries go at the first, later
                      floor(rate (1 - t/T) k), those with the smallest |delta|; AG grows what
                      the summed gradient of the phase is largest for, MA row * col
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from slow_sparse import bits, dense_gradients
from torch import nn

from selectune.data import Batch
from selectune.weights.base import base_weights
from selectune.weights.mask import WeightMask


class SlowSpiel:
    """Trains the deltas of a model's chosen entries, and exchanges entries."""

    def __init__(
        self,
        model: nn.Module,
        mask: WeightMask,
        *,
        lr: float,
        eps: float,
        decay: float = 0.0,
        every: int,
        accumulate: int,
        rate: Fraction,
        n_steps: int,
        fall: str = "linear",
    ) -> None:
        self.model, self.lr, self.eps, self.decay = model, lr, eps, decay
        self.every, self.accumulate, self.rate, self.n_steps = every, accumulate, rate, n_steps
        self.fall = fall
        self.base = {name: t.double() for name, t in bits(model).items()}
        self.delta = {n: dict.fromkeys(index.tolist(), 0.0) for n, index in mask.indices.items()}
        self.t = 0
        self.n_exchanged = 0

    def step(self, batches: Sequence[Batch]) -> None:
        """Do one optimizer step, and what is due after it."""
        sums: dict[str, list[float]] = {}
        for batch in batches:
            found = dense_gradients(self.model, [batch])
            micro = {n: (found[n].double() / len(batches)).flatten().tolist() for n in self.delta}
            self.see(micro)
            for name, g in micro.items():
                old = sums.get(name, [0.0] * len(g))
                sums[name] = [a + b for a, b in zip(old, g, strict=True)]
        for name, g in sums.items():
            self.update(name, g)
        self.write()
        self.t += 1
        if (self.t + 1) % self.every == 0:
            self.begin()
        if self.t % self.every == self.accumulate:
            for name, delta in self.delta.items():
                if self.t <= self.n_steps:
                    self.exchange(name, math.floor(self.share() * len(delta)))
            self.write()

    def share(self) -> Fraction | float:
        if self.t == self.accumulate:
            return 1
        if self.fall == "cosine":
            return float(self.rate) / 2 * (1 + math.cos(math.pi * self.t / self.n_steps))
        return self.rate * (1 - Fraction(self.t, self.n_steps))

    def write(self) -> None:
        """Put base + delta into the model; everything else is the base."""
        with torch.no_grad():
            for name, p in base_weights(self.model).items():
                found = self.base[name].clone().flatten()
                for k, value in self.delta.get(name, {}).items():
                    found[k] += value
                p.copy_(found.view(p.shape))

    def smallest(self, name: str, count: int) -> list[int]:
        delta = self.delta[name]
        return sorted(delta, key=lambda k: (abs(delta[k]), k))[:count]

    def begin(self) -> None: ...

    def see(self, g: dict[str, list[float]]) -> None: ...

    def update(self, name: str, g: list[float]) -> None: ...

    def exchange(self, name: str, count: int) -> None: ...


class SlowAG(SlowSpiel):
    """Accumulated gradients; Adam with an age for every entry."""

    def __init__(self, *args: object, betas: tuple[float, float], **options: object) -> None:
        super().__init__(*args, **options)
        self.betas = betas
        self.adam = {n: {k: [0.0, 0.0, 0.0] for k in d} for n, d in self.delta.items()}  # m, v, age
        self.begin()

    def begin(self) -> None:
        self.seen: dict[str, dict[int, list[float]]] = {}
        self.began = self.t

    def see(self, g: dict[str, list[float]]) -> None:
        for name, every in g.items():
            if name not in self.seen:
                order = sorted(range(len(every)), key=lambda k: (-abs(every[k]), k))
                self.seen[name] = {k: [] for k in order[: len(self.delta[name])]}
            for k, values in self.seen[name].items():
                values.append(every[k])

    def update(self, name: str, g: list[float]) -> None:
        b1, b2 = self.betas
        for k, state in self.adam[name].items():
            m, v, age = state
            m, v, age = b1 * m + (1 - b1) * g[k], b2 * v + (1 - b2) * g[k] ** 2, age + 1
            self.adam[name][k] = [m, v, age]
            root = math.sqrt(v / (1 - b2**age)) + self.eps
            value = self.delta[name][k] * (1 - self.lr * self.decay)
            self.delta[name][k] = value - self.lr * m / (1 - b1**age) / root

    def exchange(self, name: str, count: int) -> None:
        seen, delta = self.seen[name], self.delta[name]
        drop = self.smallest(name, count)
        free = [k for k in seen if k in drop or k not in delta]
        grow = sorted(free, key=lambda k: (-abs(sum(seen[k])), k))[:count]
        both = set(drop) & set(grow)
        grow = [k for k in grow if k not in both]
        drop = [k for k in drop if k not in both][: len(grow)]
        b1, b2 = self.betas
        age = self.t - self.began
        for k in drop:
            del delta[k], self.adam[name][k]
        for k in grow:
            mean = sum(seen[k]) / len(seen[k])
            square = sum(x * x for x in seen[k]) / len(seen[k])
            delta[k] = 0.0
            self.adam[name][k] = [mean * (1 - b1**age), square * (1 - b2**age), age]
        self.n_exchanged += len(grow)


class SlowMA(SlowSpiel):
    """Moments of rows and columns, by SM3."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.sums: dict[str, list[list[float]]] = {}

    def places(self, name: str, k: int) -> list[int]:
        return [int(x) for x in torch.unravel_index(torch.tensor(k), self.base[name].shape)]

    def update(self, name: str, g: list[float]) -> None:
        if name not in self.sums:
            self.sums[name] = [[0.0] * size for size in self.base[name].shape]
        old = [list(axis) for axis in self.sums[name]]
        for k in self.delta[name]:
            at = self.places(name, k)
            u = min(axis[i] for axis, i in zip(old, at, strict=True)) + g[k] ** 2
            for axis, i in zip(self.sums[name], at, strict=True):
                axis[i] = max(axis[i], u)
            value = self.delta[name][k] * (1 - self.lr * self.decay)
            self.delta[name][k] = value - self.lr * g[k] / math.sqrt(u + self.eps)

    def exchange(self, name: str, count: int) -> None:
        delta = self.delta[name]
        free = [k for k in range(self.base[name].numel()) if k not in delta]
        score = {
            k: math.prod(a[i] for a, i in zip(self.sums[name], self.places(name, k), strict=True))
            for k in free
        }
        grow = sorted(free, key=lambda k: (-score[k], k))[:count]
        for k in self.smallest(name, len(grow)):
            del delta[k]
        delta.update(dict.fromkeys(grow, 0.0))
        self.n_exchanged += len(grow)
