"""GAST and GREATS one example at a time: scores, odds, picks and gradients in plain loops.

Gradients per example come from `loops.loop_gradients`. Where the method draws, the twin gives the
odds of every outcome. `batch_loss` is the loss of a training loop that knows nothing of the method.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from loops import loop_gradients
from torch import Tensor, nn
from torch.nn import functional

from selectune.data import Batch, Tokens

Gradients = Mapping[str, Tensor]


def slow_layers(model: nn.Module) -> list[list[str]]:
    """Return the names of each decoder block's trainable parameters, first block to last."""
    layers: dict[int, list[str]] = {}
    for name, p in model.named_parameters():
        found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if found and p.requires_grad:
            layers.setdefault(int(found[1]), []).append(name)
    return [layers[k] for k in sorted(layers)]


def slow_target(model: nn.Module, examples: Sequence[Tokens]) -> dict[str, Tensor]:
    """Return the mean gradient of the target examples."""
    mean: dict[str, Tensor] = {}
    for name, rows in loop_gradients(model, examples).items():
        mean[name] = sum(row.double() for row in rows) / len(examples)
    return mean


def slow_scores(gradients: Gradients, target: Gradients, names: Sequence[str]) -> list[float]:
    """Return <g_n, target> over the parameters of one layer, for every example n."""
    scores: list[float] = []
    for n in range(len(gradients[names[0]])):
        score = 0.0
        for name in names:
            score += float((gradients[name][n].double() * target[name].double()).sum())
        scores.append(score)
    return scores


def slow_cosines(gradients: Gradients, target: Gradients, names: Sequence[str]) -> list[float]:
    """Return the scores over the length of each example's gradient."""
    scores = slow_scores(gradients, target, names)
    squares = [row[n] for n, row in enumerate(slow_gram(gradients, names))]
    return [s / math.sqrt(square) for s, square in zip(scores, squares, strict=True)]


def slow_gram(gradients: Gradients, names: Sequence[str]) -> list[list[float]]:
    """Return <g_n, g_m> over some parameters, for every two examples."""
    n = len(gradients[names[0]])
    return [
        slow_scores(gradients, {name: gradients[name][m] for name in names}, names)
        for m in range(n)
    ]


def slow_standardise(scores: Sequence[float]) -> list[float]:
    """Return scores less their mean over their population deviation; 0 where all are alike."""
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    if spread <= 1e-6 * max(abs(s) for s in scores):
        return [0.0 for _ in scores]
    return [(s - mean) / (spread + 1e-8) for s in scores]


def slow_odds(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return the softmax of the standardised scores: the odds of the first draw."""
    exponentials = [math.exp(z / temperature) for z in slow_standardise(scores)]
    return [e / sum(exponentials) for e in exponentials]


def slow_sets(odds: Sequence[float], k: int) -> dict[frozenset[int], float]:
    """Return the odds of every set of k examples, drawn one after another and none twice."""
    sets: dict[frozenset[int], float] = {frozenset(): 1.0}
    for _ in range(k):
        longer: dict[frozenset[int], float] = {}
        for drawn, chance in sets.items():
            left = 1 - sum(odds[n] for n in drawn)
            for n in set(range(len(odds))) - drawn:
                longer[drawn | {n}] = longer.get(drawn | {n}, 0.0) + chance * odds[n] / left
        sets = longer
    return sets


def slow_inclusion(odds: Sequence[float], k: int) -> list[float]:
    """Return how likely every example is among k, drawn one after another and none twice."""
    sets = slow_sets(odds, k)
    return [sum(chance for drawn, chance in sets.items() if n in drawn) for n in range(len(odds))]


def slow_count(keep: float, n: int) -> int:
    """Return how many of n examples a share of them is."""
    return max(1, round(keep * n))


def slow_topk(scores: Sequence[float], k: int) -> list[int]:
    """Return the k examples with the largest scores, in their own order."""
    return sorted(sorted(range(len(scores)), key=lambda n: -scores[n])[:k])


def slow_greedy(
    scores: Sequence[float], gram: Sequence[Sequence[float]], rate: float, k: int
) -> list[int]:
    """Return GREATS' picks: the best one, then the best one less what it shares with the picks."""
    gain = [rate * s for s in scores]
    picked: list[int] = []
    for _ in range(k):
        best = max((n for n in range(len(gain)) if n not in picked), key=lambda n: gain[n])
        picked.append(best)
        for n in range(len(gain)):
            gain[n] -= rate**2 * gram[best][n]
    return sorted(picked)


def slow_mean(
    gradients: Gradients, weights: Sequence[float], picked: Sequence[int], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the mean gradient of the picked examples, each by its weight in the loss."""
    mean: dict[str, Tensor] = {}
    whole = sum(weights[n] for n in picked)
    for name in names:
        mean[name] = sum(weights[n] / whole * gradients[name][n].double() for n in picked)
    return mean


def slow_weights(examples: Sequence[Tokens], weighting: str) -> list[float]:
    """Return what each example weighs in the loss, up to one constant."""
    if weighting == "example":
        return [1.0 for _ in examples]
    return [float(e.is_target[1:].sum()) for e in examples]


def batch_loss(model: nn.Module, batch: Batch, weighting: str) -> Tensor:
    """Return a training loss: one mean over target tokens, or over examples' own means."""
    positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
    ).logits
    answers, wide = batch.labels[:, 1:], torch.promote_types(logits.dtype, torch.float32)
    nats = functional.cross_entropy(
        logits[:, :-1].to(wide).flatten(0, 1), answers.flatten(), reduction="none"
    ).view_as(answers)
    n_tokens = (answers != -100).sum(1)
    if weighting == "token":
        return nats.sum() / n_tokens.sum()
    has_answer = n_tokens > 0
    return (nats.sum(1)[has_answer] / n_tokens[has_answer]).mean()


def parts(picks: str) -> list[int]:
    """Return the picked examples of one layer, from a line of 0 and 1."""
    return [n for n, x in enumerate(picks) if x == "1"]


def flat(gradients: Gradients, names: Sequence[str]) -> Tensor:
    """Return several parameters' gradients as one long vector."""
    return torch.cat([gradients[name].double().flatten() for name in names])
