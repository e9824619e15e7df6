"""Adapters as peft saves them find their place, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from selectune.adapters import adapter_fingerprint, add_adapter, load_adapter
from selectune.errors import ConfigError, IncompatibleRunError
from selectune.models import load_base, trainable_fingerprint
from selectune.recipe import AdapterSection, ModelSection
from workspace import save_model

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["up_proj"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    return tmp_path


def saved(folder: Path, **more: Any) -> Any:  # noqa: ANN401
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


def base_of(folder: Path) -> Any:  # noqa: ANN401
    section = ModelSection(base=str(folder / "model"), dtype="float32", device="cpu")
    return load_base(section, adapter=AdapterSection())


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_loaded_in_every_tensor(folder: Path, kind: str) -> None:
    model = saved(folder, **KINDS[kind])
    loaded = load_adapter(base_of(folder), folder / "adapter")
    assert trainable_fingerprint(loaded) == trainable_fingerprint(model)


def test_an_adapter_of_a_deeper_model_is_refused(folder: Path) -> None:
    saved(folder)
    base = base_of(folder)
    base.model.model.layers = base.model.model.layers[:1]
    with pytest.raises(IncompatibleRunError, match="another base model"):
        load_adapter(base, folder / "adapter")


def test_the_fingerprint_of_an_adapter_covers_its_scale(folder: Path) -> None:
    saved(folder, lora_alpha=4)
    first = adapter_fingerprint(folder / "adapter")
    config = folder / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert adapter_fingerprint(folder / "adapter") != first
    with pytest.raises(ConfigError, match="no peft adapter"):
        adapter_fingerprint(folder / "model")


def test_a_misspelt_module_is_named(folder: Path) -> None:
    with pytest.raises(Exception, match="did you mean"):
        add_adapter(base_of(folder).model, AdapterSection(modules=["q_prj"]), seed=0)
