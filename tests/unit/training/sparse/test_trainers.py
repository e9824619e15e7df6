"""Chosen entries in transformers.Trainer and trl.SFTTrainer: train, save, resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_case import quantised
from slow_sparse import bits, chosen, is_matrix, live, mask_of
from torch import nn
from torch.testing import assert_close

from selectune import GAST
from selectune.training.sparse import restore, sparsify
from selectune.training.sparse.entries import Form
from selectune.weights.base import base_weights
from selectune.weights.delta import SparseDelta
from selectune.weights.merging import merge
from user_training import TRAINERS, Run, assert_same_bits, bare, lora

# transformers 5.24 renamed `gradient_checkpointing`, which 5.23 and trl 1.16 know alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

BASE = bits(bare())
# Everything, head and embedding too: trl's fused head never calls its module.
MASK = mask_of(bare(), 0.1)
FORMS: tuple[Form, ...] = ("in_place", "compose")


def sparse(dtype: torch.dtype = torch.float32, form: Form = "in_place") -> nn.Module:
    model = bare().to(dtype)
    only = is_matrix if form == "compose" else BASE.__contains__
    return sparsify(model, mask_of(model, 0.1, only=only), route="sampled", form=form)


def assert_only_chosen_moved(model: nn.Module, base: dict[str, torch.Tensor] = BASE) -> None:
    mask = model.sparse.mask
    if model.sparse.form == "compose":
        assert_close(bits(model), base, rtol=0, atol=0)
        assert model.sparse.moved() == mask.n_chosen
        return
    for name, p in base_weights(model).items():
        is_chosen = chosen(mask, name, p.shape)
        assert torch.equal(p.detach()[~is_chosen], base[name][~is_chosen]), name
        if name in mask.indices:
            assert not torch.equal(p.detach()[is_chosen], base[name][is_chosen]), name


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("gc", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_chosen_entries_move(kind: str, gc: bool, form: Form, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"weight_decay": 0.1, "gradient_checkpointing": gc}
    model = sparse(form=form)
    run = Run(tmp_path, kind, model=model, gradient_accumulation_steps=2, **arguments).train()
    assert_only_chosen_moved(run.model)
    assert run.losses[-1] < run.losses[0]
    run.trainer.save_model(str(tmp_path / "delta"))
    assert_close(bits(merge(bare(), tmp_path / "delta")), live(run.model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_trainers_find_what_plain_training_would(kind: str, form: Form, tmp_path: Path) -> None:
    every = mask_of(bare(), 1.0, only=is_matrix)
    plain = bare()
    for name, p in plain.named_parameters():
        p.requires_grad_(is_matrix(name))
    decay = 0.1 if form == "in_place" else 0.0  # beside a matrix it pulls at what is added
    arguments: dict[str, Any] = {"weight_decay": decay, "adam_epsilon": 1e-4}
    dense = Run(tmp_path / "a", kind, model=plain, **arguments).train()
    model = sparsify(bare(), every, form=form)
    run = Run(tmp_path / "b", kind, model=model, **arguments).train()
    assert run.losses == pytest.approx(dense.losses, rel=1e-4)
    assert_close(live(run.model), bits(dense.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    kind: str, dtype: torch.dtype, form: Form, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    whole = Run(tmp_path / "a", kind, model=sparse(dtype, form), **arguments).train()
    assert len(SparseDelta.load(tmp_path / "a" / "checkpoint-2")) == whole.model.sparse.n_chosen
    again = Run(tmp_path / "b", kind, model=sparse(dtype, form), **arguments)
    again.train(resume=tmp_path / "a" / "checkpoint-2")
    assert_same_bits(whole, again)
    assert_close(bits(whole.model), bits(again.model), rtol=0, atol=0)
    assert_only_chosen_moved(again.model, bits(bare().to(dtype)))
    assert "missing keys" not in caplog.text


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "transformers",
        model=sparse(),
        given={"eval_dataset": [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]},
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first step, on purpose
    ).train()
    best = Path(str(run.trainer.state.best_model_checkpoint))
    found = bits(merge(bare(), best))
    assert_close(bits(run.model), found, rtol=0, atol=1e-7)  # a checkpoint is not sealed


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_lora_beside_sparse_entries_resumes_too(kind: str, form: Form, tmp_path: Path) -> None:
    def both() -> nn.Module:
        return sparsify(lora(), mask_of(bare(), 0.1, only=is_matrix), route="sampled", form=form)

    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = Run(tmp_path / "a", kind, model=both(), **arguments).train()
    names = set(whole.weights)
    assert {"lora", "_values"} <= {k for n in names for k in ("lora", "_values") if k in n}
    again = Run(tmp_path / "b", kind, model=both(), **arguments)
    again.train(resume=tmp_path / "a" / "checkpoint-2")
    assert_same_bits(whole, again)
    assert_only_chosen_moved(again.model)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_gast_picks_examples_for_the_chosen_entries(kind: str, form: Form, tmp_path: Path) -> None:
    model = sparsify(bare(), mask_of(bare(), 0.1, only=is_matrix), form=form)
    run = Run(tmp_path, kind, GAST(), model=model).train()
    assert_only_chosen_moved(run.model)
    assert len(run.records) == 4


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("bits_each", ["bnb 4 bit", "bnb 8 bit"])
def test_a_quantised_base_trains_and_resumes_bit_for_bit(
    kind: str, bits_each: str, tmp_path: Path
) -> None:
    mask = mask_of(bare(), 0.1, only=is_matrix)

    def model() -> nn.Module:
        base = quantised(bare(), bits_each).train()
        return sparsify(base, mask, form="compose", other_base=True, route="sampled")

    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    whole = Run(tmp_path / "a", kind, model=model(), **arguments).train()
    assert whole.model.sparse.moved() == mask.n_chosen
    assert SparseDelta.load(tmp_path / "a" / "checkpoint-4").base == whole.model.sparse.base
    again = Run(tmp_path / "b", kind, model=model(), **arguments)
    again.train(resume=tmp_path / "a" / "checkpoint-2")
    assert_same_bits(whole, again)
    given_back = restore(again.model, to_base=True)
    with pytest.raises(ValueError, match="purely quantized models"):  # as transformers has it
        Run(tmp_path / "c", kind, model=given_back)
