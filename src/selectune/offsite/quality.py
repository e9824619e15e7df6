"""How near an emulator comes to its original, measured on the owner's side before anything leaves.

    cosine          <g*, g> / (|g*| |g|)     g: gradient of the adapter layers in the original,
    relative error  |g* - g| / |g|           g*: the same in the emulator, on the same examples
    divergence      mean over predicted tokens of KL(original || emulator), in nats

The gradient is that of the mean example loss. Its agreement says how well the data owner's training
signal is kept; loss and divergence say how much of a model the emulator is by itself.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.data import Batch, Tokens, collate, length_sorted_batches
from selectune.data.collate import NO_LOSS
from selectune.errors import TrainingError
from selectune.gradients.engine import dropout_off, example_loss, precision_of
from selectune.models import blocks
from selectune.offsite.modes import training_only

Layers = Mapping[int, int]  # of every adapter layer: its index in the original -> in the emulator
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two gradients are.

    Attributes:
        cosine: of the angle between them.
        relative_error: norm of their difference over the norm of the original's.
    """

    cosine: float
    relative_error: float


@dataclass(frozen=True, slots=True)
class GradientAgreement:
    """How alike the adapter's gradients are in emulator and original.

    Attributes:
        total: over all adapter layers together.
        by_layer: over each, by its index in the original.
    """

    total: Agreement
    by_layer: Mapping[int, Agreement]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        by_layer = {str(j): asdict(one) for j, one in self.by_layer.items()}
        return {**asdict(self.total), "by_layer": by_layer}


@dataclass(frozen=True, slots=True)
class Ratios:
    """What is left of a model's parameters, tied and shared ones counted once.

    Attributes:
        middle: emulated over original middle.
        with_adapter: adapter and emulated middle over adapter and original middle.
        whole: emulator over model, embeddings and head included.
        n_emulator: parameters of the emulator.
        n_original: of the model.
    """

    middle: float
    with_adapter: float
    whole: float
    n_emulator: int
    n_original: int


def gradient_agreement(
    original: nn.Module,
    emulator: nn.Module,
    layers: Layers,
    items: Sequence[Tokens],
    *,
    pad_id: int,
    precision: str = "float32",
    token_budget: int = 1024,
    advance: Advance | None = None,
) -> GradientAgreement:
    """Compare the adapter's gradients in the emulator with those in the original.

    Args:
        original: a causal LM.
        emulator: of it; its adapter layers hold the same values.
        layers: which layers those are.
        items: the probe, each with a target token.
        pad_id: token id at padding.
        precision: autocast of the forward pass.
        token_budget: padded tokens in one batch.
        advance: called with the number of examples just done, each counted once per model.

    Raises:
        TrainingError: a gradient is not a number, or the original's is zero.
    """
    found: list[list[Tensor]] = []
    for model, indices in ((original, layers.keys()), (emulator, layers.values())):
        found.append(
            _mean_gradients(model, indices, items, pad_id, precision, token_budget, advance)
        )
    own, other = found
    products = {
        j: (_dot(a, a), _dot(b, b), _dot(a, b)) for j, a, b in zip(layers, own, other, strict=True)
    }
    total = (sum(parts) for parts in zip(*products.values(), strict=True))
    return GradientAgreement(
        _agreement(*total, where="adapter"),
        {j: _agreement(*parts, where=f"layer {j}") for j, parts in products.items()},
    )


def _mean_gradients(
    model: nn.Module,
    indices: Iterable[int],
    items: Sequence[Tokens],
    pad_id: int,
    precision: str,
    token_budget: int,
    advance: Advance | None,
) -> list[Tensor]:
    """Return the gradient of the mean example loss, one flat fp32 vector on the CPU per layer."""
    every = blocks(model)
    parts = [list(every[j].parameters()) for j in indices]
    flat = [p for part in parts for p in part]
    sums = [torch.zeros(p.numel()) for p in flat]
    with dropout_off(model), training_only(model, flat):
        for batch in _batches(items, pad_id, token_budget, next(model.parameters()).device):
            losses = example_loss(model, batch, precision)
            found: Any = torch.autograd.grad(losses.sum(), flat, allow_unused=True)
            gradients: tuple[Tensor | None, ...] = found
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.flatten().float().cpu()
            if advance is not None:
                advance(len(batch.ids))
    left = iter(sums)
    return [torch.cat([next(left) for _ in part]) / len(items) for part in parts]


