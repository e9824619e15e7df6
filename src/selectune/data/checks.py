"""What is in the data twice: equal examples, answers in the pool, near matches."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selectune.data.examples import Example, content_key, plain_text

_WORD = re.compile(r"\w+|[^\w\s]")
_GRAM = 5  # words per shingle
_N_HASHES = 128
_MISS = 1e-3  # chance tolerated that a pair at the threshold is not even looked at


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Pool examples that are in the target or the held-out data too.

    Attributes:
        matches: id of a pool example -> which data has it and where, such as "held-out csqa,
            csqa.jsonl:3".
    """

    matches: Mapping[str, str]

    @property
    def n(self) -> int:
        """Number of pool examples that leaked."""
        return len(self.matches)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the pool examples that leaked, in the pool's order."""
        return tuple(self.matches)


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """Examples that repeat one before them.

    Attributes:
        matches: id of a repeating example -> id of the first that it repeats.
    """

    matches: Mapping[str, str]

    @property
    def n(self) -> int:
        """Number of repeating examples."""
        return len(self.matches)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the repeating examples, in their order; without them nothing is there twice."""
        return tuple(self.matches)


Named = Sequence[Example] | Mapping[str, Sequence[Example]]


def leakage(pool: Sequence[Example], target: Named, heldout: Named) -> LeakReport:
    """Find pool examples whose content equals a target or a held-out example.

    Args:
        pool: the examples to choose from.
        target: examples, or examples by task.
        heldout: the same; where an example is in both, this is what is reported.
    """
    taken: dict[str, str] = {}
    for kind, data in (("target", target), ("held-out", heldout)):
        parts = data.items() if isinstance(data, Mapping) else (("", data),)
        for name, examples in parts:
            label = f"{kind} {name}".strip()
            taken |= {content_key(e.id): f"{label}, {e.origin}" for e in examples}
    found = ((e.id, taken.get(content_key(e.id))) for e in pool)
    return LeakReport({example_id: where for example_id, where in found if where is not None})


def duplicates(pool: Sequence[Example]) -> DuplicateReport:
    """Find examples whose content equals that of an example before them."""
    first: dict[str, str] = {}
    matches: dict[str, str] = {}
    for example in pool:
        kept = first.setdefault(content_key(example.id), example.id)
        if kept != example.id:
            matches[example.id] = kept
    return DuplicateReport(matches)


def near_duplicates(examples: Sequence[Example], threshold: float = 0.8) -> DuplicateReport:
    """Find examples that share most of their runs of five words with one before them.

    MinHash signatures say which pairs to look at; each of these is then compared exactly, so that
    nothing unlike is reported. A pair at the threshold is overlooked with a chance below 1 in 1000.

    Args:
        examples: the first of several near matches is the one that stays.
        threshold: smallest Jaccard similarity of the sets of five-word runs, over 0 and up to 1.

    Returns:
        Near matches and what they are near to: an example that stays itself.

    Source:
        Broder 1997, "On the resemblance and containment of documents"; the choice of bands as in
        Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.
    """
    grams = [_shingles(plain_text(example.content)) for example in examples]
    n_rows = _band_rows(threshold)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    matches: dict[str, str] = {}
    for k, example in enumerate(examples):
        signature = _signature(grams[k])
        bands = [
            (start, signature[start : start + n_rows].tobytes())
            for start in range(0, _N_HASHES - n_rows + 1, n_rows)
        ]
        # In the order given, so that which copy stays does not depend on the hashes.
        candidates = sorted({other for band in bands for other in buckets.get(band, ())})
        near = next((j for j in candidates if _jaccard(grams[j], grams[k]) >= threshold), None)
        if near is not None:
            matches[example.id] = examples[near].id
            continue
        for band in bands:
            buckets[band].append(k)
    return DuplicateReport(matches)


def _shingles(text: str) -> np.ndarray:
    """Return the sorted hashes (uint64) of the runs of five words; shorter text is one run."""
    words = _WORD.findall(text.lower())
    runs = {" ".join(words[k : k + _GRAM]) for k in range(max(1, len(words) - _GRAM + 1))}
    hashes = {hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs}
    return np.sort(np.frombuffer(b"".join(hashes), dtype="<u8"))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    n_shared = len(np.intersect1d(a, b, assume_unique=True))
    return n_shared / (len(a) + len(b) - n_shared)


def _signature(grams: np.ndarray) -> np.ndarray:
    """Return the smallest value of each of 128 fixed hash functions over the runs."""
    # Multiply-shift hashing: odd multipliers over 2^64, where the high bits are the good ones.
    return ((grams[None, :] * _MULTIPLY[:, None] + _ADD[:, None]) >> np.uint64(16)).min(axis=1)


def _band_rows(threshold: float) -> int:
    """Return the widest band that still finds a pair at the threshold nearly always."""
    for n_rows in (16, 8, 4, 2):
        if (1 - threshold**n_rows) ** (_N_HASHES // n_rows) < _MISS:
            return n_rows
    return 1


_RANDOM = np.random.default_rng(0x5E1EC7)
_MULTIPLY = _RANDOM.integers(0, 1 << 63, size=_N_HASHES, dtype=np.uint64) * 2 + 1
_ADD = _RANDOM.integers(0, 1 << 63, size=_N_HASHES, dtype=np.uint64)
