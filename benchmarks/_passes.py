"""The pass that scores single weights, and the plain passes that it is measured against."""

from collections.abc import Callable

from _arms import DENSITY, T, tokens
from _owners import forward
from torch import nn

from selectune.data import collate, length_sorted_batches
from selectune.weights import GaLLoP, WeightScores, eligible_weights

BUDGET = 1024  # padded tokens in a batch of the scoring pass: its default


def passes(model: nn.Module, dtype: str, n: int) -> dict[str, Callable[[], WeightScores | None]]:
    """Return the scoring pass over n examples and what it is measured against."""
    rows = [tokens(k) for k in range(n)]
    eligible = eligible_weights(model, "layers")
    device = next(model.parameters()).device
    groups = length_sorted_batches([T] * n, token_budget=BUDGET)
    scorer = GaLLoP(density=DENSITY, examples=n)

    def plain() -> None:
        model.requires_grad_(False)
        for weight in eligible.values():
            weight.parameter.requires_grad_(True)
        for group in groups:
            batch = collate([rows[k] for k in group], pad_id=0, device=device)
            nats, n_tokens = forward(model, batch, dtype)
            (nats / n_tokens).sum().backward()
        model.zero_grad(set_to_none=True)

    return {
        "plain": plain,
        "score": lambda: scorer.score(model, rows, precision=dtype, token_budget=BUDGET),
    }