def _batches(
    items: Sequence[Tokens], pad_id: int, token_budget: int, device: torch.device
) -> Generator[Batch]:
    lengths = [len(t.input_ids) for t in items]
    for rows in length_sorted_batches(lengths, token_budget=token_budget):
        yield collate([items[k] for k in rows], pad_id=pad_id, device=device)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _agreement(own: float, other: float, both: float, *, where: str) -> Agreement:
    if not 0 < own < float("inf") or not other < float("inf"):
        raise TrainingError(
            "the adapter's gradients cannot be compared",
            where=where,
            why=f"their squared norms are {own:.3g} in the model and {other:.3g} in the emulator",
            do="measure in float32, and on examples that the model does not know by heart",
        )
    cosine = both / (own * other) ** 0.5 if other else 0.0
    # Rounding may leave a difference of equal gradients a hair below zero.
    return Agreement(cosine, max(0.0, own + other - 2 * both) ** 0.5 / own**0.5)


def logit_divergence(
    original: nn.Module,
    emulator: nn.Module,
    items: Sequence[Tokens],
    *,
    pad_id: int,
    precision: str = "float32",
    token_budget: int = 1024,
    advance: Advance | None = None,
) -> float:
    """Return the mean KL(original || emulator) over all predicted tokens, in nats.

    Args:
        original: a causal LM.
        emulator: of it.
        items: the probe, each with a target token.
        pad_id: token id at padding.
        precision: autocast of the forward pass.
        token_budget: padded tokens in one batch.
        advance: called with the number of examples just done.
    """
    total, n_tokens = 0.0, 0
    device = next(original.parameters()).device
    with dropout_off(original), dropout_off(emulator), torch.inference_mode():
        for batch in _batches(items, pad_id, token_budget, device):
            is_read = batch.labels[:, 1:] != NO_LOSS
            p, q = (_log_shares(m, batch, is_read, precision) for m in (original, emulator))
            total += float((p.exp() * (p - q)).sum(-1).double().sum())
            n_tokens += len(p)
            if advance is not None:
                advance(len(batch.ids))
    return total / n_tokens


def _log_shares(
    model: nn.Module, batch: Batch, is_read: Tensor, precision: str
) -> Float[Tensor, "k v"]:
    with precision_of(batch.input_ids.device, precision):
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = cast("Tensor", out.logits)
    return logits[:, :-1][is_read].float().log_softmax(-1)


def parameter_ratios(original: nn.Module, emulator: nn.Module, layers: Layers) -> Ratios:
    """Return what an emulator's size is of its original's, in the three forms that are in use.

    Args:
        original: the model.
        emulator: of it.
        layers: the adapter layers.
    """
    adapter, middle = _counts(original, layers.keys())
    _, emulated = _counts(emulator, layers.values())
    whole, all_emulator = (sum(p.numel() for p in m.parameters()) for m in (original, emulator))
    return Ratios(
        emulated / middle,
        (adapter + emulated) / (adapter + middle),
        all_emulator / whole,
        all_emulator,
        whole,
    )


def _counts(model: nn.Module, adapters: Iterable[int]) -> tuple[int, int]:
    """Return the parameters of the adapter layers, and of all others, each counted once."""
    chosen = set(adapters)
    sizes: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for index, block in enumerate(blocks(model)):
        for p in block.parameters():
            sizes[index not in chosen][id(p)] = p.numel()
    return sum(sizes[0].values()), sum(sizes[1].values())
