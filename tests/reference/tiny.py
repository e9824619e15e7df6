"""Tiny random models of four families, and batches for them: the ground of every oracle."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from selectune.data import Batch, Tokens, collate

VOCABULARY = 61
FAMILIES = ("llama", "gpt2", "qwen2", "gemma")
KINDS = ("full", "lora", "dora")


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
    """Return a tiny model of which everything, LoRA factors or DoRA factors train."""
    model = tiny_model(family, seed)
    if kind == "full":
        return model
    names = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=names,
        use_dora=kind == "dora",
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():  # B = 0 would leave every gradient of A at zero
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
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
