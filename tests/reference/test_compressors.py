"""Baselines, budgets and stacks of layers equal their twins."""

import numpy as np
import pytest
import torch
from deep import deep_model
from slow_gradot import slow_channel, slow_components, slow_rows
from slow_stack import slow_clusters, slow_count, slow_rank, slow_together
from tiny import tiny_model, tiny_tokens
from torch import Tensor

from selectune.data import collate
from selectune.methods.compressors.activation_aware import ActivationAware
from selectune.methods.compressors.crash import clustered, nearest
from selectune.methods.compressors.svd_magnitude import SvdMagnitude
from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of, bias_of, weight_of
from selectune.offsite.budget import count_of, rank_of, together, uniform
from selectune.offsite.compressor import score_layer
from selectune.offsite.record import ChannelScores, LayerScores, MatrixScores
from selectune.offsite.statistics import collect

FAMILIES = ("llama", "qwen2", "opt", "gpt2")
EXAMPLES = tiny_tokens(5, seed=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_aware_scores_are_the_error_of_the_output(family: str) -> None:
    model = tiny_model(family).double()
    block = blocks(model)[0]
    batch = collate(EXAMPLES, pad_id=0)
    found = collect(model, [batch], [0], needs=frozenset({"inputs"}))[0]
    scores = score_layer(block, 0, ActivationAware(), found)
    anatomy = anatomy_of(block)

    def error(name: str, delta: Tensor) -> float:
        xs = [x for x, _ in slow_rows(model, block.get_submodule(name), EXAMPLES)]
        errors = [(delta @ x[: delta.shape[1]]).square().sum() for x in xs]
        return float(sum(errors) / len(errors)) ** 0.5

    for matrix in anatomy.matrices:
        W = weight_of(block.get_submodule(matrix.name))[matrix.rows]
        deltas = slow_components(W, W, W, torch.zeros_like(W))
        for j in (0, 2, len(deltas) - 1):
            fast = float(scores.matrices[matrix.key].scores[j])
            assert fast == pytest.approx(error(matrix.name, deltas[j]), rel=1e-5, abs=1e-9)
    down = block.get_submodule(anatomy.mlp.down)
    assert scores.channels is not None
    for c in (0, 5, 23):
        W = weight_of(down)
        delta = slow_channel("down", W, bias_of(down), c, torch.zeros_like(W))
        expected = error(anatomy.mlp.down, delta)
        assert float(scores.channels.scores[c]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_are_singular_values_and_norms(family: str) -> None:
    block = blocks(tiny_model(family))[0]
    scores = score_layer(block, 0, SvdMagnitude(), None)
    for found in scores.matrices.values():
        assert torch.equal(found.scores, found.spectrum)
    mlp = anatomy_of(block).mlp
    assert scores.channels is not None
    for c in (0, 7):
        total = 0.0
        for name in mlp.names:
            W, b = (f(block.get_submodule(name)) for f in (weight_of, bias_of))
            part = [*W[:, c].tolist()] if name == mlp.down else [*W[c].tolist()]
            part += [] if name == mlp.down or b is None else [float(b[c])]
            total += sum(x * x for x in part) ** 0.5
        assert float(scores.channels.scores[c]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("keep", ["0.6", "0.4", "0.55", "0.29", "1"])
@pytest.mark.parametrize(("m", "n"), [(576, 576), (192, 576), (100, 100), (7, 3), (1536, 20)])
def test_ranks_and_channels_are_those_of_a_count(keep: str, m: int, n: int) -> None:
    assert rank_of(float(keep), m, n) == slow_rank(keep, m, n)
    assert count_of(float(keep), m) == slow_count(keep, m)


def test_ranks_of_smollm2_are_those_worked_out_by_hand() -> None:
    assert (rank_of(0.6, 576, 576), rank_of(0.6, 192, 576)) == (172, 86)
    assert count_of(0.6, 1536) == 922


def layers(seed: int, n: int = 3) -> list[LayerScores]:
    """Return layers that compete, with scores that differ between matrices."""
    rng = torch.Generator().manual_seed(seed)

    def draw(k: int) -> Tensor:
        return torch.rand(k, generator=rng) ** 4 - 0.02

    def matrix(m: int, k: int, protected: int) -> MatrixScores:
        return MatrixScores((m, k), draw(min(m, k)), draw(min(m, k)), protected)

    return [
        LayerScores(
            j,
            {"q": matrix(24, 24, 2), "k": matrix(12, 24, 1)},
            ChannelScores(draw(40), 3 * 24),
        )
        for j in range(n)
    ]


@pytest.mark.parametrize(("attention", "mlp"), [("0.6", "0.6"), ("0.5", "0.8"), ("0.9", "0.3")])
@pytest.mark.parametrize("seed", range(4))
def test_one_budget_for_all_layers_is_a_greedy_loop(seed: int, attention: str, mlp: str) -> None:
    scores = layers(seed)
    plans = together(scores, float(attention), float(mlp))
    matrices = {
        f"{s.original}:{key}": (of.scores.tolist(), *of.shape, of.n_protected)
        for s in scores
        for key, of in s.matrices.items()
    }
    channels = {f"{s.original}:mlp": (s.channels.scores.tolist(), s.channels.size) for s in scores}
    slow = slow_together(matrices, channels, attention, mlp)
    for s in scores:
        plan = plans[s.original]
        for key, of in s.matrices.items():
            kept = slow[f"{s.original}:{key}"]
            if len(kept) == rank_of(1.0, *of.shape):
                assert key not in plan.components
            else:
                assert list(plan.components[key]) == kept
        kept = slow[f"{s.original}:mlp"]
        assert plan.channels == (None if len(kept) == 40 else tuple(kept))


def stored(scores: list[LayerScores], plans: dict) -> int:
    """Return the numbers that plans leave, matrices that stay as they are in full."""
    total = 0
    for s in scores:
        plan = plans[s.original]
        for key, of in s.matrices.items():
            m, n = of.shape
            kept = plan.components.get(key)
            total += m * n if kept is None else len(kept) * (m + n)
        total += (40 if plan.channels is None else len(plan.channels)) * s.channels.size
    return total


@pytest.mark.parametrize("seed", range(4))
def test_one_budget_for_all_costs_what_equal_shares_cost(seed: int) -> None:
    scores = layers(seed)
    equal = stored(scores, {s.original: uniform(s, 0.6, 0.6) for s in scores})
    shared = stored(scores, together(scores, 0.6, 0.6))
    assert equal - 2 * 3 * 24 <= shared <= equal  # short by less than two channels


@pytest.mark.parametrize("n_clusters", [1, 3, 5, 9])
def test_clusters_are_merged_two_at_a_time(n_clusters: int) -> None:
    rng = torch.Generator().manual_seed(1)
    states = torch.randn(9, 12, 6, generator=rng).cumsum(0)
    slow = slow_clusters([s.double().numpy() for s in states], n_clusters)
    assert clustered(states, n_clusters) == slow


def test_layers_that_hand_on_the_same_are_one_cluster_and_ties_merge_from_the_left() -> None:
    one, other = torch.randn(8, 4), torch.randn(8, 4)
    assert clustered(torch.stack([one, one, other, 2 * other + 1]), 2) == [[0, 1], [2, 3]]
    same = torch.stack([one] * 4)
    assert clustered(same, 2) == slow_clusters([np.asarray(one)] * 4, 2) == [[0, 1, 2], [3]]


def test_the_nearest_kept_layer_of_two_is_the_right_one() -> None:
    assert [nearest([2, 6, 9], j) for j in range(2, 11)] == [2, 2, 6, 6, 6, 6, 9, 9, 9]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_greedy_loop_holds_on_a_model(family: str) -> None:
    model = deep_model(3, family)
    scores = [score_layer(b, j, SvdMagnitude(), None) for j, b in enumerate(blocks(model))]
    plans = together(scores, 0.6, 0.5)
    fused = family == "gpt2"
    for s in scores:
        kept = plans[s.original].components
        for key, of in s.matrices.items():
            assert of.is_part == (fused and "c_attn" in key)
            if of.is_part:  # replaced as a whole, so named however much of it is kept
                assert key in kept
