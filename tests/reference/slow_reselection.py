"""Choosing anew while training, as one plain loop over steps; gradients one example at a time."""

from collections.abc import Callable

import numpy as np
import torch
from loops import loop_gradients
from slow_gist import slow_gist
from torch import nn
from transformers import get_scheduler

from selectune.data import Tokens, collate
from selectune.data.tokens import clipped
from selectune.recipe import TuneSection
from selectune.training.order import EpochBatches


def flat(
    model: nn.Module, examples: list[Tokens], *, within: str = "", max_length: int | None = None
) -> np.ndarray:
    """Return one row of all trainable gradients per example.

    Args:
        model: with what trains.
        examples: the rows.
        within: part of the names of the parameters that count.
        max_length: tokens that are read of an example.
    """
    if max_length is not None:
        examples = [clipped(t, max_length) for t in examples]
    found = loop_gradients(model, examples).items()
    return torch.cat([c.flatten(1) for name, c in found if within in name], 1).numpy()


def slow_reselection(
    model: nn.Module,
    pool: list[Tokens],
    targets: list[Tokens],
    scores: dict[str, float],
    options: TuneSection,
    *,
    n: int,
    after: list[int],
    seed: int,
    look: Callable[[nn.Module, list[Tokens]], np.ndarray] = flat,
) -> tuple[list[float], list[list[str]]]:
    """Train in place; return the loss of every step, and every selection, best first.

    Args:
        model: without dropout.
        pool: the candidates.
        targets: of one task.
        scores: the first ones, by id.
        options: AdamW, a linear schedule.
        n: examples to choose.
        after: steps after which to choose anew.
        seed: of the order.
        look: returns the gradients that are compared, one row per example.
    """
    ranking = sorted(scores, key=lambda i: (-scores[i], i))
    shortlist = [t for t in pool if t.id in ranking[: 4 * n]]
    chosen = [ranking[:n]]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    per_epoch = -(-n // options.batch_size)
    n_steps = options.epochs * per_epoch
    rising = int(np.ceil(options.warmup_ratio * n_steps))
    schedule = get_scheduler("linear", optimizer, rising, n_steps)
    losses: list[float] = []
    for step in range(n_steps):
        if step in after:
            found, _, _ = slow_gist(look(model, shortlist), look(model, targets))
            now = dict(zip([t.id for t in shortlist], found, strict=True))
            chosen.append(sorted(now, key=lambda i: (-now[i], i))[:n])
        items = [t for t in pool if t.id in chosen[-1]]
        order = EpochBatches(
            [len(t.input_ids) for t in items],
            batch_size=options.batch_size,
            accumulation=1,
            seed=seed,
        )
        order.set_epoch(step // per_epoch)
        rows = list(order)[step % per_epoch]
        batch = collate([items[k] for k in rows], pad_id=0)
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, chosen
