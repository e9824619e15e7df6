"""The readable twins of transfer and generic loss: loops over tasks, questions and tokens."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data.encode import opening_ids

Answers = Mapping[str, bool]
Metrics = dict[str, float | None]


def share(answers: Answers, drawn: Sequence[str]) -> float:
    """Return the share of drawn questions answered right; one drawn twice counts twice."""
    return sum(answers[id] for id in drawn) / len(drawn)


def metrics(A: Mapping[tuple[str, str], float], V: Mapping[str, float]) -> Metrics:
    """Return the metrics of one seed from accuracies of generated answers."""
    n = len(V)
    ids, oods, gains, ratios = [], [], [], []
    n_collapsed = 0
    for r in V:
        A_r = sum(A[r, m] for m in V if m != r) / (n - 1)
        V_r = sum(V[m] for m in V if m != r) / (n - 1)
        ids.append(A[r, r])
        oods.append(A_r)
        gains.append(A_r - V_r)
        if V_r > 0:
            ratios.append(max(0.0, (V_r - A_r) / V_r))
        n_collapsed += sum(math.floor(100 * A[r, m]) == 0 for m in V if m != r)
    return {
        "id_accuracy": sum(ids) / n,
        "ood_accuracy": sum(oods) / n,
        "ood_gain": sum(gains) / n,
        "forget_ratio": sum(ratios) / len(ratios) if ratios else None,
        "collapse_percent": 100 * n_collapsed / (n * (n - 1)),
    }


def seed_metrics(
    tuned: Mapping[tuple[str, str], Sequence[Answers]],
    base: Mapping[str, Answers],
    drawn: Mapping[str, Sequence[str]],
) -> list[Metrics]:
    """Return the metrics of each seed over the drawn questions of each task."""
    n_seeds = len(next(iter(tuned.values())))
    return [
        metrics(
            {(r, m): share(answers[s], drawn[m]) for (r, m), answers in tuned.items()},
            {m: share(answers, drawn[m]) for m, answers in base.items()},
        )
        for s in range(n_seeds)
    ]


def bootstrap(
    tuned: Mapping[tuple[str, str], Sequence[Answers]],
    base: Mapping[str, Answers],
    metric: str,
    n_boot: int,
    seed: int,
) -> list[float]:
    """Return a metric under each draw of questions, then of seeds, drawn one by one.

    Each seed's value is first moved away from the mean over seeds by sqrt(S / (S - 1)).
    """
    rng = np.random.default_rng(seed)
    own = [found[metric] for found in seed_metrics(tuned, base, {m: list(base[m]) for m in base})]
    n_seeds = len(own)
    mean = sum(own) / n_seeds
    stretch = math.sqrt(n_seeds / (n_seeds - 1)) - 1
    draws: list[float] = []
    for _ in range(n_boot):
        drawn = {m: [list(base[m])[int(rng.integers(len(base[m])))] for _ in base[m]] for m in base}
        values = [found[metric] for found in seed_metrics(tuned, base, drawn)]
        seeds = [int(rng.integers(n_seeds)) for _ in range(n_seeds)]
        draws.append(sum(values[s] + stretch * (own[s] - mean) for s in seeds) / n_seeds)
    return draws


def text_nats(
    model: nn.Module,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    context: int,
) -> tuple[float, int]:
    """Return nats and number of predicted tokens of one text: each token by a pass of its own."""
    ids = [*opening_ids(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for k in range(1, len(ids)):
        # The last window that predicts token k: the first one that holds it.
        start = 0
        while k >= start + window:
            start += window - context
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:k]])).logits[0, -1].double()
        total -= float(logits.log_softmax(0)[ids[k]])
    return total, max(0, len(ids) - 1)
