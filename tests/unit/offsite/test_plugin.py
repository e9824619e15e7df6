"""What a data owner trained goes back into the original, and nothing else changes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from slow_emulator import FAMILIES, MIDDLES, Handed, hand_out, ids
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import selectune
from selectune.adapters.add import quiet
from selectune.errors import (
    ConfigError,
    IncompatibleRunError,
    SelectionError,
    StorageError,
    TrainingError,
)
from selectune.models import blocks, fingerprint
from selectune.offsite.manifests import Terms
from selectune.offsite.plugin import plug, plug_files
from selectune.offsite.plugin_saving import save_plugin

LORA = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["k_proj", "up_proj"],
    "opt": ["v_proj", "fc2"],
    "gpt2": ["c_attn", "c_fc"],
}


def trained(made: Handed, scale: float = 0.01) -> nn.Module:
    """Return the package's emulator with its adapter layers moved."""
    model = selectune.Emulator.from_pretrained(made.package).model
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return model


def with_lora(made: Handed, family: str = "llama", **more: object) -> nn.Module:
    """Return the package's emulator with LoRA that is not zero in its adapter layers."""
    model = selectune.Emulator.from_pretrained(made.package).model
    prefix, layers = made.manifest.blocks, made.manifest.adapter_layers
    names = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[-1] in LORA[family]
        and any(name.startswith(f"{prefix}.{i}.") for i in layers)
    ]
    options = {"r": 3, "lora_alpha": 5, "target_modules": names, "task_type": "CAUSAL_LM", **more}
    with quiet():
        adapted = get_peft_model(model, LoraConfig(**options, fan_in_fan_out=family == "gpt2"))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05)
    return adapted.eval()


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_plugging_an_untrained_adapter_gives_the_original_bits(
    tmp_path: Path, family: str, middle: str
) -> None:
    made = hand_out(tmp_path, family, middle)
    emulator = selectune.Emulator.from_pretrained(made.package).model
    before = fingerprint(made.model.state_dict())
    plugged = plug(made.model, save_plugin(emulator, made.package, tmp_path / "plugin"), made.owner)
    assert plugged.model is made.model
    assert fingerprint(made.model.state_dict()) == before
    assert set(plugged.changes.values()) == {0.0}


