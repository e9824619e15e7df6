"""The one-example-at-a-time loop: no hooks, no padding, no batch; the oracle of the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from selectune.data import Tokens


def loop_loss(model: nn.Module, example: Tokens) -> Tensor:
    """Return the mean cross-entropy of one example over its target tokens, from full logits."""
    ids = torch.as_tensor(example.input_ids)[None]
    logits = model(input_ids=ids).logits[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    losses = [
        -wide[t - 1, int(example.input_ids[t])]
        for t in range(1, len(example.input_ids))
        if example.is_target[t]
    ]
    return torch.stack(losses).mean()


def loop_gradients(model: nn.Module, examples: Sequence[Tokens]) -> dict[str, Tensor]:
    """Return each trainable parameter's gradients, one row per example."""
    rows: dict[str, list[Tensor]] = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for example in examples:
        model.zero_grad(set_to_none=True)
        loop_loss(model, example).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                rows[name].append(grad.clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(column) for name, column in rows.items()}
