"""The readable twins of evaluation: one option at a time, one bootstrap draw at a time."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data.examples import Example
from selectune.data.tokens import option_tokens


def option_nats(
    model: nn.Module, example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[float]:
    """Return minus the log-likelihood of each option: full logits, no batch, no padding."""
    nats: list[float] = []
    for tokens in option_tokens(example, tokenizer, max_length):
        ids = [int(token) for token in tokens.input_ids]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        total = 0.0
        for position in range(1, len(ids)):
            if tokens.is_target[position]:
                probabilities = logits[position - 1].softmax(0)
                total -= math.log(float(probabilities[ids[position]]))
        nats.append(total)
    return nats


def answer(
    model: nn.Module, example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Return the row that `evaluate` should give for a question with options."""
    nats = option_nats(model, example, tokenizer, max_length)
    raw, norm = 0, 0
    lengths = [len(o[1:] if o.startswith(" ") else o) for o in example.options]
    for k in range(len(nats)):
        if nats[k] < nats[raw]:
            raw = k
        if nats[k] / lengths[k] < nats[norm] / lengths[norm]:
            norm = k
    right = option_tokens(example, tokenizer, max_length)[example.answer]
    n = int(right.is_target.sum())
    return {
        "id": example.id,
        "source": example.source,
        "answer_loss": nats[example.answer] / n,
        "n_target_tokens": n,
        "correct_raw": raw == example.answer,
        "correct_norm": norm == example.answer,
        "chosen": norm,
    }


def bootstrap_means(differences: Sequence[float], n_boot: int, seed: int) -> list[float]:
    """Return the mean of each bootstrap draw of paired differences, drawn one by one."""
    rng = np.random.default_rng(seed)
    means: list[float] = []
    for _ in range(n_boot):
        drawn = [differences[int(rng.integers(len(differences)))] for _ in differences]
        means.append(sum(drawn) / len(drawn))
    return means


def seed_bootstrap_means(
    differences: Sequence[Sequence[float]], n_boot: int, seed: int, *, crossed: bool
) -> list[float]:
    """Return the same over several seeds: draw seeds, then examples (one draw for all if crossed).

    Each seed's mean is first moved away from the grand mean by sqrt(S / (S - 1)).
    """
    rng = np.random.default_rng(seed)
    n_seeds = len(differences)
    own = [sum(row) / len(row) for row in differences]
    grand = sum(own) / n_seeds
    moved = [
        [x - mean + grand + (mean - grand) * math.sqrt(n_seeds / (n_seeds - 1)) for x in row]
        for row, mean in zip(differences, own, strict=True)
    ]
    means: list[float] = []
    for _ in range(n_boot):
        shared = [int(rng.integers(len(moved[0]))) for _ in moved[0]]
        total = 0.0
        for _ in range(n_seeds):
            row = moved[int(rng.integers(n_seeds))]
            picks = shared if crossed else [int(rng.integers(len(row))) for _ in row]
            total += sum(row[k] for k in picks) / len(picks)
        means.append(total / n_seeds)
    return means
