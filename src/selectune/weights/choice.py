"""Which weights win: those that compete with each other, how many pass, and where they stand."""

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from math import ceil, floor, prod

from jaxtyping import Int32
from torch import Tensor

from selectune.errors import SelectionError
from selectune.weights.budget import exact
from selectune.weights.eligible import EligibleWeight
from selectune.weights.mask import index_dtype
from selectune.weights.options import ScorerOptions
from selectune.weights.threshold import (
    KeysOf,
    bounded,
    exact_cut,
    keys,
    passing,
    sampled_cut,
)


class Choice:
    """One way to choose from scores.

    Args:
        options: scope, threshold and bounds.
        weights: what may be chosen from.
        scores_of: gives the scores of one tensor, the same at every call.
        share: of the weights that is chosen.
    """

    def __init__(
        self,
        options: ScorerOptions,
        weights: Mapping[str, EligibleWeight],
        scores_of: Callable[[str], Tensor],
        share: Fraction,
    ) -> None:
        self._options, self._weights = options, weights
        self._scores_of, self._share = scores_of, share
        # Scores along a dimension of size 1 are one unit: chosen together, counted once.
        self._units = {
            name: options.units(tuple(w.parameter.shape), w.is_input_first)
            for name, w in weights.items()
        }
        self._last: tuple[str, Int32[Tensor, " n"]] | None = None

    def indices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the chosen places of each tensor that has some, ascending in the flat tensor.

        Raises:
            SelectionError: the bounds leave no room for the budget.
        """
        for names, k in self._groups():
            if k:
                yield from self._passing(names, k)

    def _count(self, name: str) -> int:
        return prod(self._units[name])

    def _groups(self) -> Iterator[tuple[list[str], int]]:
        """Yield the tensors that compete with each other, and how many units of them win."""
        names = list(self._units)
        match self._options.scope_used:
            case "global":
                yield names, floor(self._share * sum(map(self._count, names)))
            case "per_tensor":
                for name in names:
                    n = self._count(name)
                    yield [name], min(n, self._options.tensor_count(self._share, n))
            case "per_layer":
                layers: dict[int | None, list[str]] = {}
                for name, weight in self._weights.items():
                    layers.setdefault(weight.layer, []).append(name)
                for group in layers.values():
                    yield group, floor(self._share * sum(map(self._count, group)))

    def _passing(self, names: list[str], k: int) -> Iterator[tuple[str, Tensor]]:
        options = self._options
        keys_of = self._keys_of(names, k)
        if options.threshold == "sampled":
            share = Fraction(k, sum(map(self._count, names)))
            cut = sampled_cut(names, keys_of, share, sample=options.sample, seed=options.seed)
        else:
            cut = exact_cut(names, keys_of, k)
        for name, is_in in passing(names, keys_of, cut):
            if bool(is_in.any()):
                shape = tuple(self._weights[name].parameter.shape)
                every = is_in.view(self._units[name]).expand(shape).flatten()
                yield name, every.nonzero().flatten().to(index_dtype(prod(shape)))

    def _keys_of(self, names: list[str], k: int) -> KeysOf:
        def plain(name: str) -> Int32[Tensor, " n"]:
            # A group of one tensor is asked for it sweep after sweep.
            if self._last is None or self._last[0] != name:
                self._last = None
                self._last = name, keys(self._scores_of(name))
            return self._last[1]

        low, high = self._options.floor, self._options.ceiling
        if low is None and high is None:
            return plain
        sizes = {name: self._count(name) for name in names}
        least = {n: 0 if low is None else floor(exact(low) * size) for n, size in sizes.items()}
        most = {n: s if high is None else ceil(exact(high) * s) for n, s in sizes.items()}
        if not sum(least.values()) <= k <= sum(most.values()):
            raise SelectionError(
                f"{k:,} weights do not fit between a floor of {low} and a ceiling of {high}",
                where="floor, ceiling",
                why=f"the tensors take {sum(least.values()):,} to {sum(most.values()):,}",
                do="widen the bounds, or change the budget",
            )
        return lambda name: bounded(plain(name), least[name], most[name])
