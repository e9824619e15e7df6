"""GradOT's statistics and closed forms equal one example, one component, one channel at a time."""

from dataclasses import replace

import pytest
import torch
from slow_gradot import (
    kronecker_norm,
    slow_channel,
    slow_components,
    slow_moments,
    slow_rows,
    slow_scores,
    slow_terms,
)
from tiny import tiny_model, tiny_tokens
from torch import Tensor, nn
from torch.testing import assert_close

from selectune.data import Batch, Tokens, collate
from selectune.gradients.loss import _drawn, target_nll
from selectune.methods.compressors.gradot import GradOT
from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of, bias_of, weight_of
from selectune.offsite.compressor import needs_of, score_layer
from selectune.offsite.statistics import LayerStatistics, collect, uniform_draws

# Grouped queries, biases on q, k and v, biases without gate, fused Conv1D.
FAMILIES = ("llama", "qwen2", "opt", "gpt2")
EXAMPLES = tiny_tokens(5, seed=4)
GRADIENTS = frozenset({"gradients"})


def double(family: str) -> nn.Module:
    model = tiny_model(family).double()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(items: list[Tokens], side: str = "right") -> Batch:
    return collate(items, pad_id=0, side=side)


def statistics(model: nn.Module, layer: int = 0) -> LayerStatistics:
    return collect(model, [batch_of(EXAMPLES)], [layer], needs=GRADIENTS)[layer]


def slow_layer(model: nn.Module, layer: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    block = blocks(model)[layer]
    anatomy = anatomy_of(block)
    parts = [(m.key, m.name, m.rows) for m in anatomy.matrices]
    parts += [(name, name, slice(None)) for name in anatomy.mlp.names]
    for p in block.parameters():
        p.requires_grad_(True)  # so that outputs have gradients
    found = {
        key: slow_moments(slow_rows(model, block.get_submodule(name), EXAMPLES), rows)
        for key, name, rows in parts
    }
    for p in block.parameters():
        p.requires_grad_(False)
    return found


def slow_drawn(model: nn.Module, item: Tokens, seed: int) -> Batch:
    """Return an example as a batch whose labels the model drew, one token after the other."""
    batch = batch_of([item])
    with torch.no_grad():
        shares = model(input_ids=batch.input_ids).logits[0].float().softmax(-1).tolist()
    labels = batch.labels.clone()
    draws = iter(uniform_draws(batch, seed)[0].tolist())
    for t in range(1, len(item.input_ids)):
        if labels[0, t] < 0:
            continue
        u, reached = next(draws), 0.0
        for token, share in enumerate(shares[t - 1]):
            reached += share
            if u < reached:
                labels[0, t] = token
                break
    return replace(batch, labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_labels_change_what_gradients_spread_over_and_nothing_else(family: str) -> None:
    model = double(family)
    needs = needs_of(GradOT(fisher="sampled"))
    plain = statistics(model)
    found = collect(model, [batch_of(EXAMPLES, "left")], [0], needs=needs, seed=3)[0]
    slow = collect(model, [slow_drawn(model, item, 3) for item in EXAMPLES], [0], needs=GRADIENTS)[
        0
    ]
    for key, of in found.matrices.items():
        assert of.S is not None
        assert of.G is not None
        assert_close(of.A, plain.matrices[key].A)
        assert_close(of.G, plain.matrices[key].G)
        assert_close(of.S, slow.matrices[key].S)
        with pytest.raises(AssertionError):
            assert_close(of.S, plain.matrices[key].S)
    assert needs_of(GradOT()) == GRADIENTS


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0]).expand(1, 4000, 4)
    u = torch.rand(1, 4000)
    drawn = _drawn(logits, u)
    counts = drawn.flatten().bincount(minlength=4) / 4000
    assert_close(counts, logits[0, 0].softmax(0), atol=0.03, rtol=0)
    assert counts[2] == 0
    # Whatever the rounding of a sum, a token is one of the vocabulary.
    assert int(_drawn(logits[:, :1], torch.tensor([[1.0]])).max()) == 3


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_one_example_at_a_time(family: str, layer: int) -> None:
    model = double(family)
    fast, slow = statistics(model, layer), slow_layer(model, layer)
    assert fast.n_positions == sum(len(e.input_ids) for e in EXAMPLES)
    assert fast.matrices.keys() == slow.keys()
    for key, (A, S, G) in slow.items():
        found = fast.matrices[key]
        assert found.S is not None
        assert found.G is not None
        for ours, theirs in ((found.A, A), (found.S, S), (found.G, G)):
            # Llama's norms and rotations run in fp32 whatever the weights are.
            assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_component_s_score_is_what_its_removal_does(family: str) -> None:
    model = double(family)
    block, known = blocks(model)[0], statistics(model).matrices
    zero = score_layer(block, 0, GradOT(), statistics(model))
    mixed = score_layer(block, 0, GradOT(lambda_attention=0.7), statistics(model))
    for matrix in anatomy_of(block).matrices:
        W = weight_of(block.get_submodule(matrix.name))[matrix.rows]
        A, S, G = known[matrix.key].A, known[matrix.key].S, known[matrix.key].G
        deltas = slow_components(W, A, S, G)
        terms = [slow_terms(delta, A, S, G) for delta in deltas]
        h, f = [t[0] for t in terms], [t[1] for t in terms]
        assert_close(h[0], float(kronecker_norm(deltas[0], A, S)), rtol=1e-10, atol=0)
        for weight, scores in ((0.0, zero), (0.7, mixed)):
            fast = scores.matrices[matrix.key].scores
            # The last components of k may be tiny: atol in units of the mean, which is 1.
            assert_close(fast, wide(slow_scores(h, f, weight)), atol=1e-10, rtol=1e-8)
        both = float((S @ (deltas[1] + deltas[3]) @ A).abs().sum())
        assert both <= h[1] + h[3] + 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_channel_s_score_is_what_its_removal_does(family: str) -> None:
    model = double(family)
    block, known = blocks(model)[0], statistics(model).matrices
    mlp = anatomy_of(block).mlp
    h, f = [], []
    for c in range(weight_of(block.get_submodule(mlp.up)).shape[0]):
        parts = []
        for name in mlp.names:
            module, of = block.get_submodule(name), known[name]
            kind = "down" if name == mlp.down else "into"
            delta = slow_channel(kind, weight_of(module), bias_of(module), c, of.G)
            parts.append(slow_terms(delta, of.A, of.S, of.G))
            if c == 0:
                assert_close(
                    parts[-1][0], float(kronecker_norm(delta, of.A, of.S)), rtol=1e-10, atol=0
                )
        h.append(sum(part[0] for part in parts))
        f.append(sum(part[1] for part in parts))
    for weight in (0.0, 0.7):
        found = score_layer(block, 0, GradOT(lambda_mlp=weight), statistics(model)).channels
        assert found is not None
        assert_close(found.scores, wide(slow_scores(h, f, weight)), rtol=1e-10, atol=1e-10)


