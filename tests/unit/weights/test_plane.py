"""The plane of weights and gradients, against one weight at a time."""

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import tiny_model, tiny_tokens
from torch import nn

from selectune import weights
from selectune.errors import ConfigError, SelectionError
from selectune.weights import plane as planes
from selectune.weights.budget import Sizes
from selectune.weights.eligible import EligibleWeight
from selectune.weights.mask import WeightMask
from selectune.weights.plane import Plane, plane_of
from selectune.weights.scores import WeightScores
from selectune.weights.statistics import Statistics

POOL = tiny_tokens(9, seed=4)
_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_TABLE = hnp.arrays(np.float32, (2, 12), elements=_FLOATS | st.sampled_from([0.0, 1e-45, -3e38]))


def slow_cell(value: float, edges: tuple[float, ...]) -> int:
    """Return the cell of a value: 0 for zero, else the one between whose edges it lies."""
    if value == 0:
        return 0
    place = bisect_right(edges, math.log10(abs(value)))
    return min(max(place, 1), len(edges) - 1)


def slow_counts(pairs: list[tuple[float, float]], found: Plane) -> np.ndarray:
    counts = np.zeros((len(found.magnitude), len(found.gradient)), np.int64)
    for weight, gradient in pairs:
        cell = slow_cell(weight, found.magnitude), slow_cell(gradient, found.gradient)
        counts[cell] += 1
    return counts


def is_clear(value: float) -> bool:
    """Say whether a value does not lie so close to an edge that rounding decides."""
    if value == 0:
        return True
    part = 8 * math.log10(abs(value))
    return abs(part - round(part)) > 1e-3


def made(
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    need: Any = "mean_gradient",  # noqa: ANN401
    dtype: torch.dtype = torch.float32,
) -> WeightScores:
    """Return scores of made-up tensors: weights and what stands for their gradients."""
    eligible = {
        name: EligibleWeight(
            name, nn.Parameter(torch.tensor(w).to(dtype)), 0, is_linear=True, is_input_first=False
        )
        for name, (w, _) in parts.items()
    }
    values = {name: torch.tensor(g) for name, (_, g) in parts.items()}
    n = sum(w.size for w, _ in parts.values())
    return WeightScores(weights.Random(), eligible, Statistics({need: values}), Sizes(n, n, 1), "b")


@given(_TABLE, _TABLE, st.lists(st.integers(0, 11), unique=True), st.integers(1, 9))
def test_every_weight_is_counted_in_its_cell(
    weight: np.ndarray, gradient: np.ndarray, places: list[int], chunk: int
) -> None:
    weight, gradient = (np.where(np.vectorize(is_clear)(t), t, 1.5) for t in (weight, gradient))
    weight, gradient = weight.astype(np.float32), gradient.astype(np.float32)
    scores = made({"a": (weight[0], gradient[0]), "b": (weight[1], gradient[1])})
    index = torch.tensor(sorted(places), dtype=torch.int64)
    mask = WeightMask({"b": index}, {"a": (12,), "b": (12,)}, "b")
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(planes, "_CHUNK", chunk)
        found = plane_of(scores, {"m": mask})
    pairs = [(float(w), float(g)) for w, g in zip(weight.flat, gradient.flat, strict=True)]
    np.testing.assert_array_equal(found.eligible, slow_counts(pairs, found))
    np.testing.assert_array_equal(
        found.chosen["m"], slow_counts([pairs[12 + k] for k in places], found)
    )
    assert found.outside == {"m": 0}


@given(_TABLE, _TABLE)
def test_axes_are_even_short_and_hold_all_of_few_weights(
    weight: np.ndarray, gradient: np.ndarray
) -> None:
    found = plane_of(made({"a": (weight, gradient)}), {})
    for edges, values in ((found.magnitude, weight), (found.gradient, gradient)):
        assert 2 <= len(edges) <= 65
        steps = {round(8 * (b - a)) for a, b in pairwise(edges)}
        assert len(steps) == 1
        for value in values[values != 0].tolist():
            assert edges[0] - 1e-3 <= math.log10(abs(value)) <= edges[-1] + 1e-3


def test_a_few_strange_weights_do_not_widen_the_axes_and_are_counted() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.05, 50_000).astype(np.float32)
    gradient = rng.normal(0, 1e-4, 50_000).astype(np.float32)
    weight[:3], gradient[3:5] = 1e-30, 1e12
    found = plane_of(made({"a": (weight, gradient)}), {})
    assert found.magnitude[0] > -8
    assert found.gradient[-1] < 0
    assert found.eligible.sum() == 50_000
    assert found.eligible[1].sum() >= 3
    assert found.eligible[:, -1].sum() >= 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["GaLLoP", "Fisher", "SIFT", "LoTA"])
