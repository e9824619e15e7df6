"""What an owner's measurements and trainings ask of a model for a while."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Generator[None]:
    """Let these parameters take gradients and no others, and put every flag back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
