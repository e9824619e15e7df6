"""How a training loss weighs the examples of a batch, found out from its own gradients."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectune.errors import ConfigError
from selectune.gradients.kernels import Rows
from selectune.training.method import Weighting

# How far the ratios may scatter. A wrong guess is off by the ratio of two token counts.
_TOLERANCE = 1e-2
_TOLERANCE_HALF = 0.1


def detect(
    rows: Rows,
    own: Rows,
    n_tokens: Int[Tensor, " n"],
    is_valid: Bool[Tensor, " n"],
    *,
    is_half: bool,
) -> Weighting:
    """Compare the loss's gradient per example with the gradient of each example's own mean loss.

    Where the two differ by one factor per example, that factor is the example's weight.

    Args:
        rows: of one parameter, from the training loss.
        own: of the same parameter, examples and dropout, from the mean loss of each example.
        n_tokens: target tokens of each example.
        is_valid: examples with a target token.
        is_half: whether the passes ran in half precision.

    Raises:
        ConfigError: the loss weighs examples in another way, or is no sum over examples.
    """
    theirs, ours = rows.dense().flatten(1)[is_valid], own.dense().flatten(1)[is_valid]
    ratio = (theirs * ours).sum(1) / ours.square().sum(1).clamp_min(1e-30)
    rest = (theirs - ratio[:, None] * ours).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-30)
    tokens = n_tokens[is_valid].to(ratio.dtype)
    scatter: dict[Weighting, float] = {
        "token": _scatter(ratio / tokens),
        "example": _scatter(ratio),
    }
    best: Weighting = "token" if scatter["token"] <= scatter["example"] else "example"
    tolerance = _TOLERANCE_HALF if is_half else _TOLERANCE
    worst = float(rest.max())
    if scatter[best] <= tolerance and worst <= tolerance:
        return best
    raise ConfigError(
        "the training loss weighs its examples in an unknown way",
        where="loss_weighting",
        why=f"against each example's own mean loss, the best guess ({best}) is off by "
        f"{scatter[best]:.1%}, and {worst:.1%} of a gradient points elsewhere (dropout with left "
        "padding, or a loss over the whole batch)",
        do='say how: loss_weighting="token" for one mean over all target tokens, "example" for '
        "one mean over examples",
    )


def _scatter(x: Float[Tensor, " n"]) -> float:
    return float((x / x.mean() - 1).abs().max()) if torch.isfinite(x).all() else float("inf")
