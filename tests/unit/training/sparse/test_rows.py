"""Gradients per example at chosen entries, and training methods on top of them."""

from typing import Any

import pytest
import torch
from loops import loop_gradients
from slow_gast import batch_loss
from slow_sparse import bits, chosen, is_matrix, mask_of
from tiny import FAMILIES, tiny_batch, tiny_model, tiny_tokens
from torch import Tensor
from torch.testing import assert_close

from selectune import GAST, LISA, OWS, RST
from selectune.data import collate
from selectune.gradients.engine import GradientEngine
from selectune.gradients.kernels import Rows, SparseRows, project_with_norm, total
from selectune.training.layers import trainable_layers
from selectune.training.method import Method
from selectune.training.sources import TokenSource
from selectune.training.sparse import sparsify
from selectune.weights.base import base_weights

TOKENS = tiny_tokens(5)
POOL = tiny_tokens(12, seed=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_question_is_answered_as_by_the_loop(family: str) -> None:
    model = tiny_model(family)
    sparsify(model, mask_of(model, 0.3))
    expected = loop_gradients(model, TOKENS)
    engine = GradientEngine(model)
    seen: set[str] = set()

    def ask(name: str, rows: Rows) -> None:
        dense = expected[name]
        seen.add(name)
        rng = torch.Generator().manual_seed(0)
        k = dense.shape[1]
        w, g, directions = (torch.randn(s, generator=rng) for s in (5, k, (3, k)))
        close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4, "msg": name}
        assert rows.n == 5
        assert rows.shape == (k,)
        assert_close(rows.dense(), dense, **close)
        assert_close(rows.combine(w), w @ dense, **close)
        assert_close(rows.dot(g), dense @ g, **close)
        assert_close(rows.norm2(), dense.square().sum(1), **close)
        projected, norm2 = project_with_norm(rows, directions)
        assert_close(projected, dense @ directions.T, **close)
        assert_close(rows.project(directions), dense @ directions.T, **close)
        assert_close(norm2, dense.square().sum(1), **close)
        assert_close(total(rows), dense.sum(0), **close)

    engine.run(collate(TOKENS, pad_id=0), ask)
    assert seen == set(expected)
    usual = {n for n in engine.looped if "layers." in n or ".h." in n}
    plain = GradientEngine(tiny_model(family))
    plain.run(collate(TOKENS, pad_id=0), lambda name, rows: None)
    assert usual == {f"{n}_values" for n in plain.looped if "layers." in n or ".h." in n}


def test_rows_of_a_matrix_never_form_it_to_be_combined() -> None:
    model = tiny_model("llama")
    sparsify(model, mask_of(model, only=is_matrix), route="sampled")
    found: dict[str, Rows] = {}
    GradientEngine(model).run(collate(TOKENS, pad_id=0), found.__setitem__)
    assert all(isinstance(rows, SparseRows) for rows in found.values())
    assert all(rows.pattern is not None for rows in found.values() if isinstance(rows, SparseRows))


def one_step(method: Method | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = tiny_model("llama").train()
    mask = mask_of(model, only=is_matrix)
    sparsify(model, mask)
    assert len(trainable_layers(model)) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = collate(POOL[:6], pad_id=0)
    if method is None:
        batch_loss(model, batch, "token").backward()
        optimizer.step()
    else:
        source = TokenSource(POOL, pad_id=0)
        with method.attach(model, optimizer, pool=source, target=source, seed=3) as session:
            session.expect(batch.labels, batch.ids)
            batch_loss(model, batch, "token").backward()
            optimizer.step()
    before = bits(tiny_model("llama"))
    for name, p in base_weights(model).items():
        outside = ~chosen(mask, name, p.shape)
        assert torch.equal(p.detach()[outside], before[name][outside])
    return bits(model), before


def test_gast_with_everything_picked_is_plain_training() -> None:
    found, _ = one_step(GAST(pick="all"))
    expected, before = one_step(None)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found[n], before[n]) for n in found)


@pytest.mark.parametrize(
    "method",
    [GAST(), GAST(form="two_pass"), RST(layers=1), LISA(layers=1, interval=2), OWS(layers=1)],
    ids=repr,
)
def test_methods_choose_layers_and_examples_of_chosen_entries(method: Method) -> None:
    found, before = one_step(method)
    moved = {n.split(".")[2] for n in found if not torch.equal(found[n], before[n])}
    assert moved == {"0", "1"} if isinstance(method, GAST) else len(moved) == 1


def test_batches_of_one_example_are_the_same_gradient() -> None:
    model = tiny_model("gpt2")
    sparsify(model, mask_of(model, 0.3))
    whole: dict[str, Tensor] = {}
    engine = GradientEngine(model)
    engine.run(tiny_batch(), lambda name, rows: whole.__setitem__(name, rows.dense()))
    parts: dict[str, list[Tensor]] = {}
    for k in range(5):
        one = collate([TOKENS[k]], pad_id=0)
        engine.run(one, lambda name, rows: parts.setdefault(name, []).append(rows.dense()))
    assert_close({n: torch.cat(p) for n, p in parts.items()}, whole, rtol=1e-3, atol=1e-5)
