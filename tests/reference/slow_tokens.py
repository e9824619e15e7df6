"""Token scores by one backward pass per token, and a direction by explicit vectors."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from selectune.data import Tokens


def slow_loss_scores(
    model: nn.Module, example: Tokens, direction: Mapping[str, Tensor]
) -> list[float]:
    """Return <grad of one target token's share of the mean loss, u>, target token by target token.

    Args:
        model: one forward and one backward pass of it are taken for every token.
        example: one.
        direction: u, by parameter.
    """
    places = [t for t in range(1, len(example.input_ids)) if example.is_target[t]]
    scores: list[float] = []
    for t in places:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=torch.as_tensor(example.input_ids)[None]).logits[0]
        nats = -logits.log_softmax(-1)[t - 1, int(example.input_ids[t])]
        (nats / len(places)).backward()
        scores.append(
            sum(
                float((p.grad * direction[name]).sum())
                for name, p in model.named_parameters()
                if p.requires_grad and p.grad is not None
            )
        )
    model.zero_grad(set_to_none=True)
    return scores


def slow_position_scores(
    model: nn.Module, example: Tokens, direction: Mapping[str, Tensor]
) -> list[float]:
    """Return how the example's mean loss changes if modules move along u at one token only.

    Every Linear answers eps[t] * u x_t more at token t; the score is the derivative by eps[t].
    """
    n = len(example.input_ids)
    scores: list[float] = []
    for t in range(n):
        eps = torch.zeros((), dtype=next(model.parameters()).dtype, requires_grad=True)
        handles = []
        for name, module in model.named_modules():
            U = direction.get(f"{name}.weight")
            if U is None:
                continue

            def move(_: nn.Module, args: tuple[Tensor], y: Tensor, U: Tensor = U) -> Tensor:
                there = torch.zeros_like(y)
                there[:, t] = args[0][:, t] @ U.mT  # noqa: B023 (called within this turn)
                return y + eps * there  # noqa: B023

            handles.append(module.register_forward_hook(move))
        ids = torch.as_tensor(example.input_ids)[None]
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
        places = [p for p in range(1, n) if example.is_target[p]]
        loss = sum(-logits[p - 1, int(example.input_ids[p])] for p in places) / len(places)
        loss.backward()
        scores.append(float(eps.grad))
        for handle in handles:
            handle.remove()
    model.zero_grad(set_to_none=True)
    return scores


def slow_direction(targets: np.ndarray, rank: int) -> np.ndarray:
    """Return the mean of the target gradients' projections on their first singular directions.

    Args:
        targets: gradients, one row per target.
        rank: number of directions.
    """
    P = np.linalg.svd(targets.T.astype(np.float64), full_matrices=False)[0][:, :rank]
    return np.mean([P @ (P.T @ v) for v in targets.astype(np.float64)], axis=0)


def slow_kept(scores: Sequence[float], keep: str | float) -> list[bool]:
    """Return which target tokens of one example train."""
    if keep == "positive":
        n = max(1, sum(s > 0 for s in scores))
    else:
        n = max(1, round(keep * len(scores)))
    best = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:n]
    return [k in best for k in range(len(scores))]
