"""Tiny random models of eight families, and batches for them: the ground of every oracle."""

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from selectune.adapters import add_adapter
from selectune.data import Batch, Tokens, collate
from selectune.recipe import AdapterSection

VOCABULARY = 61
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gptj", "opt")
KINDS = ("full", "lora", "dora", "series", "parallel")
# A few modules of attention and MLP, of both shapes; the names are the families' own.
MODULES = {
    "gpt2": ["c_attn", "c_fc"],
    "gptj": ["q_proj", "out_proj", "fc_out"],
    "opt": ["q_proj", "out_proj", "fc2"],
}


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """Return a two-layer model with random weights, biases and norms included, in fp32."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**shape, tie_word_embeddings=False))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8, tie_word_embeddings=False))
        case "opt":
            model = OPTForCausalLM(
                OPTConfig(
                    vocab_size=VOCABULARY,
                    max_position_embeddings=64,
                    hidden_size=16,
                    ffn_dim=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    word_embed_proj_dim=16,
                    pad_token_id=0,
                    dropout=0.0,
                    tie_word_embeddings=False,
                )
            )
        case "gptj":
            model = GPTJForCausalLM(
                GPTJConfig(
                    vocab_size=VOCABULARY,
                    n_positions=64,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    rotary_dim=4,
                    bos_token_id=1,
                    eos_token_id=1,
                )
            )
        case "gemma":
            model = GemmaForCausalLM(GemmaConfig(**shape, head_dim=8))
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=VOCABULARY,
                    n_positions=64,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    bos_token_id=1,
                    eos_token_id=1,
                )
            )
        case _:
            raise ValueError(family)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.config.use_cache = False
    return model.eval()


def tiny_trainable(family: str, kind: str, seed: int = 0) -> nn.Module:
    """Return a tiny model of which everything or a small adapter trains, none of it zero."""
    model = tiny_model(family, seed)
    if kind == "full":
        return model
    modules = MODULES.get(family, ["q_proj", "o_proj", "down_proj"])
    match kind:
        case "series" | "parallel":
            section = AdapterSection(kind=kind, modules=modules, width=3)
        case "prefix":
            section = AdapterSection(kind=kind, virtual_tokens=3)
        case _:
            section = AdapterSection(kind=kind, modules=modules, rank=3, alpha=6.0)
    adapted = add_adapter(model, section, seed=seed)
    with torch.no_grad():  # what starts at zero would leave every gradient below it at zero
        for name, p in adapted.named_parameters():
            if "lora_B" in name or "bottleneck_up" in name:
                p.normal_(0, 0.2)
    return adapted.eval()


def tiny_tokens(n: int = 5, seed: int = 0, longest: int = 11) -> list[Tokens]:
    """Return examples of different lengths with prompts of different lengths."""
    rng = torch.Generator().manual_seed(seed)
    items: list[Tokens] = []
    for k in range(n):
        length = int(torch.randint(4, longest + 1, (), generator=rng))
        ids = torch.randint(2, VOCABULARY, (length,), generator=rng)
        first = int(torch.randint(1, length, (), generator=rng))
        is_target = torch.arange(length) >= first
        items.append(Tokens(f"e{k}", ids.numpy(), is_target.numpy()))
    return items


def tiny_batch(n: int = 5, seed: int = 0, side: str = "right") -> Batch:
    """Return one padded batch of `tiny_tokens`."""
    return collate(tiny_tokens(n, seed), pad_id=0, side=side)
