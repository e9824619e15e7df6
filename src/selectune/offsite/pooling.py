"""What whole layers hand on, the mean over each example's tokens."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.data import Batch
from selectune.errors import DataError
from selectune.gradients.engine import dropout_off, precision_of
from selectune.gradients.kernels import exact
from selectune.gradients.loss import target_nll
from selectune.models import blocks
from selectune.offsite.statistics import Advance, tokens_at_left


def pooled_states(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[int],
    *,
    precision: str = "float32",
    advance: Advance | None = None,
) -> Float[Tensor, "l n d"]:
    """Return the mean output of some layers for every example, padding left out.

    Args:
        model: the original.
        batches: of calibration text, padded on either side.
        layers: their indices.
        precision: autocast of the forward pass.
        advance: called with the number of examples just done.

    Returns:
        fp32 (fp64 for an fp64 model) on the CPU, in the order of `layers` and of the examples.

    Raises:
        DataError: there is no text, or an example without a target token.
    """
    every, found = blocks(model), {j: list[Tensor]() for j in layers}
    device = next(model.parameters()).device
    is_token = torch.zeros(0, 0, dtype=torch.bool)

    def hook(index: int) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            state: Tensor = output if isinstance(output, Tensor) else output[0]
            total = exact(state).mul(is_token[..., None]).sum(1)
            found[index].append((total / is_token.sum(1, keepdim=True)).cpu())

        return after_forward

    with ExitStack() as stack:
        stack.enter_context(dropout_off(model))
        for j in layers:
            stack.callback(every[j].register_forward_hook(hook(j)).remove)
        for batch in batches:
            batch = batch.to(device)
            is_token = tokens_at_left(batch)
            with torch.no_grad(), precision_of(device, precision):
                target_nll(model, batch)
            if advance is not None:
                advance(len(batch.ids))
    if not any(found.values()):
        raise DataError(
            "there is no calibration text",
            where="calibration",
            why="the compressor compares what layers make of it",
            do="give some, or use a compressor without data such as layer_drop",
        )
    return torch.stack([torch.cat(found[j]) for j in layers])
