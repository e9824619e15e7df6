"""Which matrices blocks have, and blocks that are refused."""

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_trainable
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from selectune.errors import SelectionError
from selectune.models import blocks
from selectune.offsite.anatomy import anatomy_of, bias_of, channel_size, weight_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_family_is_found(family: str) -> None:
    block = blocks(tiny_model(family))[1]
    anatomy = anatomy_of(block)
    assert [m.role for m in anatomy.matrices] == ["q", "k", "v", "o"]
    found = {m.name for m in anatomy.matrices} | set(anatomy.mlp.names)
    linear = {n for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert found == linear
    assert (anatomy.mlp.gate is None) == (family in ("opt", "gpt2", "gptj"))


def test_a_fused_matrix_is_three_parts_one_after_another() -> None:
    block = blocks(tiny_model("gpt2"))[0]
    parts = [m for m in anatomy_of(block).matrices if m.name == "attn.c_attn"]
    assert [m.key for m in parts] == [f"attn.c_attn[{role}]" for role in "qkv"]
    assert [m.part for m in parts] == [(a, a + 16) for a in (0, 16, 32)]
    weight = weight_of(block.get_submodule("attn.c_attn"))
    assert torch.equal(torch.cat([weight[m.rows] for m in parts]), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_channel_is_as_large_as_what_leaves_with_it(family: str) -> None:
    block = blocks(tiny_model(family))[0]
    mlp = anatomy_of(block).mlp
    total = sum(
        p.numel()
        for name in mlp.names
        for key, p in block.get_submodule(name).named_parameters()
        if (name, key) != (mlp.down, "bias")
    )
    n_channels = weight_of(block.get_submodule(mlp.up)).shape[0]
    assert channel_size(block, mlp) * n_channels == total


def small(**more: int) -> dict[str, int]:
    return {
        "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, **more,
    }  # fmt: skip


def test_blocks_that_fuse_or_route_are_refused_with_the_reason() -> None:
    cases = [
        (
            MixtralForCausalLM(MixtralConfig(**small(num_key_value_heads=1))),
            "router",
        ),
        (Phi3ForCausalLM(Phi3Config(**small())), "fused"),
        (GPTNeoXForCausalLM(GPTNeoXConfig(**small())), "fused"),
    ]
    for model, words in cases:
        with pytest.raises(SelectionError, match=words) as caught:
            anatomy_of(blocks(model)[0])
        assert "looked for" in caught.value.why
        assert "the block has" in caught.value.where


def test_adapters_and_odd_linear_maps_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"q_proj is a .*Linear, no plain"):
        anatomy_of(blocks(tiny_trainable("llama", "lora"))[0])

    class Odd(nn.Linear):
        pass

    block = blocks(tiny_model("llama"))[0]
    block.get_submodule("mlp").down_proj = Odd(24, 16)
    with pytest.raises(SelectionError, match="down_proj is a Odd"):
        anatomy_of(block)


def test_an_mlp_with_a_norm_inside_is_refused() -> None:
    block = blocks(tiny_model("llama"))[0]
    block.get_submodule("mlp").sub_norm = nn.LayerNorm(24)
    with pytest.raises(SelectionError, match=r"sub_norm.weight is one weight more"):
        anatomy_of(block)


def test_thirds_that_are_none_are_refused() -> None:
    block = blocks(tiny_model("gpt2"))[0]
    block.get_submodule("attn").c_attn = Conv1D(40, 16)
    with pytest.raises(SelectionError, match="40 outputs"):
        anatomy_of(block)


def test_weights_come_in_linear_s_order_as_views() -> None:
    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)
    for module in (linear, conv):
        assert weight_of(module).shape == (5, 3)
        assert weight_of(module).data_ptr() == module.weight.data_ptr()
    assert bias_of(nn.Linear(3, 5, bias=False)) is None
