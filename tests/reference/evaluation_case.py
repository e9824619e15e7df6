"""A tokenizer and questions made in code, for the tests of evaluation."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from selectune.data.examples import Example

WORDS = ("bank", "river", "a", "stone", "where", "does", "the", "money", "go", "to", "sleep")
VOCABULARY = 48


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with one token for each of `WORDS` after a space."""
    letters = "abcdefghijklmnopqrstuvwxyz:?Ġ"
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for letter in letters:
        vocabulary[letter] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in ("Ġto", "Ġthe", "Ġgo", "Ġbank"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    assert len(vocabulary) <= VOCABULARY
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def question(number: int, rng: random.Random, *, n_options: int | None = None) -> Example:
    """Return a question with two to five options of one to four words."""
    n = n_options or rng.randint(2, 5)
    options = tuple(" " + " ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(n))
    prompt = "question: " + " ".join(rng.choices(WORDS, k=rng.randint(2, 9))) + "? answer:"
    right = rng.randrange(n)
    content = {"prompt": prompt, "completion": options[right]}
    return Example(f"q{number}-0", content, "made", "", options, right, f"made:{number}", content)


def statement(number: int, rng: random.Random) -> Example:
    """Return a prompt and its completion, without options."""
    asked = question(number, rng, n_options=2)
    return Example(f"s{number}-0", asked.content, "made", "", (), -1, asked.origin, asked.content)


def tiny_lm(family: str, *, seed: int = 0) -> nn.Module:
    """Return a two-layer random model with weights large enough to prefer some words."""
    torch.manual_seed(seed)
    match family:
        case "llama":
            config = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
            )
            model = LlamaForCausalLM(config)
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=VOCABULARY,
                    n_positions=128,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    bos_token_id=1,
                    eos_token_id=1,
                )
            )
        case "gemma2":
            model = Gemma2ForCausalLM(
                Gemma2Config(
                    vocab_size=VOCABULARY,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    sliding_window=8,
                    final_logit_softcapping=0.5,
                    max_position_embeddings=128,
                )
            )
        case _:
            raise ValueError(family)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model