def test_masks_of_any_method_are_placed_by_the_evidence_of_one(family: str, kind: str) -> None:
    model = tiny_model(family)
    scorer = getattr(weights, kind)(density=0.05)
    scores = scorer.score(model, POOL, tuned=tiny_model(family, seed=1))
    masks = {
        "own": scores.select(),
        "low": weights.LowMagnitude(density=0.1).score(model).select(),
        "random": weights.Random(density=0.02, eligible="all").score(model).select(),
    }
    found = plane_of(scores, masks)
    (need,) = scores.statistics.values
    assert found.statistic == need
    evidence = scores.statistics.values[need]
    pairs = {
        name: (w.parameter.detach().flatten().tolist(), evidence[name].flatten().tolist())
        for name, w in scores.weights.items()
    }
    power = 0.5 if need == "square_gradient" else 1.0
    every = [(w, abs(g) ** power) for ws, gs in pairs.values() for w, g in zip(ws, gs, strict=True)]
    off = np.abs(found.eligible - slow_counts(every, found)).sum()
    assert off <= 4  # of weights on an edge, where float32 and float64 round apart
    assert found.eligible.sum() == len(every)
    for label, mask in masks.items():
        outside = sum(len(i) for name, i in mask if name not in scores.weights)
        assert found.outside[label] == outside
        assert found.chosen[label].sum() == mask.n_chosen - outside
        assert (found.chosen[label] <= found.eligible).all()
    assert found.outside["random"] > 0
    rows = np.cumsum(found.chosen["low"].sum(1)) / found.chosen["low"].sum()
    others = np.cumsum(found.eligible.sum(1)) / found.eligible.sum()
    assert (rows >= others - 1e-9).all()  # low magnitude chooses from the left


def test_weights_in_bf16_are_placed_as_they_are_stored() -> None:
    weight = np.array([[0.0, -0.0, 0.3, -0.3]], np.float32)
    found = plane_of(made({"a": (weight, weight)}, dtype=torch.bfloat16), {})
    assert found.eligible[0, 0] == 2
    assert found.eligible[1:, 1:].sum() == 2


def test_nothing_but_zeros_still_has_a_place() -> None:
    zeros = np.zeros((2, 3), np.float32)
    found = plane_of(made({"a": (zeros, zeros)}), {})
    assert found.eligible.tolist() == [[6, 0], [0, 0]]


def test_plain_values_hold_everything() -> None:
    one = np.ones((1, 3), np.float32)
    mask = WeightMask({"a": torch.tensor([1])}, {"a": (1, 3)}, "b")
    found = plane_of(made({"a": (one, one)}), {"m": mask}).to_json()
    assert found["eligible"] == [[0, 0], [0, 3]]
    assert found["chosen"] == {"m": [[0, 0], [0, 1]]}
    assert found["statistic"] == "mean_gradient"
    assert found["outside"] == {"m": 0}


def test_scores_without_a_gradient_are_refused() -> None:
    scores = weights.LowMagnitude().score(tiny_model("llama"))
    with pytest.raises(ConfigError, match="low_magnitude has looked at no gradient") as caught:
        plane_of(scores, {})
    assert "gallop or saft" in caught.value.do


def test_a_mask_of_another_base_or_shape_is_refused() -> None:
    one = np.ones((1, 3), np.float32)
    scores = made({"a": (one, one)})
    other = WeightMask({}, {"a": (1, 3)}, "c")
    with pytest.raises(SelectionError, match="fingerprints are c and b") as caught:
        plane_of(scores, {"mine": other})
    assert caught.value.where == "mine"
    wide = WeightMask({}, {"a": (1, 4)}, "b")
    with pytest.raises(SelectionError, match=r"shapes of a are \[1, 4\] and \[1, 3\]"):
        plane_of(scores, {"mine": wide})


def test_weights_that_were_trained_since_are_refused() -> None:
    model = tiny_model("llama")
    scores = weights.SAFT().score(model, POOL)
    with torch.no_grad():
        next(iter(scores.weights.values())).parameter.add_(1.0)
    with pytest.raises(SelectionError, match="has changed since it was scored"):
        plane_of(scores, {})
