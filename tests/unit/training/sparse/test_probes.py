"""Methods that act on layers, over single weights: IST turns them down, gates count their rows."""

import copy

import pytest
import torch
from slow_gast import batch_loss
from slow_sparse import bits, chosen, is_matrix, mask_of
from tiny import tiny_batch, tiny_model, tiny_tokens
from torch import nn
from torch.testing import assert_close

from selectune import GAST, IST
from selectune.data import collate
from selectune.training.layers import trainable_layers
from selectune.training.sources import TokenSource
from selectune.training.sparse import SparseModel, sparsify
from selectune.training.suppression import response_of, turned_down
from selectune.weights.base import base_weights
from user_training import bare, lora

BATCH = tiny_batch(3)
POOL = tiny_tokens(12, seed=4)
SOURCE = TokenSource(POOL, pad_id=0)


def moved() -> tuple[SparseModel, nn.Module]:
    """Return a model whose chosen entries have moved, and its base."""
    base = tiny_model("llama")
    model = sparsify(copy.deepcopy(base), mask_of(base, only=is_matrix))
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.sparse.parameters():
            values.add_(0.3 * torch.randn(values.shape))
    return model, base


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_the_change_of_a_layer_is_turned_down(factor: float) -> None:
    model, base = moved()
    model.sparse.sync()
    live = bits(model)
    with torch.no_grad():
        for name, p in base_weights(base).items():
            if "layers.1." in name:
                p.add_(factor * (live[name] - p))
            else:
                p.copy_(live[name])
        with turned_down([response_of(trainable_layers(model)[1])], factor):
            found = batch_loss(model, BATCH, "token")
        assert_close(found, batch_loss(base, BATCH, "token"), rtol=1e-6, atol=1e-6)
        batch_loss(model, BATCH, "token")
    assert_close(bits(model), live, rtol=0, atol=0)


def test_ist_learns_which_layers_matter() -> None:
    model = tiny_model("llama").train()
    before, mask = bits(model), mask_of(model, only=is_matrix)
    sparsify(model, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = IST(layers=1, interval=2, probe_batch=4)
    with options.attach(model, optimizer, pool=SOURCE, target=SOURCE, seed=0) as session:
        for _ in range(6):
            batch = collate(POOL[:6], pad_id=0)
            session.expect(batch.labels, batch.ids)
            batch_loss(model, batch, "token").backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.guide.u.any()
    for name, p in base_weights(model).items():
        outside = ~chosen(mask, name, p.shape)
        assert torch.equal(p.detach()[outside], before[name][outside])
    for name, entries in model.sparse.entries.items():
        held = base_weights(model)[name].detach().flatten()[entries.index]
        assert torch.equal(held, entries.masters())


def test_a_lora_and_the_weights_below_it_are_turned_down_together() -> None:
    model = sparsify(lora(dropout=0.0), mask_of(bare(), only=is_matrix))
    layer = trainable_layers(model)[0]
    tables = {key for _, key in response_of(layer).scales}
    assert tables == {"default", "weight_values"}
    assert len(response_of(layer).scales) == 3 + 7
    assert not response_of(layer).mixed


def test_a_bias_beside_the_weights_stays_at_full_strength() -> None:
    model = sparsify(tiny_model("qwen2"), mask_of(tiny_model("qwen2"), only=is_matrix))
    base_weights(model)["model.layers.0.self_attn.q_proj.bias"].requires_grad_(True)
    response = response_of(trainable_layers(model)[0])
    assert response.unscaled == ("model.layers.0.self_attn.q_proj.bias",)
    assert len(response.scales) == 7


def test_gates_count_the_rows_that_sparse_gradients_are_made_of() -> None:
    peaks = []
    for is_sparse in (True, False):
        model = tiny_model("llama").train()
        if is_sparse:
            sparsify(model, mask_of(model, only=is_matrix))
        else:
            for name, p in model.named_parameters():
                p.requires_grad_(is_matrix(name))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with GAST().attach(model, optimizer, pool=SOURCE, weighting="token") as session:
            batch = collate(POOL[:6], pad_id=0)
            session.expect(batch.labels, batch.ids)
            batch_loss(model, batch, "token").backward()
            peaks.append(session.peak_rows)
    assert peaks[0] >= peaks[1] > 0  # dense rows may be kept in the smaller of two forms
