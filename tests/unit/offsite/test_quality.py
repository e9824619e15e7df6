"""Agreement of gradients, divergence of logits and parameter ratios, against plain loops."""

import copy

import pytest
import torch
from deep import deep_model
from slow_quality import slow_agreement, slow_divergence
from tiny import tiny_tokens
from torch import nn
from torch.testing import assert_close

from selectune.errors import TrainingError
from selectune.models import blocks, fingerprint
from selectune.offsite.quality import gradient_agreement, logit_divergence, parameter_ratios

FAMILIES = ["llama", "qwen2", "gpt2", "opt"]
LAYERS = {0: 0, 3: 2}  # one layer of the middle is gone


def emulated(model: nn.Module) -> nn.Module:
    """Return a copy whose middle is one layer shorter and otherwise disturbed."""
    found = copy.deepcopy(model)
    every = next(
        m for m in found.modules() if isinstance(m, nn.ModuleList) and len(m) == len(blocks(found))
    )
    del every[1]
    for index, block in enumerate(every):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    torch.manual_seed(7)
    with torch.no_grad():
        for p in every[1].parameters():
            p.add_(0.05 * torch.randn_like(p))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("token_budget", [1, 1000])
def test_agreement_is_that_of_one_example_at_a_time(family: str, token_budget: int) -> None:
    model = deep_model(4, family)
    other, items = emulated(model), tiny_tokens()
    found = gradient_agreement(model, other, LAYERS, items, pad_id=0, token_budget=token_budget)
    expected = slow_agreement(model, other, LAYERS, items)
    assert (found.total.cosine, found.total.relative_error) == pytest.approx(expected, rel=1e-4)
    for j, i in LAYERS.items():
        one = found.by_layer[j]
        expected = slow_agreement(model, other, {j: i}, items)
        assert (one.cosine, one.relative_error) == pytest.approx(expected, rel=1e-4)


def test_a_model_agrees_with_itself() -> None:
    model = deep_model(3)
    layers = {0: 0, 2: 2}
    found = gradient_agreement(model, copy.deepcopy(model), layers, tiny_tokens(), pad_id=0)
    assert found.total.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.total.relative_error == pytest.approx(0.0, abs=1e-6)
    assert logit_divergence(model, model, tiny_tokens(), pad_id=0) == 0.0


def test_measuring_leaves_flags_gradients_and_weights_alone() -> None:
    model = deep_model(4).train()
    other = emulated(model)
    blocks(model)[1].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = fingerprint(model.state_dict())
    gradient_agreement(model, other, LAYERS, tiny_tokens(), pad_id=0)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert fingerprint(model.state_dict()) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("token_budget", [1, 1000])
def test_divergence_is_that_of_one_token_at_a_time(family: str, token_budget: int) -> None:
    model = deep_model(4, family)
    other, items = emulated(model), tiny_tokens()
    found = logit_divergence(model, other, items, pad_id=0, token_budget=token_budget)
    assert found == pytest.approx(slow_divergence(model, other, items), rel=1e-4)


def test_gradients_that_are_no_numbers_are_refused() -> None:
    model = deep_model(3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(blocks(other)[1].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="cannot be compared"):
        gradient_agreement(model, other, {0: 0, 2: 2}, tiny_tokens(), pad_id=0)


def test_ratios_count_each_parameter_once() -> None:
    model = deep_model(4)
    size = sum(p.numel() for p in blocks(model)[0].parameters())
    whole = sum(p.numel() for p in model.parameters())
    found = parameter_ratios(model, emulated(model), LAYERS)
    assert found.middle == 0.5
    assert found.with_adapter == 0.75
    assert (found.n_original, found.n_emulator) == (whole, whole - size)
    assert_close(found.whole, (whole - size) / whole)


def test_shared_layers_count_once() -> None:
    model = deep_model(4)
    other = copy.deepcopy(model)
    one, two = blocks(other)[1:3]
    for mine, theirs in zip(two.modules(), one.modules(), strict=True):
        for name, p in list(theirs.named_parameters(recurse=False)):
            setattr(mine, name, p)
    assert parameter_ratios(model, other, {0: 0, 3: 3}).middle == 0.5
