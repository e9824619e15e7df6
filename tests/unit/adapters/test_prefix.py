"""A prefix divided among the blocks computes what peft's does, and every block owns its part."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tiny import FAMILIES, tiny_batch, tiny_model, tiny_trainable
from torch import Tensor, nn

from selectune.adapters import load_adapter, put_in_blocks
from selectune.errors import ConfigError
from selectune.gradients.engine import example_loss
from selectune.models import Base, blocks, trainable_fingerprint
from selectune.training.layers import trainable_layers

# peft 0.21 hands it over by a name that transformers 5.24 has renamed; we silence our own models.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def losses(model: nn.Module) -> Tensor:
    return example_loss(model, tiny_batch())


def peft_prefix(family: str, **more: Any) -> Any:  # noqa: ANN401
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **more)
    return get_peft_model(tiny_model(family), config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_dividing_the_prefix_changes_no_bit(family: str) -> None:
    model = peft_prefix(family)
    expected = losses(model)
    expected.sum().backward()
    whole = model.prompt_encoder["default"].embedding.weight.grad
    put_in_blocks(model)
    found = losses(model)
    assert torch.equal(found, expected)
    found.sum().backward()
    parts = [p.grad for layer in trainable_layers(model) for p in layer.parameters.values()]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_each_part_has_one_name_in_its_block() -> None:
    model = tiny_trainable("llama", "prefix")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [f"base_model.model.layers.{k}.prefix.embedding.weight" for k in (0, 1)]
    assert [layer.index for layer in trainable_layers(model)] == [0, 1]


def test_a_frozen_block_gets_no_gradient_at_all() -> None:
    model = tiny_trainable("llama", "prefix")
    first, second = (next(iter(x.parameters.values())) for x in trainable_layers(model))
    first.requires_grad_(False)
    losses(model).sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert second.grad.any()


def test_a_blocks_part_can_be_turned_down_and_back() -> None:
    model = tiny_trainable("llama", "prefix")
    full = losses(model)
    first, second = (block.prefix.scaling for block in blocks(model))
    assert first == second == {"default": 1.0}
    first["default"] = 0.25
    assert not torch.equal(losses(model), full)
    first["default"] = 1.0
    assert torch.equal(losses(model), full)


def test_the_file_is_pefts(base: Base, tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    twin = copy.deepcopy(base)
    model = put_in_blocks(get_peft_model(base.model, config))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    plain = PeftModel.from_pretrained(copy.deepcopy(twin.model), str(tmp_path / "adapter"))
    assert torch.equal(losses(plain.eval()), losses(model.eval()))
    ours = load_adapter(twin, tmp_path / "adapter")
    assert torch.equal(losses(ours.eval()), losses(model))
    assert trainable_fingerprint(ours) == trainable_fingerprint(model)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tiny_trainable("llama", "prefix")
    twin = copy.deepcopy(model)
    before = losses(model)
    assert torch.equal(losses(twin), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(losses(model), before)


def test_a_prefix_out_of_one_mlp_is_refused() -> None:
    model = peft_prefix("llama", prefix_projection=True, encoder_hidden_size=8)
    with pytest.raises(ConfigError, match="cannot be divided"):
        put_in_blocks(model)
