"""A folder like a user's, in small: a model with its tokenizer, a pool, a target, held-out data."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_COLOURS = ("red", "green", "blue", "white")
_ANIMALS = ("cow", "cat", "dog", "owl")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes: any text, 258 tokens, no download."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(folder: Path, seed: int = 0, n_layers: int = 2) -> None:
    """Write a random Llama and its tokenizer as `from_pretrained` wants them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def question(source: str, rng: random.Random) -> dict[str, object]:
    """Return one row of a task: a sum, an animal's colour or a word to copy."""
    if source == "sums":
        a, b = rng.randrange(50), rng.randrange(50)
        right, options = f" {a + b}", [f" {a + b + shift}" for shift in (0, 1, 10)]
        prompt = f"Question: {a} + {b}?\nAnswer:"
    elif source == "colours":
        n, colour = rng.randrange(1000), rng.randrange(4)
        right, options = f" {_COLOURS[colour]}", [f" {name}" for name in _COLOURS]
        prompt = f"Question: colour of {_ANIMALS[colour]} {n}?\nAnswer:"
    else:
        word = "".join(rng.choices("abcdefgh", k=6))
        right, options = f" {word}", [f" {word}", f" {word[::-1]}x"]
        prompt = f"Question: say {word}.\nAnswer:"
    return {"prompt": prompt, "completion": right, "options": options, "source": source}


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_workspace(folder: Path) -> Path:
    """Fill `folder` with model/, pool.jsonl, target.jsonl and heldout.jsonl, and return it."""
    rng = random.Random(0)
    save_model(folder / "model")
    kinds = ("sums", "colours", "words")
    write_jsonl(folder / "pool.jsonl", [question(kinds[i % 3], rng) for i in range(60)])
    write_jsonl(folder / "target.jsonl", [question("colours", rng) for _ in range(6)])
    write_jsonl(folder / "heldout.jsonl", [question("colours", rng) for _ in range(12)])
    return folder
