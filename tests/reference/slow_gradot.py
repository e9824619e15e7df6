"""GradOT by brute force: one position, component or channel at a time, and Kronecker products.

GCS(delta) = ||H delta||_1 - lambda <G, delta>       H = A kron S
"""

from collections.abc import Sequence

import torch
from loops import loop_loss
from torch import Tensor, nn

from selectune.data import Tokens


def slow_rows(
    model: nn.Module, module: nn.Module, examples: Sequence[Tokens]
) -> list[tuple[Tensor, Tensor]]:
    """Return what a linear map reads at every position, and the gradient of the summed loss there.

    One example at a time, without padding; the constant that a bias reads stands behind the input.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    for example in examples:
        seen: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, seen: dict = seen) -> None:
            y.retain_grad()
            seen["x"], seen["y"] = args[0].detach(), y

        handle = module.register_forward_hook(keep)
        n_targets = int(example.is_target[1:].sum())
        (n_targets * loop_loss(model, example)).backward()
        handle.remove()
        x = seen["x"].reshape(-1, seen["x"].shape[-1])
        s = seen["y"].grad.reshape(-1, seen["y"].shape[-1])
        if module.bias is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        rows.extend(zip(x, s, strict=True))
    model.zero_grad(set_to_none=True)
    return rows


def slow_moments(
    rows: list[tuple[Tensor, Tensor]], part: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, S and G of one matrix, or of some output features of a fused one."""
    A = sum(torch.outer(x, x) for x, _ in rows) / len(rows)
    S = sum(torch.outer(s[part], s[part]) for _, s in rows) / len(rows)
    G = sum(torch.outer(s[part], x) for x, s in rows) / len(rows)
    return A, S, G


def kronecker_norm(delta: Tensor, A: Tensor, S: Tensor) -> Tensor:
    """Return ||H delta||_1 with H written out; vec stacks columns."""
    return (torch.kron(A, S) @ delta.mT.flatten()).abs().sum()


def slow_terms(delta: Tensor, A: Tensor, S: Tensor, G: Tensor) -> tuple[float, float]:
    """Return ||S delta A||_1 and -<G, delta> of one change of a matrix."""
    return float((S @ delta @ A).abs().sum()), -float((G * delta).sum())


def slow_components(W: Tensor, A: Tensor, S: Tensor, G: Tensor) -> list[Tensor]:
    """Return the change that removing each singular component is, wide as G; a bias stays."""
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    found: list[Tensor] = []
    for j in range(len(sigma)):
        delta = torch.zeros_like(G)
        delta[:, : W.shape[1]] = -sigma[j] * torch.outer(U[:, j], Vh[j])
        found.append(delta)
    return found


def slow_channel(kind: str, W: Tensor, bias: Tensor | None, c: int, G: Tensor) -> Tensor:
    """Return the change that removing channel c is to up, gate ("into") or down ("down")."""
    delta = torch.zeros_like(G)
    if kind == "down":
        delta[:, c] = -W[:, c]
        return delta
    delta[c, : W.shape[1]] = -W[c]
    if bias is not None:
        delta[c, -1] = -bias[c]
    return delta


def slow_scores(h: Sequence[float], f: Sequence[float], weight: float) -> list[float]:
    """Return h / mean h + lambda f / mean |f|."""
    mean_h = sum(h) / len(h)
    mean_f = sum(abs(x) for x in f) / len(f)
    return [a / mean_h + weight * b / mean_f for a, b in zip(h, f, strict=True)]
