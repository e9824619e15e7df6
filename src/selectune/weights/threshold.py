"""The k highest of many scores in constant extra memory, ties by tensor order and place.

A float32 read as an integer keeps its order, so the k-th highest is found by counting bits:

    sweep 1   65,536 counters over the high 16 bits          -> the bin that holds the k-th
    sweep 2   65,536 counters over the low 16 bits inside it -> its key, and how many stand above
    sweep 3   all above it, then the first few that equal it

Each sweep asks anew for the keys of one tensor after another, so that the scores of a whole model
never exist at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Int32, Num
from torch import Tensor

from selectune.seeds import seeded

KeysOf = Callable[[str], Int32[Tensor, " n"]]

# No float has these keys: they stand beyond both infinities, where the bits mean NaN.
NEVER = -(2**31)
ALWAYS = 2**31 - 1
_BINS = 65536
_CHUNK = 2**24  # entries counted at a time, which bounds the temporaries


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the chosen entries end.

    Attributes:
        key: all entries with a higher key are chosen.
        ties: so many of those with this key are, the first ones.
    """

    key: int
    ties: int


def keys(scores: Num[Tensor, "*shape"]) -> Int32[Tensor, " n"]:
    """Return integers in the order of the scores; both zeros are one. NaN has no place in it."""
    bits = (scores.detach().flatten().float() + 0.0).view(torch.int32)  # -0 + 0 is +0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats fall as their bits grow


def exact_cut(names: Sequence[str], keys_of: KeysOf, k: int) -> Cut:
    """Return the cut that exactly k entries pass.

    Args:
        names: tensors, in the order that decides ties.
        keys_of: gives the keys of one of them, the same at every call.
        k: at least 1, at most the number of entries.
    """
    high, rest = _bin_of(_counted(names, lambda name: (keys_of(name) >> 16) + _BINS // 2), k)

    def low_bits(name: str) -> Tensor:
        found = keys_of(name)
        return found[(found >> 16) == high - _BINS // 2] & (_BINS - 1)

    low, ties = _bin_of(_counted(names, low_bits), rest)
    return Cut((high - _BINS // 2) * _BINS + low, ties)


def sampled_cut(
    names: Sequence[str], keys_of: KeysOf, share: Fraction, *, sample: int, seed: int
) -> Cut:
    """Return a cut that about a share of the entries passes, from keys sampled tensor by tensor.

    The share that does pass has a relative standard deviation of about 1 / sqrt(share * sample).

    Args:
        names: tensors.
        keys_of: gives the keys of one of them.
        share: of the entries, above 0.
        sample: entries in the sample, spread over the tensors by their size.
        seed: of the draws.
    """
    counts = {name: keys_of(name).numel() for name in names}
    part = Fraction(sample, sum(counts.values()))
    drawn: list[Tensor] = []
    for name in names:
        found = keys_of(name)
        n = -int(-part * counts[name] // 1)  # upwards, so that no tensor goes without
        if n < counts[name]:
            found = found[torch.randint(counts[name], (n,), generator=seeded(seed, "cut", name))]
        drawn.append(found)
    together = torch.cat(drawn)
    rank = max(1, round(share * together.numel()))
    last = int(together.kthvalue(together.numel() - rank + 1).values)
    return Cut(last - 1, 0)


def passing(
    names: Sequence[str], keys_of: KeysOf, cut: Cut
) -> Iterator[tuple[str, Bool[Tensor, " n"]]]:
    """Yield for each tensor which of its entries pass a cut."""
    left = cut.ties
    for name in names:
        found = keys_of(name)
        is_in = found > cut.key
        if left:
            ties = (found == cut.key).nonzero().flatten()[:left]
            is_in[ties] = True
            left -= ties.numel()
        yield name, is_in


def bounded(found: Int32[Tensor, " n"], floor: int, ceiling: int) -> Int32[Tensor, " n"]:
    """Return keys of one tensor among which the first `floor` always win, and so many can at most.

    Args:
        found: its keys.
        floor: the highest ones that pass whatever the other tensors hold.
        ceiling: the highest ones that may pass at all.
    """
    result = found.clone()

    def top(k: int) -> Tensor:
        if k == 0:
            return torch.zeros_like(found, dtype=torch.bool)
        return next(passing([""], lambda _: found, exact_cut([""], lambda _: found, k)))[1]

    result[top(floor)] = ALWAYS
    result[~top(ceiling)] = NEVER
    return result


def _counted(names: Sequence[str], bins_of: KeysOf) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for name in names:
        for part in bins_of(name).split(_CHUNK):
            counts += torch.bincount(part, minlength=_BINS)
    return counts


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th highest, and its rank in there."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, k))
    above = int(from_above[place - 1]) if place else 0
    return _BINS - 1 - place, k - above
