"""Masks that a trial run comes before: a copy of the model trains, the model itself stays new.

mask = drift_mask(model, lambda trial: Trainer(trial, ...).train())              # LoTA
model = rosa(model_with_lora, data, lambda trial: Trainer(trial, ...).train())   # RoSA
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data import Spec, Tokens
from selectune.errors import ConfigError, TrainingError
from selectune.methods.weights.fisher import Fisher
from selectune.methods.weights.lota import LoTA
from selectune.training.sparse.routes import Route
from selectune.training.sparse.sparsify import sparsify
from selectune.weights.base import base_weights, refuse_chosen
from selectune.weights.mask import WeightMask
from selectune.weights.scorer import WeightScorer

Model = TypeVar("Model", bound=nn.Module)
# Trains the model that it is given, in place, with any trainer; what it returns does not matter.
Train = Callable[[nn.Module], object]
_ROSA_DENSITY = 0.006


def drift_mask(model: nn.Module, train: Train, *, scorer: LoTA | None = None) -> WeightMask:
    """Return the weights that fine-tuning moves most, LoTA's lottery tickets.

    A copy is fine-tuned, so the model needs no rewinding: it is the base still, bit for bit.

    Args:
        model: the base; what requires a gradient in it is fine-tuned.
        train: fine-tunes the model it is given, in full; the authors take 3 epochs at 5e-7. In
            bf16 most such steps are rounded away: fine-tune in fp32.
        scorer: with its budget; by itself a tenth of the eligible weights.

    Returns:
        The mask for `sparsify(model, mask)`; `mask.complement()` is for the next task.

    Raises:
        TrainingError: fine-tuning moved no eligible weight.
        SelectionError: the budget cannot be met, or the model has chosen entries already.

    Source:
        LoTA, arXiv 2406.16797.
    """
    tuned = _copied(model)
    train(tuned)
    return (scorer or LoTA()).score(model, tuned=tuned).select()


def rosa(
    model: Model,
    data: Spec | list[Tokens],
    train: Train,
    *,
    scorer: WeightScorer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    route: Route = "auto",
) -> Model:
    """Let single weights train beside a LoRA, chosen where the LoRA leaves most to do: RoSA.

    A copy of the LoRA trains alone for a while; there, the squared gradients of the weights below
    it make the mask. Then training starts anew, LoRA and chosen weights together from the base.
    The authors' learning rates are 7e-4 for a LoRA of rank 16 and alpha 16, 2e-4 for the weights,
    which is two groups of an optimizer.

    Args:
        model: with a LoRA of peft, new; the base itself frozen.
        data: examples of the task, one batch of which makes the mask: path, Hub name, list of
            rows, or tokens.
        train: trains the model it is given; the authors take 64 steps of 32 examples.
        scorer: of the weights; by itself Fisher with 0.6 % of each matrix that has a LoRA (the
            authors: up to 1.8 %), from 32 examples.
        tokenizer: of the model; None loads it from where the model came from.
        route: how gradients reach the chosen weights; see `sparsify`.

    Returns:
        The same model, its LoRA as it was, its chosen weights ready to train.

    Raises:
        ConfigError: the model has no LoRA around a matrix.
        TrainingError: `train` moved nothing, or a gradient is not a number.
        SelectionError: the budget cannot be met, or the model has chosen entries already.

    Source:
        RoSA, arXiv 2401.04679.
    """
    if scorer is None:
        scorer = Fisher(density=_ROSA_DENSITY, eligible=_adapted(model))
    trial = _copied(model)
    train(trial)
    pairs = zip(model.parameters(), trial.parameters(), strict=True)
    if all(p is q or torch.equal(p, q.to(p)) for p, q in pairs):
        raise TrainingError(
            "the trial run changed nothing",
            where="rosa",
            why="the mask is made where the LoRA has learnt something",
            do="let `train` train the model that it is given, for 64 steps or so",
        )
    mask = scorer.score(trial, data, tokenizer=tokenizer).select()
    return sparsify(model, mask, route=route)


def _copied(model: Model) -> Model:
    """Return a copy that trains by itself; what is frozen is not doubled."""
    refuse_chosen(model, where=type(model).__name__, do="`restore` the model first")
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, dict[int, Any](frozen))


def _adapted(model: nn.Module) -> list[str]:
    """Return the names in the bare base of the matrices that have an adapter around them."""
    held: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            below = module.get_base_layer()
            held |= {id(p) for p in below.parameters(recurse=False) if p.ndim == 2}
    found = [name for name, p in base_weights(model).items() if id(p) in held]
    if not found:
        raise ConfigError(
            "the model has no LoRA around a matrix",
            where=type(model).__name__,
            why="RoSA trains single weights beside one",
            do="get_peft_model(model, LoraConfig(...)) first, or use another mask",
        )
    return found
