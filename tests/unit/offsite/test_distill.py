"""Training of an emulator's middle: what it minimises, and what it leaves alone."""

import copy

import pytest
import torch
from deep import deep_model
from slow_quality import slow_distillation
from tiny import tiny_tokens
from torch import nn

from selectune.errors import DataError, TrainingError
from selectune.models import blocks, fingerprint
from selectune.offsite.distill import MiddleTraining, middle_ends, train_middle
from selectune.offsite.layout import Layout
from unit.offsite.test_quality import emulated

LAYERS = {0: 0, 3: 2}
ENDS = {2: 1}


def outside(model: nn.Module) -> str:
    """Return a fingerprint of everything but the middle."""
    middle = {id(p) for p in blocks(model)[1].parameters()}
    return fingerprint({n: p for n, p in model.named_parameters() if id(p) not in middle})


def test_a_middle_ends_where_adapters_begin() -> None:
    whole = {j: j for j in range(6)}
    assert middle_ends(Layout.of(6, [0, 1, 4, 5]), whole) == {3: 3}
    assert middle_ends(Layout.of(6, [0, 3]), whole) == {2: 2, 5: 5}
    assert middle_ends(Layout.of(6, [0, 5]), {0: 0, 2: 1, 5: 2}) == {4: 1}
    assert middle_ends(Layout.of(6, [2]), {2: 0, 4: 1}) == {5: 1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_loss_is_that_of_plain_loops(family: str) -> None:
    model = deep_model(4, family)
    other, items = emulated(model), tiny_tokens(4)
    expected = slow_distillation(model, other, ENDS, items)
    how = MiddleTraining(steps=1, batch_size=4)
    [loss] = train_middle(other, items, how, adapters=[0, 2], teacher=model, ends=ENDS, pad_id=0)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_training_moves_the_middle_and_nothing_else() -> None:
    model = deep_model(4)
    teacher = fingerprint(model.state_dict())
    other = emulated(model)
    before, middle = outside(other), fingerprint(blocks(other)[1].state_dict())
    flags = [p.requires_grad for p in other.parameters()]
    how = MiddleTraining(steps=12, learning_rate=3e-3, batch_size=2)
    losses = train_middle(
        other, tiny_tokens(6), how, adapters=[0, 2], teacher=model, ends=ENDS, pad_id=0
    )
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert outside(other) == before
    assert fingerprint(blocks(other)[1].state_dict()) != middle
    assert fingerprint(model.state_dict()) == teacher
    assert [p.requires_grad for p in other.parameters()] == flags
    assert all(p.grad is None for p in other.parameters())


def test_training_repeats_by_its_seed() -> None:
    how = MiddleTraining(steps=5, batch_size=2)

    def trained(seed: int) -> str:
        other = emulated(deep_model(4))
        train_middle(other, tiny_tokens(6), how, adapters=[0, 2], pad_id=0, seed=seed)
        return fingerprint(other.state_dict())

    assert trained(1) == trained(1) != trained(2)


def test_weights_in_bf16_move_though_a_step_is_smaller_than_their_rounding() -> None:
    other = emulated(deep_model(4)).to(torch.bfloat16)
    before = [p.clone() for p in blocks(other)[1].parameters()]
    how = MiddleTraining(steps=200, learning_rate=1e-5, batch_size=2)
    train_middle(other, tiny_tokens(2), how, adapters=[0, 2], pad_id=0)
    after = blocks(other)[1].parameters()
    moved = [float((p != b).float().mean()) for p, b in zip(after, before, strict=True)]
    assert max(moved) > 0.01
    assert all(p.dtype == torch.bfloat16 for p in other.parameters())


def test_what_cannot_be_trained_is_refused() -> None:
    model = deep_model(3)
    how = MiddleTraining(steps=1)
    with pytest.raises(DataError, match="no text"):
        train_middle(model, [], how, adapters=[0, 2], pad_id=0)
    with pytest.raises(TrainingError, match="no middle left"):
        train_middle(model, tiny_tokens(), how, adapters=[0, 1, 2], pad_id=0)
    with torch.no_grad():
        next(blocks(model)[1].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="not a number"):
        train_middle(copy.deepcopy(model), tiny_tokens(), how, adapters=[0, 2], pad_id=0)
