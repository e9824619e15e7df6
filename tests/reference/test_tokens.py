"""Token scores equal one backward pass per token, and add up to what the example asks for."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from loops import loop_gradients
from slow_tokens import slow_direction, slow_loss_scores, slow_position_scores
from tiny import tiny_batch, tiny_model, tiny_tokens, tiny_trainable
from torch import Tensor, nn

from selectune.errors import ConfigError, CoverageError
from selectune.gradients.engine import GradientEngine
from selectune.gradients.token_scores import loss_scores, position_scores, task_direction


def some_direction(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of other examples, as a task's direction is."""
    gradients = loop_gradients(model, tiny_tokens(3, seed=7))
    return {name: rows.mean(0) for name, rows in gradients.items()}


def whole(model: nn.Module, direction: Mapping[str, Tensor]) -> Tensor:
    """Return <g_n, u> of every example by the one-example loop."""
    gradients = loop_gradients(model, tiny_tokens())
    parts = [(g.flatten(1) @ direction[n].flatten()) for n, g in gradients.items()]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_scores_are_one_backward_per_token_and_add_up(family: str, kind: str) -> None:
    model = tiny_trainable(family, kind).double()
    u = some_direction(model)
    # Llama's RMSNorms are computed in fp32 whatever the weights are.
    rtol = 1e-9 if family == "gpt2" else 1e-5
    expected = whole(model, u)
    for side in ("left", "right"):
        found = loss_scores(model, tiny_batch(side=side), u, "float32")
        assert torch.allclose(found.sum(1), expected, rtol=rtol, atol=rtol * 1e-2)
        for row, example in zip(found, tiny_tokens(), strict=True):
            slow = torch.tensor(slow_loss_scores(model, example, u), dtype=torch.float64)
            scale = float(slow.abs().max())
            assert torch.allclose(row[: len(slow)], slow, rtol=0, atol=rtol * scale)
            assert not row[len(slow) :].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_position_scores_move_one_token_at_a_time_and_add_up(family: str) -> None:
    model = tiny_trainable(family, "lora").double()
    u = some_direction(model)
    found = position_scores(GradientEngine(model), tiny_batch(), u)
    rtol = 1e-9 if family == "gpt2" else 1e-5
    assert torch.allclose(found.double().sum(1), whole(model, u), rtol=rtol, atol=rtol * 1e-2)
    for row, example in zip(found, tiny_tokens(), strict=True):
        slow = torch.tensor(slow_position_scores(model, example, u), dtype=torch.float64)
        scale = float(slow.abs().max())
        assert torch.allclose(row[: len(slow)].double(), slow, rtol=0, atol=rtol * scale)
        assert not row[len(slow) :].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_forms_agree_in_fp32_and_leave_the_model_as_it_was(family: str) -> None:
    model = tiny_trainable(family, "lora").train()
    u = some_direction(model.eval())
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    by_loss = loss_scores(model, tiny_batch(), u, "float32")
    assert model.training
    by_position = position_scores(GradientEngine(model), tiny_batch(), u)
    assert torch.allclose(by_loss.sum(1), by_position.sum(1), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rule", [1, 2, "energy:0.8", "full"])
def test_the_direction_is_the_mean_target_inside_its_space(rule: int | str, tmp_path: Path) -> None:
    model, targets = tiny_trainable("llama", "lora"), tiny_tokens(4, seed=3)
    gradients = loop_gradients(model, targets)
    V = torch.cat([g.flatten(1) for g in gradients.values()], 1).numpy()
    seen: list[int] = []
    found = task_direction(
        GradientEngine(model), targets, rule=rule, seed=0, file=tmp_path / "deep" / "v.bin",
        pad_id=0, token_budget=24, advance=seen.append,
    )  # fmt: skip
    expected = slow_direction(V, found.rank)
    flat = torch.cat([found.parts[n].flatten() for n in gradients]).numpy()
    assert np.allclose(flat, expected, atol=1e-5 * np.linalg.norm(expected))
    assert found.norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert sum(seen) == 4
    assert len(seen) > 1
    assert not (tmp_path / "deep" / "v.bin").exists()
    if rule == "full":
        assert np.allclose(expected, V.mean(0), atol=1e-6)
    else:
        assert found.rank == rule or rule == "energy:0.8"


def test_biases_and_norms_have_no_positions() -> None:
    model = tiny_trainable("gpt2", "full")
    with pytest.raises(CoverageError) as caught:
        position_scores(GradientEngine(model), tiny_batch(), some_direction(model))
    assert caught.value.where in dict(model.named_parameters())


class _NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g


def test_an_operation_without_forward_mode_is_refused_by_name() -> None:
    model = tiny_model("gpt2")
    u = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    model.transformer.h[0].register_forward_hook(lambda _m, _a, y: _NoForward.apply(y))
    with pytest.raises(ConfigError) as caught:
        loss_scores(model, tiny_batch(), u, "float32")
    assert "position" in str(caught.value.do)
