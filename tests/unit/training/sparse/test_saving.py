"""What a model with chosen entries writes: a delta that gives its live bits, or a checkpoint."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from slow_gast import batch_loss
from slow_sparse import bits, is_matrix, mask_of
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from selectune.errors import StorageError, TrainingError
from selectune.training.sparse import SparseModel, sparsify
from selectune.training.sparse.entries import DecayTo
from selectune.weights.delta import Indices, SparseDelta, Stored
from selectune.weights.merging import merge

BATCH = tiny_batch()


def train(model: nn.Module, lr: float = 1e-2) -> SparseModel:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        batch_loss(model, BATCH, "token").backward()
        optimizer.step()
    optimizer.zero_grad()
    assert isinstance(model, SparseModel)
    return model


def trained(dtype: torch.dtype = torch.float32, decay_to: DecayTo = "zero") -> SparseModel:
    model = tiny_model("llama").to(dtype)
    return train(sparsify(model, mask_of(model), decay_to=decay_to))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay_to", ["zero", "base"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("indices", ["plain", "gaps"])
def test_the_base_with_the_delta_is_what_was_live(
    dtype: torch.dtype, decay_to: DecayTo, stored: Stored, indices: Indices, tmp_path: Path
) -> None:
    model = trained(dtype, decay_to)
    model.save_pretrained(tmp_path / "delta", dtype=stored, indices=indices)
    live = bits(model)
    model.sparse.sync()
    merged = merge(tiny_model("llama").to(dtype), tmp_path / "delta")
    assert_close(bits(merged), live, rtol=0, atol=0)
    for entries in model.sparse.entries.values():  # and the next step starts from there
        held = entries.weight.detach().flatten()[entries.index]
        assert torch.equal(held, entries.masters().to(dtype))


def test_the_delta_says_where_it_comes_from(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "delta")
    delta = SparseDelta.load(tmp_path / "delta")
    assert delta.mask().indices.keys() == model.sparse.mask.indices.keys()
    assert delta.base == model.sparse.base
    assert delta.about["method"] == "random"
    assert delta.about["n_moved"] == model.sparse.moved() > 0.9 * len(delta)
    assert delta.about["density"] == pytest.approx(0.2, abs=0.01)


def test_sealing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    before = bits(model)
    with caplog.at_level(logging.INFO):
        model.save_pretrained(tmp_path / "delta")
    changed = sum(int((bits(model)[n] != before[n]).sum()) for n in before)
    assert changed > 0
    assert f"{changed} of {model.sparse.n_chosen} chosen weights changed" in caplog.text


def test_a_trainers_checkpoint_changes_nothing_and_brings_everything_back(tmp_path: Path) -> None:
    model = trained()
    folder = tmp_path / "checkpoint-7"
    before = [p.detach().clone() for p in model.sparse.parameters()]
    live = bits(model)
    model.sparse.routes["a case"] = "gather"
    model.save_pretrained(folder, state_dict=None)
    assert_close(bits(model), live, rtol=0, atol=0)
    assert_close([p.detach() for p in model.sparse.parameters()], before, rtol=0, atol=0)
    assert len(SparseDelta.load(folder)) == model.sparse.n_chosen
    held = load_file(folder / "model.safetensors")
    assert sum(t.numel() for n, t in held.items() if n.endswith("_values")) == model.sparse.n_chosen
    assert held.keys() == {
        "_extra_state",
        *(f"{name}_values" for name in model.sparse.mask.indices),
    }
    fresh = tiny_model("llama")
    sparsify(fresh, model.sparse.mask)
    result = fresh.load_state_dict(held, False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_close(bits(fresh), live, rtol=0, atol=0)
    assert fresh.sparse.routes["a case"] == "gather"


def test_what_is_missing_is_still_told() -> None:
    model = trained()
    held = {n: t for n, t in model.state_dict().items() if n.endswith("_values")}
    lost = held.popitem()[0]
    assert lost in model.load_state_dict(held, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(held)


def test_an_adapter_is_saved_beside_the_delta(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    sparsify(model, mask_of(tiny_model("llama"), only=is_matrix))
    assert isinstance(model, PeftModel)
    train(model)
    model.save_pretrained(tmp_path / "both")
    base = merge(tiny_model("llama"), tmp_path / "both")
    again = PeftModel.from_pretrained(base, str(tmp_path / "both"))
    with torch.no_grad():
        assert torch.equal(batch_loss(again, BATCH, "token"), batch_loss(model, BATCH, "token"))
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=None)
    held = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert sum("lora" in name for name in held) == 8
    assert not any(name.endswith("base_layer.weight") for name in held)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "delta", is_main_process=False)
    assert not (tmp_path / "delta").exists()


def test_a_delta_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, object]]] = []

    def push(self: nn.Module, repo_id: str, **options: object) -> None:
        self.save_pretrained(tmp_path / "hub", max_shard_size="50GB")
        calls.append((repo_id, options))

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push)
    model = trained()
    model.push_to_hub("me/delta")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert calls == [("me/delta", {}), ("mine", {"private": True})]
    assert json.loads((tmp_path / "hub" / "sparse.json").read_text())["base"] == model.sparse.base


def test_what_cannot_be_saved_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = trained()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        model.save_pretrained(tmp_path / "file")
    with torch.no_grad():
        model.sparse.parameters()[0][0] = torch.nan
    model.sparse.sync()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match="not a finite number"):
        model.save_pretrained(tmp_path / "delta")
    assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert not (tmp_path / "delta").exists()
