"""LoTA's and RoSA's masks against their twins, and what is left of the trial run: nothing."""

import copy
from pathlib import Path

import pytest
import torch
from slow_gast import batch_loss
from slow_sparse import bits, is_matrix
from slow_trial import slow_beside, slow_lota, slow_rosa
from tiny import tiny_batch, tiny_model, tiny_tokens, tiny_trainable
from torch import nn
from torch.testing import assert_close

from selectune.errors import ConfigError, SelectionError, TrainingError
from selectune.methods.weights.fisher import Fisher
from selectune.methods.weights.lota import LoTA
from selectune.training.sparse import SparseModel, sparsify
from selectune.weights import drift_mask, rosa
from selectune.weights.base import base_weights
from selectune.weights.mask import WeightMask
from user_training import Run, bare, tokenised

ITEMS = tiny_tokens(6, seed=2)


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        batch_loss(model, tiny_batch(3, seed=seed), "token").backward()
        optimizer.step()


def places(mask: WeightMask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.indices.items()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lota_is_what_drifts_most_and_nothing_stays_moved(family: str) -> None:
    model = tiny_model(family)
    names = [n for n, p in model.named_parameters() if "h.0." in n or "layers." in n]
    names = [n for n in names if n.endswith("weight") and "norm" not in n and "ln_" not in n]
    names += [n for n in model.state_dict() if "h.1." in n and n.endswith("weight")]
    names = [n for n in dict.fromkeys(names) if "ln_" not in n]
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    mask = drift_mask(model, train, scorer=LoTA(density=0.07))
    assert_close(state(model), before, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert places(mask) == slow_lota(model, train, 0.07, names)
    assert_close(state(model), before, rtol=0, atol=0)
    sparsify(model, mask)
    train(model)
    moved = {n: int((t != before[n]).sum()) for n, t in bits(model).items()}
    assert sum(moved.values()) == model.sparse.moved() > 0.9 * mask.n_chosen
    # The next task trains what this one left alone.
    rest = mask.complement()
    assert rest.n_chosen == mask.n_eligible - mask.n_chosen
    assert (rest & mask).n_chosen == 0


def test_lota_takes_a_tenth_by_itself() -> None:
    mask = drift_mask(tiny_model("llama"), train)
    assert mask.density == pytest.approx(0.1, abs=1e-3)
    assert mask.about["method"] == "lota"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rosa_starts_anew_with_the_mask_of_the_trial(family: str) -> None:
    model = tiny_trainable(family, "lora")
    before = state(model)
    twin = copy.deepcopy(model)
    expected = slow_rosa(twin, ITEMS, train, 0.05)
    found = rosa(model, ITEMS, train, scorer=_fisher(model))
    assert found is model
    assert isinstance(model, SparseModel)
    assert places(model.sparse.mask) == expected
    held = {n: t for n, t in state(model).items() if not n.endswith("_values")}
    assert_close(held, before, rtol=0, atol=0)
    assert_close(state(twin), before, rtol=0, atol=0)

    def loss(of: nn.Module) -> torch.Tensor:
        return batch_loss(of, tiny_batch(4, seed=9), "token")

    values = model.sparse.parameters()
    own = {id(v) for v in values}
    lora = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [{"params": lora, "lr": 1e-2}, {"params": values, "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    slow_beside(twin, expected, loss, 3, (1e-2, 3e-3))
    after = {n: t for n, t in state(model).items() if not n.endswith("_values")}
    assert_close(after, state(twin), rtol=1e-5, atol=1e-6)


def _fisher(model: nn.Module) -> Fisher:
    held = {id(p) for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    names = [n for n, p in base_weights(model).items() if id(p) in held]
    return Fisher(density=0.05, eligible=names)


def test_rosa_by_itself_takes_the_matrices_below_the_lora() -> None:
    model = tiny_trainable("llama", "lora")
    shared = {id(p) for p in model.parameters() if not p.requires_grad}
    seen: list[int] = []

    def watched(trial: nn.Module) -> None:
        seen.extend(id(p) for p in trial.parameters() if not p.requires_grad)
        train(trial)

    rosa(model, ITEMS, watched, route="gather")
    assert set(seen) == shared  # the base is not doubled
    assert {n.split(".")[-2] for n in model.sparse.mask.indices} == {
        "q_proj", "o_proj", "down_proj",
    }  # fmt: skip
    assert all(index.numel() == int(0.006 * n) for n, index in _sizes(model))
    assert model.sparse.route.asked == "gather"


def _sizes(model: SparseModel) -> list[tuple[int, torch.Tensor]]:
    mask = model.sparse.mask
    return [(base_weights(model)[name].numel(), index) for name, index in mask]


def test_trials_run_in_trainers(tmp_path: Path) -> None:
    def full(trial: nn.Module) -> object:
        return Run(tmp_path, "transformers", model=trial, data=tokenised()).train()

    model = bare()
    before = state(model)
    mask = drift_mask(model, full)
    assert_close(state(model), before, rtol=0, atol=0)
    assert all(is_matrix(name) for name in mask.indices)


def test_a_trial_that_does_nothing_is_refused() -> None:
    with pytest.raises(TrainingError, match="drift"):
        drift_mask(tiny_model("llama"), lambda _: None)
    model = tiny_trainable("llama", "lora")
    with pytest.raises(TrainingError, match="trial run changed nothing"):
        rosa(model, ITEMS, lambda _: train(copy.deepcopy(model)))
    assert not isinstance(model, SparseModel)


def test_rosa_needs_a_lora_that_is_bare() -> None:
    with pytest.raises(ConfigError, match="no LoRA around a matrix"):
        rosa(tiny_model("llama"), ITEMS, train)
    model = rosa(tiny_trainable("llama", "lora"), ITEMS, train, scorer=Fisher(density=0.01))
    with pytest.raises(SelectionError, match="chosen entries already"):
        rosa(model, ITEMS, train)
    with pytest.raises(SelectionError, match="chosen entries already"):
        drift_mask(model, train)


def test_a_trial_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny_trainable("llama", "lora")
    before = state(model)

    def fail(trial: nn.Module) -> None:
        train(trial)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rosa(model, ITEMS, fail)
    assert_close(state(model), before, rtol=0, atol=0)
    assert not isinstance(model, SparseModel)
