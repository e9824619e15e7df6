"""Runs on a base of 8 or 4 bits, with a LoRA beside it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from selectune import models
from selectune.adapters import add_adapter
from selectune.data import collate, read_examples, tokenize
from selectune.errors import ConfigError
from selectune.gradients.engine import GradientEngine, example_loss
from selectune.gradients.kernels import Rows
from selectune.models import Base, load_base
from selectune.pipeline.run import Run
from selectune.recipe import AdapterSection, ModelSection, load_owner_recipe, load_recipe
from small_run import small_recipe

pytest.importorskip("bitsandbytes")
BITS = ("8bit", "4bit")
LORA = AdapterSection(rank=2, modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose model has matrices that 4 bits can hold on every processor."""
    folder = tmp_path_factory.mktemp("quantised")
    small_recipe(folder)
    config = AutoConfig.from_pretrained(
        folder / "model", hidden_size=64, head_dim=32, intermediate_size=64
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder


def section(folder: Path, **changes: object) -> ModelSection:
    return ModelSection.model_validate(
        {"base": str(folder / "model"), "dtype": "float32", "device": "cpu", **changes}
    )


def adapted(base: Base) -> nn.Module:
    model = add_adapter(base.model, LORA, seed=0)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_one_example_at_a_time(folder: Path, bits: str) -> None:
    base = load_base(section(folder, quantization=bits), adapter=LORA)
    model = adapted(base)
    rows = list(read_examples(str(folder / "pool.jsonl")))[:3]
    tokens = tokenize(rows, base.tokenizer, max_length=64)
    engine = GradientEngine(model, precision="float32")
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, rows: Rows) -> None:
        found[name] = rows.dense()

    engine.run(collate(list(tokens), pad_id=base.pad_id), keep)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    for k, item in enumerate(tokens):
        model.zero_grad()
        example_loss(model, collate([item], pad_id=base.pad_id), "float32").sum().backward()
        for name, p in trained.items():
            assert p.grad is not None
            # 8-bit products round what they read; a longer row may move its neighbours' scale.
            assert_close(found[name][k].view_as(p), p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bits", "trainer"), [("8bit", "transformers"), ("4bit", "trl")])
def test_a_run_goes_from_scores_to_a_verdict(
    folder: Path, bits: str, trainer: str, tmp_path: Path
) -> None:
    options = [f"model.quantization={bits}", f"tune.trainer={trainer}", f"output={tmp_path}"]
    run = Run(load_recipe(folder / "recipe.yaml", options), out=tmp_path)
    facts = run.all().facts
    assert facts["verdict"]
    saved = list(tmp_path.glob("tune/**/adapter_model.safetensors"))
    assert len(saved) >= 2
    assert not any("base_layer" in name for path in saved for name in load_file(path))
    plain = Run(load_recipe(folder / "recipe.yaml"), out=tmp_path / "none").plan().facts
    memory, before = run.plan().facts["memory_bytes"], plain["memory_bytes"]
    assert 0.1 < memory["base weights"] / before["base weights"] < 0.7


@pytest.mark.parametrize("bits", BITS)
def test_the_weights_are_held_in_so_many_bits(folder: Path, bits: str) -> None:
    base = load_base(section(folder, quantization=bits), adapter=LORA)
    dense = load_base(section(folder), adapter=LORA)
    q, k = (b.model.model.layers[0].self_attn.q_proj.weight for b in (base, dense))
    assert q.numel() * q.element_size() == k.numel() * (1 if bits == "8bit" else 0.5)
    assert base.fingerprint != dense.fingerprint
    again = load_base(section(folder, quantization=bits), adapter=LORA)
    assert again.fingerprint == base.fingerprint


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("adapter.kind=full", "adapter.kind full"),
        ("adapter.kind=series", "adapter.kind series"),
        ("tune.weights={method: random, density: 0.1}", "single weights of a quantised base"),
    ],
)
def test_what_quantised_weights_cannot_do_is_refused(folder: Path, line: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        load_recipe(folder / "recipe.yaml", ["adapter={}", "model.quantization=8bit", line])


def test_no_emulator_is_made_of_them(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "owner.yaml"
    recipe.write_text(
        f"model: {{base: {folder}/model, quantization: 4bit}}\n"
        f"emulate: {{calibration: {folder}/pool.jsonl}}\n"
    )
    with pytest.raises(ConfigError, match="full precision"):
        load_owner_recipe(recipe)
    with pytest.raises(ConfigError, match="full precision"):
        load_base(section(folder, quantization="8bit"), adapter=LORA, as_stored=True)


def test_a_model_that_was_quantised_already_stays_so(folder: Path, tmp_path: Path) -> None:
    base = load_base(section(folder, quantization="8bit"), adapter=LORA)
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    again = load_base(section(tmp_path), adapter=LORA)
    assert again.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    with pytest.raises(ConfigError, match="quantised already"):
        load_base(section(tmp_path, quantization="4bit"), adapter=LORA)
    with pytest.raises(ConfigError, match="kind full is not trained on quantised"):
        load_base(section(tmp_path), adapter=AdapterSection(kind="full"))
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace('"bitsandbytes"', '"gptq"'))
    with pytest.raises(ConfigError, match="quantised by gptq"):
        load_base(section(tmp_path), adapter=LORA)


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        load_base(section(folder, quantization="8bit"), adapter=LORA)


def test_outputs_that_cannot_be_repacked_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_recipe(tmp_path)  # 32 wide, 48 in the MLP
    monkeypatch.setattr(models, "cpu_has_fast_bf16", lambda: True)
    with pytest.raises(ConfigError, match="cannot be held in 4 bits on this processor"):
        load_base(section(tmp_path, quantization="4bit"), adapter=LORA)
