"""The slow twin of training in place: train everything densely, then put the rest back.

An optimizer that works entry by entry does to a chosen entry the same thing whether or not others
train beside it. So: an fp32 copy of all weights, dense gradients with zeros where nothing is
chosen, one dense optimizer step, and everything outside the mask is put back.
"""

from collections.abc import Callable, Sequence

import torch
from slow_gast import batch_loss
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.data import Batch
from selectune.weights.base import base_fingerprint, base_weights
from selectune.weights.mask import WeightMask

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def mask_of(
    model: nn.Module,
    density: float = 0.2,
    *,
    seed: int = 0,
    only: Callable[[str], bool] = lambda name: True,
) -> WeightMask:
    """Return random entries of a model's weights."""
    rng = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in base_weights(model).items() if only(n)}
    indices = {
        name: (torch.rand(p.numel(), generator=rng) < density).nonzero().flatten()
        for name, p in weights.items()
    }
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    return WeightMask(indices, shapes, base_fingerprint(model), {"method": "random"})


def is_matrix(name: str) -> bool:
    """Tell whether a weight is a matrix inside of a layer."""
    return "layers." in name and name.endswith("_proj.weight")


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the base's weights."""
    return {name: p.detach().clone() for name, p in base_weights(model).items()}


def live(model: nn.Module) -> dict[str, Tensor]:
    """Return what the base's weights and what acts beside them amount to."""
    found = bits(model)
    for name, entries in model.sparse.entries.items():
        if model.sparse.form == "compose":
            found[name].view(-1)[entries.index.long()] += entries.deltas()
    return found


def matrices(model: nn.Module) -> Callable[[str], bool]:
    """Return what tells the matrices of a model's layers by name; heads are often tied."""
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (".layers." in name or ".h." in name)
    }
    return names.__contains__


def chosen(mask: WeightMask, name: str, shape: torch.Size) -> Tensor:
    """Return which entries of a weight are chosen, as a tensor of its shape."""
    found = torch.zeros(shape, dtype=torch.bool).flatten()
    if name in mask.indices:
        found[mask.indices[name].long()] = True
    return found.view(shape)


def dense_gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the gradient of every weight, the mean over some batches, in fp32."""
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.requires_grad_(True)
    for batch in batches:
        (batch_loss(model, batch, "token") / len(batches)).backward()
    found = {
        name: torch.zeros_like(p).float() if p.grad is None else p.grad.float()
        for name, p in base_weights(model).items()
    }
    model.zero_grad(set_to_none=True)
    return found


def slow_train(
    model: nn.Module,
    mask: WeightMask,
    steps: Sequence[Sequence[Batch]],
    make: MakeOptimizer,
    *,
    clip: float | None = None,
    decay_to: str = "zero",
    skip: frozenset[int] = frozenset(),
) -> None:
    """Train the chosen entries of a model; `steps` holds the micro-batches of every step."""
    base = {name: t.float() for name, t in bits(model).items()}
    start = {n: torch.zeros_like(t) for n, t in base.items()} if decay_to == "base" else base
    master = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    optimizer = make([master[name] for name in mask.indices])
    for number, batches in enumerate(steps):
        gradients = dense_gradients(model, batches)
        if number in skip:
            continue
        for name in mask.indices:
            master[name].grad = gradients[name] * chosen(mask, name, base[name].shape)
        if clip is not None:
            nn.utils.clip_grad_norm_(master.values(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, p in base_weights(model).items():
                is_chosen = chosen(mask, name, p.shape)
                master[name].copy_(torch.where(is_chosen, master[name], start[name]))
                found = base[name] + master[name] if decay_to == "base" else master[name]
                p.copy_(torch.where(is_chosen, found.to(p.dtype), base[name].to(p.dtype)))
