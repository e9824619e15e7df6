"""Masks equal their twin: statistics, scores, and what is chosen by a full sort."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from slow_masks import (
    Lists,
    Places,
    slow_drawn,
    slow_gradient,
    slow_score,
    slow_select,
    slow_square,
)
from tiny import tiny_model, tiny_tokens, tiny_trainable
from torch import Tensor, nn

from selectune import registry
from selectune.methods.weights.gallop import GaLLoP
from selectune.seeds import seeded
from selectune.weights.eligible import eligible_weights
from selectune.weights.mask import WeightMask
from selectune.weights.scorer import WeightScorer
from selectune.weights.scores import WeightScores
from selectune.weights.statistics import estimate

FAMILIES = ("llama", "gpt2", "qwen2", "gemma")
SCOPES = ("global", "per_layer", "per_tensor")
POOL = tiny_tokens(9, seed=4)
SCORERS = [entry.options for entry in registry.methods("weight_scorer")]
DENSITY = 0.037


def scored(kind: type, model: nn.Module, **options: Any) -> WeightScores:  # noqa: ANN401
    return kind(**options).score(model, POOL, tuned=tiny_model("llama", seed=1), token_budget=30)


def lists(scores: WeightScores) -> Lists:
    """Return the scores of every entry, those of whole channels written out."""
    return {
        name: scores.of(name).expand(w.parameter.shape).flatten().tolist()
        for name, w in scores.weights.items()
    }


def places(mask: WeightMask) -> Places:
    return {name: index.tolist() for name, index in mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighting", ["example", "token"])
def test_the_mean_gradient_is_that_of_one_example_at_a_time(family: str, weighting: str) -> None:
    model = tiny_model(family)
    eligible = eligible_weights(model, "all")
    needs = frozenset({"mean_gradient"})
    found = estimate(
        model, POOL, needs, eligible, examples=6, seed=3, weighting=weighting, token_budget=25
    )
    items = slow_drawn(POOL, 6, 3)
    assert set(found.ids) == {t.id for t in items}
    for name, weight in eligible.items():
        slow = slow_gradient(model, items, weight.parameter, weighting)
        rms = float(np.sqrt((slow**2).mean()))
        fast = found.values["mean_gradient"][name]
        assert fast.dtype == torch.float32
        # GPT-2's key biases have no gradient but for rounding: softmax cancels them.
        np.testing.assert_allclose(fast.numpy(), slow, rtol=2e-4, atol=1e-5 * rms + 1e-8)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_squares_and_the_first_gradient_are_those_of_micro_batches(micro_batch: int) -> None:
    model = tiny_model("llama")
    eligible = eligible_weights(model, "layers")
    found = estimate(
        model,
        POOL,
        frozenset({"square_gradient", "first_gradient"}),
        eligible,
        examples=7,
        micro_batch=micro_batch,
    )
    items = slow_drawn(POOL, 7, 0)
    for name, weight in eligible.items():
        square = slow_square(model, items, weight.parameter, micro_batch)
        fast = found.values["square_gradient"][name].numpy()
        np.testing.assert_allclose(fast, square, rtol=1e-3, atol=1e-6 * square.max())
        first = slow_gradient(model, items[:micro_batch], weight.parameter)
        fast = found.values["first_gradient"][name].numpy()
        np.testing.assert_allclose(fast, first, rtol=1e-3, atol=1e-5 * abs(first).max())


@pytest.mark.parametrize("kind", SCORERS, ids=lambda k: k.__name__)
def test_scores_follow_the_table(kind: type[WeightScorer]) -> None:
    scores = scored(kind, tiny_model("llama"))
    method = scores.scorer.entry.name
    evidence = next(iter(scores.statistics.values.values()), {})
    for name, weight in scores.weights.items():
        found = scores.of(name)
        if method in ("random", "s2ft"):
            draw = torch.rand(found.shape, generator=seeded(0, method, name))
            assert torch.equal(found, draw)
            continue
        w = weight.parameter.detach().flatten().tolist()
        e = evidence[name].flatten().tolist() if evidence else [0.0] * len(w)
        slow = [slow_score(method, a, b) for a, b in zip(w, e, strict=True)]
        assert found.shape == weight.parameter.shape
        np.testing.assert_allclose(found.flatten().numpy(), slow, rtol=2e-7)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", SCORERS, ids=lambda k: k.__name__)
def test_a_mask_is_a_full_sort(kind: type[WeightScorer], scope: str) -> None:
    scores = scored(kind, tiny_model("llama"))
    method = scores.scorer.entry.name
    density = 0.13 if method == "s2ft" else DENSITY  # a layer has 24 channels
    mask = scores.select(density=density, scope=scope)
    layers = {name: w.layer for name, w in scores.weights.items()}
    if method == "s2ft":
        mask_places, table = channels(mask), by_channel(scores)
    else:
        mask_places, table = places(mask), lists(scores)
    k = int(density * scores.sizes.eligible)
    share = Fraction(k, scores.sizes.eligible)
    more = int(method == "sift" and scope == "per_tensor")
    assert mask_places == slow_select(table, share, scope, layers, more)
    if scope == "global" and method != "s2ft":
        assert mask.n_chosen == k


def by_channel(scores: WeightScores) -> Lists:
    return {name: scores.of(name).flatten().tolist() for name in scores.weights}


def channels(mask: WeightMask) -> Places:
    """Return the input channels of Linear maps that are chosen, each of which is so as a whole."""
    found = {}
    for name, index in mask:
        out, width = mask.shapes[name]
        columns = (index % width).tolist()
        found[name] = sorted(set(columns))
        assert len(columns) == out * len(found[name])
    return found


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_of_every_family_can_compete(family: str, scope: str) -> None:
    scores = GaLLoP(eligible="all", count=211).score(tiny_model(family), POOL)
    layers = {name: w.layer for name, w in scores.weights.items()}
    share = Fraction(211, scores.sizes.eligible)
    mask = scores.select(scope=scope)
    assert places(mask) == slow_select(lists(scores), share, scope, layers)


@pytest.mark.parametrize("kind", ["lora", "dora", "series", "parallel"])
def test_a_base_is_scored_as_it_stands_under_an_adapter(kind: str) -> None:
    adapted, bare = tiny_trainable("llama", kind), tiny_model("llama")
    flags = {name: p.requires_grad for name, p in adapted.named_parameters()}
    mine, theirs = GaLLoP().score(adapted, POOL), GaLLoP().score(bare, POOL)
    assert list(mine.weights) == list(theirs.weights)
    assert mine.base == theirs.base
    assert mine.sizes == theirs.sizes
    name = "model.layers.0.mlp.up_proj.weight"
    slow = slow_gradient(adapted, slow_drawn(POOL, 99, 0), mine.weights[name].parameter)
    fast = mine.statistics.values["mean_gradient"][name].numpy()
    np.testing.assert_allclose(fast, slow, rtol=2e-4, atol=1e-6 * abs(slow).max())
    assert flags == {name: p.requires_grad for name, p in adapted.named_parameters()}


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-5 * b.square().mean().sqrt()).all())


def test_batches_and_order_do_not_matter() -> None:
    model = tiny_model("qwen2")
    whole = GaLLoP(examples=8).score(model, POOL, token_budget=4096)
    single = GaLLoP(examples=8).score(model, POOL[::-1], token_budget=1)
    assert set(whole.statistics.ids) == set(single.statistics.ids)
    one, other = (s.statistics.values["mean_gradient"] for s in (whole, single))
    assert all(close(one[name], other[name]) for name in one)
    assert whole.select() == single.select()


def test_masks_in_half_precision_are_close_to_exact_ones() -> None:
    model = tiny_model("llama")
    exact, half = (
        GaLLoP(density=0.2).score(model, POOL, precision=precision).select()
        for precision in ("float32", "bfloat16")
    )
    assert len(exact & half) > 0.9 * len(exact)