def products(model: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """Return <w_c, G_c> of every channel, by matrix."""
    block, known = blocks(model)[0], statistics(model).matrices
    found = []
    for name in names:
        module, G = block.get_submodule(name), known[name].G
        rows = weight_of(module)
        if name == anatomy_of(block).mlp.down:
            found.append((rows * G[:, : rows.shape[1]]).sum(0))
            continue
        bias = bias_of(module)
        wide = rows if bias is None else torch.cat([rows, bias[:, None]], 1)
        found.append((wide * G).sum(1))
    return found


def test_up_and_down_agree_on_a_channel_and_the_gate_does_where_it_is_a_relu() -> None:
    llama = double("llama")
    names = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
    up, down, gate = products(llama, names)
    assert_close(up, down, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(gate, down, rtol=1e-3)
    for block in blocks(llama):
        block.get_submodule("mlp").act_fn = nn.ReLU()
    up, down, gate = products(llama, names)
    assert_close(up, down, rtol=1e-9, atol=1e-12)
    assert_close(gate, down, rtol=1e-9, atol=1e-12)
    up, down = products(double("opt"), ("fc1", "fc2"))  # a ReLU, with biases
    assert_close(up, down, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_lambda_removes_what_the_model_needs(family: str) -> None:
    model = double(family)
    block, known = blocks(model)[0], statistics(model)
    scores = score_layer(block, 0, GradOT(lambda_attention=1e12), known)
    batch = batch_of(EXAMPLES)

    def mean_loss() -> float:
        return float(target_nll(model, batch)[0].sum()) / known.n_positions

    for matrix in anatomy_of(block).matrices:
        module, of = block.get_submodule(matrix.name), known.matrices[matrix.key]
        weight = weight_of(module)  # a view: what is added to it moves the model
        deltas = slow_components(weight[matrix.rows], of.A, of.S, of.G)
        f = wide([slow_terms(delta, of.A, of.S, of.G)[1] for delta in deltas])
        removed = scores.matrices[matrix.key].scores.argsort()[:3]
        assert_close(f[removed], f.sort().values[:3])
        step = sum(deltas[j] for j in removed.tolist())[:, : weight.shape[1]]
        losses = []
        for eps in (1e-2, -1e-2):
            weight[matrix.rows] += eps * step
            losses.append(mean_loss())
            weight[matrix.rows] -= eps * step
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx(-float(f[removed].sum()), rel=0.02, abs=1e-6)
        if float(f[removed].sum()) < -1e-8:
            assert losses[0] > losses[1]
