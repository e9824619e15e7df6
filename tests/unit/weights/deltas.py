"""Small models and deltas of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from selectune.weights.base import base_fingerprint, base_weights
from selectune.weights.delta import SparseDelta, type_name


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_delta(
    model: nn.Module,
    seed: int = 0,
    density: float = 0.05,
    names: str = "",
    dtype: torch.dtype = torch.float32,
) -> SparseDelta:
    """Return random differences of a model's weights, in the tensors whose names hold `names`."""
    rng = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in base_weights(model).items() if names in n}
    indices: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, p in weights.items():
        k = max(1, round(density * p.numel()))
        indices[name] = torch.randperm(p.numel(), generator=rng)[:k].sort().values
        deltas[name] = (1e-2 * torch.randn(k, generator=rng)).to(dtype)
    return SparseDelta(
        indices,
        deltas,
        {name: tuple(p.shape) for name, p in weights.items()},
        {name: type_name(p.dtype) for name, p in weights.items()},
        base_fingerprint(model),
        {"method": "random", "seed": seed},
    )


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every weight, as bytes."""
    return {
        name: p.detach().clone().flatten().view(torch.uint8)
        for name, p in base_weights(model).items()
    }


def assert_same_bits(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    found = bits(model)
    assert found.keys() == expected.keys()
    odd = [name for name in found if not torch.equal(found[name], expected[name])]
    assert odd == []
