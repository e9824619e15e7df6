"""SpIEL against its twin in plain loops, step by step and over several exchanges."""

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from slow_gast import batch_loss
from slow_sparse import bits, chosen, is_matrix, mask_of
from slow_spiel import SlowAG, SlowMA, SlowSpiel
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.testing import assert_close

from selectune.data import Batch
from selectune.methods.sparse.spiel_ag import SpielAG
from selectune.methods.sparse.spiel_ma import SpielMA
from selectune.training.sparse import SM3, SparseModel, SpielAdamW, sparsify
from selectune.training.sparse.entries import DecayTo
from selectune.training.sparse.routes import Route
from selectune.training.sparse.schedule import Fall
from selectune.weights.base import base_weights

BATCHES = [tiny_batch(3, seed=s) for s in range(8)]
N_STEPS = 14
WHEN: dict[str, Any] = {"every": 4, "accumulate": 2}
# Row * column ties where nothing trains, and Adam divides by small roots: a mild eps and rate.
AG: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "betas": (0.8, 0.95)}
MA: dict[str, Any] = {"lr": 1e-3, "eps": 1e-6}


def batches_of(step: int, n_micro: int) -> list[Batch]:
    return [BATCHES[(step * n_micro + m) % 8] for m in range(n_micro)]


def backward(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        (batch_loss(model, batch, "token") / len(batches)).backward()


def assert_same(model: SparseModel, twin: SlowSpiel, before: dict[str, torch.Tensor]) -> None:
    for name, entries in model.sparse.entries.items():
        expected = dict(sorted(twin.delta[name].items()))
        assert entries.index.tolist() == list(expected), (name, twin.t)
        values = torch.tensor(list(expected.values()), dtype=torch.float32)
        assert_close(entries.deltas(), values, rtol=2e-4, atol=2e-7, msg=f"{name} step {twin.t}")
    mask = model.sparse.mask
    for name, p in base_weights(model).items():
        outside = ~chosen(mask, name, p.shape)
        assert torch.equal(p.detach()[outside], before[name][outside]), name


@pytest.mark.parametrize(
    ("kind", "family", "route", "n_micro", "decay_to", "fall"),
    [
        ("ag", "llama", "sampled", 1, "base", "linear"),
        ("ag", "gpt2", "gather", 2, "base", "cosine"),
        ("ag", "gemma", "auto", 2, "zero", "linear"),  # one tensor is embedding and head
        ("ma", "llama", "sampled", 2, "zero", "cosine"),
        ("ma", "gpt2", "gather", 1, "base", "linear"),
        ("ma", "gemma", "auto", 1, "base", "linear"),
    ],
)
def test_the_same_entries_train_to_the_same_deltas(
    kind: str, family: str, route: Route, n_micro: int, decay_to: DecayTo, fall: Fall
) -> None:
    only = is_matrix if family == "llama" else (lambda name: "norm" not in name)
    base = tiny_model(family)
    decay = 2.0 if decay_to == "base" else 0.0
    before, mask = bits(base), mask_of(base, 0.1, only=only)
    model = sparsify(copy.deepcopy(base), mask, route=route, decay_to=decay_to)
    assert isinstance(model, SparseModel)
    common: dict[str, Any] = {**WHEN, "fall": fall, "decay": decay, "n_steps": N_STEPS}
    fifth = Fraction(1, 5)
    values = model.sparse.parameters()
    if kind == "ag":
        twin: SlowSpiel = SlowAG(base, mask, **AG, **common, rate=fifth)
        optimizer: torch.optim.Optimizer = SpielAdamW(values, **AG, weight_decay=decay)
        method: SpielAG | SpielMA = SpielAG(**WHEN, fall=fall, rate=0.2, steps=N_STEPS)
    else:
        twin = SlowMA(base, mask, **MA, **common, rate=fifth)
        optimizer = SM3(values, **MA, weight_decay=decay)
        method = SpielMA(**WHEN, fall=fall, rate=0.2, steps=N_STEPS)
    with method.attach(model, optimizer):
        for step in range(N_STEPS):
            batches = batches_of(step, n_micro)
            optimizer.zero_grad()
            backward(model, batches)
            optimizer.step()
            twin.step(batches)
            assert_same(model, twin, before)
    assert twin.n_exchanged == model.sparse.about["n_exchanged"]
    assert twin.n_exchanged > sum(e.values.numel() for e in model.sparse.entries.values()) / 2
    model.sparse.sync()
    twin.write()
    assert_close(bits(model), bits(base), rtol=1e-4, atol=1e-6)
    if kind == "ag" and route == "sampled":
        # The first pass of each of the four phases forms every gradient once; the rest is sparse.
        assert model.sparse.route.n_dense == 4 * len(model.sparse.entries)
        assert model.sparse.route.most_alive == 1
    assert model.sparse.route.n_alive == 0
