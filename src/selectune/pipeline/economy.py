"""Gradient passes that cost less: the top layers alone, a shorter context, another precision.

Blocks below the lowest one taken are frozen for the length of a pass, so that the backward pass
ends there and the forward one keeps nothing for it. `score.fast` sets what costs the ranks least,
and says beforehand how alike the ranks of a random probe are with and without it.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import nn

from selectune.data import Tokens
from selectune.data.tokens import clipped
from selectune.errors import ConfigError
from selectune.models import Base, blocks, choose_precision
from selectune.recipe import ScoreSection

PROBE_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class Economy:
    """What gradient passes leave out; None leaves out nothing.

    Args:
        layers: "top:8" for the last eight blocks, "top:25%" for the last quarter, rounded up.
        max_length: tokens kept of an example.
        precision: of the passes, as in `score.precision`.
    """

    layers: str | None = None
    max_length: int | None = None
    precision: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is left out, by the recipe's names; it decides every number of a pass."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def shortened(self, items: Sequence[Tokens]) -> Sequence[Tokens]:
        """Return examples as long as the passes read them."""
        if self.max_length is None:
            return items
        return [clipped(item, self.max_length) for item in items]

    def precision_on(self, base: Base) -> str:
        """Return the precision of the passes over a base."""
        if self.precision is None:
            return base.precision
        return choose_precision(self.precision, base.device)


# What `fast` sets, from the table of benchmarks/fast.py in PAPERS.md. bfloat16 keeps the ranks, a
# length loses them gradually, without a sharp knee: 90 % is the mildest that saves time at all.
# Where few examples are long it saves more; fewer layers lose the ranks before they save as much.
KNEE: Mapping[str, Any] = {"max_length": "90%", "precision": "auto"}


def economy_of(section: ScoreSection, lengths: Int[np.ndarray, " n"]) -> Economy:
    """Return what a recipe leaves out: what it says, and KNEE's where `fast` is on.

    Args:
        section: of the recipe.
        lengths: tokens of each candidate.
    """
    own = section.model_dump(include={"layers", "max_length", "precision"}, exclude_none=True)
    values = {**KNEE, **own} if section.fast else own
    if isinstance(share := values.get("max_length"), str):
        values["max_length"] = length_of(share, lengths)
    return Economy(**values)


def length_of(share: str, lengths: Int[np.ndarray, " n"]) -> int:
    """Return the fewest tokens that leave a share of examples whole, such as "90%"; at least 2."""
    n_whole = -(-int(share.removesuffix("%")) * len(lengths) // 100)
    return max(2, int(np.sort(lengths)[n_whole - 1]))


def n_top(layers: str, n_layers: int) -> int:
    """Return how many blocks "top:8" or "top:25%" stands for.

    Raises:
        ConfigError: the model has fewer.
    """
    text = layers.removeprefix("top:")
    n = -(-int(text[:-1]) * n_layers // 100) if text.endswith("%") else int(text)
    if n > n_layers:
        raise ConfigError(
            f"score.layers is {layers}, the model has {n_layers} layers",
            where="score.layers",
            why="gradients are taken of that many blocks, counted from the last",
            do=f"use top:{n_layers} or less, or a share such as top:25%",
        )
    return n


@contextmanager
def only_layers(model: nn.Module, layers: str | None) -> Generator[None]:
    """Freeze what trains outside the top layers, and let it train again afterwards.

    Args:
        model: as gradients are taken of it.
        layers: see `Economy`; None freezes nothing.

    Raises:
        ConfigError: nothing in these layers trains, or the model has fewer.
        SelectionError: the model has no blocks.
    """
    if layers is None:
        yield
        return
    found = blocks(model)
    top = found[-n_top(layers, len(found)) :]
    kept = {id(p) for block in top for p in block.parameters() if p.requires_grad}
    if not kept:
        raise ConfigError(
            f"nothing trains in the last {len(top)} of {len(found)} layers",
            where="score.layers",
            why="gradients are taken of what trains, and of these layers alone",
            do="remove score.layers, or use an adapter with parameters in these layers",
        )
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def probe_of(pool: Sequence[Tokens], seed: int) -> tuple[Tokens, ...]:
    """Return the random examples that are scored both ways, in the pool's order."""
    drawn = sorted(pool, key=lambda t: hashlib.sha256(f"probe:{seed}:{t.id}".encode()).digest())
    chosen = {t.id for t in drawn[:PROBE_EXAMPLES]}
    return tuple(t for t in pool if t.id in chosen)


def told_fast(facts: Mapping[str, Any]) -> str:
    """Return in words what a fast pass left out, and how alike a probe's ranks are."""
    left = ", ".join(f"{key} {value}" for key, value in facts["settings"].items())
    return (
        f"fast ({left}): Spearman {facts['spearman']:.3f} with full scores on "
        f"{facts['n_probe']} random examples"
    )