@pytest.mark.parametrize("middle", ["compressed", "everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plugging_changes_the_layers_that_trained_and_nothing_else(
    tmp_path: Path, family: str, middle: str
) -> None:
    made = hand_out(tmp_path, family, middle)
    model = trained(made)
    save_plugin(model, made.package, tmp_path / "plugin")
    before = copy.deepcopy(made.model)
    plugged = plug(made.model, tmp_path / "plugin", made.owner)
    last = made.manifest.adapter_layers[-1]
    pairs = [(0, 0), (4, last)]  # in the original and in the emulator
    for j, i in pairs:
        own, tuned = (blocks(m)[k].state_dict() for m, k in ((made.model, j), (model, i)))
        assert fingerprint(own) == fingerprint(tuned)
    rest = {n: t for n, t in made.model.state_dict().items() if n not in plugged.changes}
    old = before.state_dict()
    assert fingerprint(rest) == fingerprint({n: old[n] for n in rest})
    for name, change in plugged.changes.items():
        moved = (made.model.state_dict()[name] - old[name]).norm() / old[name].norm()
        assert change == pytest.approx(float(moved), rel=1e-5)


def test_plugging_twice_equals_once(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    save_plugin(trained(made), made.package, tmp_path / "plugin")
    plug(made.model, tmp_path / "plugin", made.owner)
    once = fingerprint(made.model.state_dict())
    again = plug(made.model, tmp_path / "plugin", made.owner)
    assert fingerprint(made.model.state_dict()) == once
    assert set(again.changes.values()) == {0.0}


def test_lora_is_not_merged_twice(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    save_plugin(with_lora(made), made.package, tmp_path / "plugin")
    plug(made.model, tmp_path / "plugin", made.owner)
    once = fingerprint(made.model.state_dict())
    with pytest.raises(IncompatibleRunError, match="not as they were handed out"):
        plug(made.model, tmp_path / "plugin", made.owner)
    assert fingerprint(made.model.state_dict()) == once


@pytest.mark.parametrize("family", FAMILIES)
def test_plugging_lora_equals_merging_by_hand(tmp_path: Path, family: str) -> None:
    made = hand_out(tmp_path, family, "untouched")
    adapted = with_lora(made, family)
    save_plugin(adapted, made.package, tmp_path / "plugin")
    plugged = plug(made.model, tmp_path / "plugin", made.owner)
    assert plugged.form == "lora"
    # The middle of this emulator is the original's: peft's own answer is the plugged model's.
    assert_close(made.model(ids()).logits, adapted(ids()).logits, rtol=1e-4, atol=1e-5)
    with quiet():
        merged = adapted.merge_and_unload()
    for (name, p), q in zip(made.model.named_parameters(), merged.parameters(), strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("rank_pattern", [{}, {"q_proj": 2}])
def test_scale_and_rank_of_lora_may_differ_by_module(
    tmp_path: Path, rank_pattern: dict[str, int]
) -> None:
    made = hand_out(tmp_path, middle="untouched")
    adapted = with_lora(made, use_rslora=True, rank_pattern=rank_pattern)
    save_plugin(adapted, made.package, tmp_path / "plugin")
    plug(made.model, tmp_path / "plugin", made.owner)
    assert_close(made.model(ids()).logits, adapted(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_bf16_original_is_plugged_in_its_own_type(tmp_path: Path, form: str) -> None:
    made = hand_out(tmp_path, dtype=torch.bfloat16)
    model = trained(made) if form == "full" else with_lora(made)
    save_plugin(model.float(), made.package, tmp_path / "plugin")
    before = copy.deepcopy(made.model)
    plugged = plug(made.model, tmp_path / "plugin", made.owner)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert any(
        not torch.equal(p, q)
        for p, q in zip(made.model.parameters(), before.parameters(), strict=True)
    )
    assert max(plugged.changes.values()) > 0


def test_a_plugin_holds_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    save_plugin(trained(made), made.package, tmp_path / "plugin")
    assert {f.name for f in (tmp_path / "plugin").iterdir()} == {
        "adapter.safetensors",
        "manifest.json",
    }
    tensors = load_file(tmp_path / "plugin/adapter.safetensors")
    assert all(made.manifest.is_adapter(name) for name in tensors)
    facts = json.loads((tmp_path / "plugin/manifest.json").read_text())["meta"]
    assert set(facts) == {"version", "package", "start", "form", "tensors", "scales"}


def test_a_tensor_that_moved_far_is_worth_a_warning(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    save_plugin(trained(made, scale=50.0), made.package, tmp_path / "plugin")
    with pytest.warns(UserWarning, match="moved by more than their own norm, the first is model"):
        plugged = plug(made.model, tmp_path / "plugin", made.owner)
    assert max(plugged.changes.values()) > 1


# The data owner's side.


def test_more_than_the_adapter_trained_is_refused(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    model = trained(made)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(SelectionError, match=r"model.norm.weight is not what the package holds"):
        save_plugin(model, made.package, tmp_path / "plugin")
    assert not (tmp_path / "plugin").exists()


def test_another_model_is_no_emulator_of_the_package(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    with pytest.raises(SelectionError, match="not the emulator of this package"):
        save_plugin(made.model, made.package, tmp_path / "plugin")


def test_values_that_are_no_numbers_are_not_sent(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    model = trained(made)
    with torch.no_grad():
        blocks(model)[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"model.layers.0.mlp.up_proj.weight holds"):
        save_plugin(model, made.package, tmp_path / "plugin")


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}], ids=str
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    tmp_path: Path, options: dict[str, object]
) -> None:
    made = hand_out(tmp_path)
    with pytest.raises(ConfigError, match="cannot be plugged in"):
        save_plugin(with_lora(made, **options), made.package, tmp_path / "plugin")


def test_lora_outside_the_layers_that_train_is_refused(tmp_path: Path) -> None:
    made = hand_out(tmp_path, middle="untouched")
    adapted = with_lora(made, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"model.layers.1.self_attn.q_proj is no linear module"):
        save_plugin(adapted, made.package, tmp_path / "plugin")


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        (Terms(forms=("full",)), 'form "lora"'),
        (Terms(max_rank=2), "have the rank 3"),
        (Terms(modules=("q_proj",)), "agreed are those in q_proj"),
    ],
)
def test_what_was_not_agreed_is_refused_before_it_is_sent(
    tmp_path: Path, terms: Terms, why: str
) -> None:
    made = hand_out(tmp_path, terms=terms)
    with pytest.raises(IncompatibleRunError, match=why):
        save_plugin(with_lora(made), made.package, tmp_path / "plugin")


# Folders.


def test_the_tuned_model_is_an_ordinary_folder_and_the_original_stays(tmp_path: Path) -> None:
    made = hand_out(tmp_path, middle="everything")
    save_plugin(trained(made), made.package, tmp_path / "plugin")
    before = {f: f.read_bytes() for f in (tmp_path / "original").iterdir()}
    done = plug_files(tmp_path / "original", tmp_path / "plugin", made.owner, tmp_path / "tuned")
    assert {f: f.read_bytes() for f in (tmp_path / "original").iterdir()} == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert fingerprint(loaded.state_dict()) == fingerprint(done.model.state_dict())
    plug(made.model, tmp_path / "plugin", made.owner)
    assert fingerprint(loaded.state_dict()) == fingerprint(made.model.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned")("a").input_ids
    plug_files(tmp_path / "original", tmp_path / "plugin", made.owner, tmp_path / "tuned")


@pytest.mark.parametrize("out", ["original", "original/tuned", "plugin", "owner", "."])
def test_the_tuned_model_overwrites_none_of_its_parts(tmp_path: Path, out: str) -> None:
    made = hand_out(tmp_path)
    save_plugin(trained(made), made.package, tmp_path / "plugin")
    with pytest.raises(ConfigError, match="cannot be written to"):
        plug_files(tmp_path / "original", tmp_path / "plugin", made.owner, tmp_path / out)


def test_the_tuned_model_overwrites_no_other_result(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    save_plugin(trained(made), made.package, tmp_path / "plugin")
    with pytest.raises(StorageError, match="something else than a tuned model"):
        plug_files(tmp_path / "original", tmp_path / "plugin", made.owner, made.package)


def test_an_original_that_is_not_there_is_named(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    save_plugin(trained(made), made.package, tmp_path / "plugin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        plug(tmp_path / "elsewhere", tmp_path / "plugin", made.owner)
