"""Optimizers for entries that come and go: what they know of an entry is its own.

SpielAdamW   AdamW with an age per entry; torch's has one for the whole tensor, by which the moments
             of an entry that has just come would be taken for old ones
SM3          one accumulator per row and one per column (per place on each axis), so that it knows
             something of entries that never trained

Of other parameters (an adapter beside the entries) both do what they do of a dense tensor.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from selectune.errors import ConfigError
from selectune.training.sparse.entries import every_entries
from selectune.training.sparse.exchange import Exchange

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
Closure = Callable[[], float] | None


class SpielAdamW(Optimizer):
    """AdamW whose bias correction goes by the age of every single entry.

    While no entry is exchanged it is torch.optim.AdamW. Over values of `sparsify(...,
    decay_to="base")` the decay pulls at deltas.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; the authors use 3e-6 to 1e-4.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; the authors use 1 to 30, on deltas.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        _refuse(lr=lr, eps=eps, weight_decay=weight_decay)
        for beta in betas:
            if not 0 <= beta < 1:
                raise ConfigError(
                    f"betas cannot hold {beta}", where="SpielAdamW", do="use numbers in [0, 1)"
                )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closure = None
    ) -> float | None:
        """Do one step."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._ready(p)
                state["age"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (v / filled(state["age"], beta2)).sqrt_().add_(group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m / filled(state["age"], beta1), root, value=-lr)
        return loss

    @torch.no_grad()
    def follow(
        self,
        values: nn.Parameter,
        moved: Exchange,
        *,
        age: int | float,
        mean: Float[Tensor, " n"],
        mean_square: Float[Tensor, " n"],
    ) -> None:
        """Go along with an exchange of entries; what is grown starts from gradients seen before.

        Args:
            values: of the weight.
            moved: what `Sparse.replace` returned.
            age: steps for which the gradient of the grown entries was seen.
            mean: of their gradient, in the order in which they were grown.
            mean_square: of its square.
        """
        state = self._ready(values)
        beta1, beta2 = next(
            group["betas"]
            for group in self.param_groups
            if any(p is values for p in group["params"])
        )
        grown = torch.tensor(float(age))
        # Bias correction will divide by what these are multiplied by.
        seeds = {
            "age": grown,
            "exp_avg": mean * filled(grown, beta1).to(mean),
            "exp_avg_sq": mean_square * filled(grown, beta2).to(mean),
        }
        for key, seed in seeds.items():
            # In the type of the values, as torch makes it of all states that it loads.
            state[key] = moved.carry(state[key].expand(values.shape).to(values), seed)

    def _ready(self, p: nn.Parameter) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["age"] = torch.zeros((), device=p.device)  # one for all, until entries come
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


class SM3(Optimizer):
    """SM3: a step by the root of the smallest accumulator among those of an entry's places.

        u = min over axes of accumulator[place] + g^2;  accumulator[place] = max of the u there
        p <- p (1 - lr * weight_decay) - lr * g / sqrt(u + eps)

    Args:
        params: parameters, or groups of them.
        lr: learning rate; SpIEL's authors use 4e-4 to 2e-3.
        eps: added below the root.
        weight_decay: decoupled.

    Raises:
        ConfigError: a number is out of range.

    Source:
        "Memory-Efficient Adaptive Optimization", arXiv 1901.11150; SM3-II, without momentum.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        _refuse(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closure = None
    ) -> float | None:
        """Do one step."""
        loss = _evaluated(closure)
        every = every_entries()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                entries = every.get(id(p))
                shape = tuple(p.shape if entries is None else entries.shape) or (1,)
                index = None if entries is None else entries.index
                sums = self._accumulators(p, shape)
                square = p.grad.square()
                u = _dense(sums, square) if index is None else _sparse(sums, square, index, shape)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcmul_(p.grad, u.add_(group["eps"]).rsqrt_(), value=-group["lr"])
        return loss

    def accumulators(self, p: nn.Parameter) -> list[Float[Tensor, " size"]]:
        """Return the accumulators of a parameter, one per axis; none before its first step."""
        state = self.state[p]
        return [state[_key(axis)] for axis in range(len(state))]

    def _accumulators(self, p: nn.Parameter, shape: tuple[int, ...]) -> list[Tensor]:
        if not self.state[p]:
            for axis, size in enumerate(shape):
                self.state[p][_key(axis)] = p.new_zeros(size)
        return self.accumulators(p)


def filled(age: Tensor, beta: float) -> Tensor:
    """Return 1 - beta^age: the share of a moment that is not its empty start."""
    # Computed as it stands it would lose most digits where beta^age is near 1.
    return -torch.expm1(age * (math.log(beta) if beta else -math.inf))


def places(index: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the place of flat entries on each axis."""
    found: list[Tensor] = []
    rest = index.long()
    for size in reversed(shape):
        found.append(rest % size)
        rest = rest // size
    return found[::-1]


def _sparse(sums: list[Tensor], square: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    at = places(index, shape)
    u = torch.stack([total[place] for total, place in zip(sums, at, strict=True)]).amin(0)
    u += square
    for total, place in zip(sums, at, strict=True):
        total.scatter_reduce_(0, place, u, "amax")
    return u


def _dense(sums: list[Tensor], square: Tensor) -> Tensor:
    n_axes = max(1, square.ndim)
    shaped = square.view(-1) if square.ndim == 0 else square
    u = sums[0].view(-1, *[1] * (n_axes - 1)).expand(shaped.shape)
    for axis, total in enumerate(sums[1:], 1):
        u = torch.minimum(u, total.view(-1, *[1] * (n_axes - 1 - axis)))
    u = u + shaped
    for axis, total in enumerate(sums):
        others = [k for k in range(n_axes) if k != axis]
        torch.maximum(total, u.amax(others) if others else u, out=total)
    return u.view(square.shape)


def _key(axis: int) -> str:
    return f"accumulator_{axis}"


def _evaluated(closure: Closure) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _refuse(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ConfigError(
                f"{name} cannot be {value}", where="optimizer", do="use a number of 0 or more"
            )
