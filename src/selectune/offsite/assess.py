"""The owner's judgement of an emulator before it leaves: how faithful, how good, how small.

What a data owner can make of it is not measured here; that needs the data owner's text.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data import Example, Tokens
from selectune.evaluation import Evaluation, evaluate
from selectune.gradients.engine import pool_losses
from selectune.offsite.distill import MiddleTraining, train_middle
from selectune.offsite.quality import (
    GradientAgreement,
    Layers,
    Ratios,
    gradient_agreement,
    logit_divergence,
    parameter_ratios,
)
from selectune.progress import Progress

Who = Literal["original", "emulator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a model is read.

    Attributes:
        tokenizer: of the model.
        pad_id: token id at padding.
        precision: autocast of forward passes.
        token_budget: padded tokens in one batch.
        max_length: tokens of one question with its answer.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    precision: str
    token_budget: int
    max_length: int

    @property
    def passes(self) -> dict[str, Any]:
        """What forward passes over tokens take."""
        return {
            "pad_id": self.pad_id,
            "precision": self.precision,
            "token_budget": self.token_budget,
        }


@dataclass(frozen=True, slots=True)
class Quality:
    """What an owner knows of an emulator.

    Attributes:
        ratios: its size.
        agreement: of the adapter's gradients with the original's.
        divergence: mean KL(original || emulator) per predicted token, in nats.
        losses: mean example loss on the probe, in nats per target token.
        healed_loss: the emulator's, once its middle was trained on generic text for a while; None
            where that was not tried.
        answers: to the probe's questions, by task; empty where there are none.
    """

    ratios: Ratios
    agreement: GradientAgreement
    divergence: float
    losses: Mapping[Who, float]
    healed_loss: float | None = None
    answers: Mapping[str, Mapping[Who, Evaluation]] = field(
        default_factory=dict[str, Mapping[Who, Evaluation]]
    )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        answers = {
            task: {who: one.to_json() for who, one in by_model.items()}
            for task, by_model in self.answers.items()
        }
        return {
            "ratios": asdict(self.ratios),
            "gradients": self.agreement.to_json(),
            "divergence_nats": self.divergence,
            "losses_nats": dict(self.losses),
            "healed_loss_nats": self.healed_loss,
            "answers": answers,
        }

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        r, total = self.ratios, self.agreement.total
        lines = [
            f"size        {r.middle:.1%} of the middle, {r.with_adapter:.1%} with the adapter, "
            f"{r.whole:.1%} of the whole: {r.n_emulator:,} of {r.n_original:,} parameters",
            f"gradients   cosine {total.cosine:.4f}, relative error {total.relative_error:.3f}",
            *(
                f"  layer {j:<4}cosine {one.cosine:.4f}, relative error {one.relative_error:.3f}"
                for j, one in self.agreement.by_layer.items()
            ),
            f"by itself   loss {self.losses['emulator']:.3f}, the model's "
            f"{self.losses['original']:.3f}; {self.divergence:.3f} nats apart per token",
        ]
        if self.healed_loss is not None:
            lines.append(f"healed      loss {self.healed_loss:.3f}")
        for task, by_model in self.answers.items():
            one, other = by_model["emulator"], by_model["original"]
            if one.accuracy is not None and other.accuracy is not None:
                lines.append(
                    f"  {task:<10}{one.accuracy:.3f} right, the model {other.accuracy:.3f} "
                    f"({one.n} questions)"
                )
        return lines


def assess(
    original: nn.Module,
    emulator: nn.Module,
    layers: Layers,
    probe: Sequence[Tokens],
    *,
    reading: Reading,
    questions: Mapping[str, Sequence[Example]],
    healing: tuple[MiddleTraining, Sequence[Tokens]] | None,
    progress: Progress,
    seed: int,
) -> Quality:
    """Compare an emulator with its original.

    Args:
        original: a causal LM.
        emulator: of it, on the same device.
        layers: the adapter layers.
        probe: what gradients, logits and losses are compared on.
        reading: how the models are read.
        questions: what both are asked, by task.
        healing: how a copy of the emulator is trained, and on what; None leaves that out.
        progress: told of every part.
        seed: of the healing.

    Raises:
        TrainingError: a loss or a gradient is not a number.
        DataError: a question cannot be asked.
    """
    models: dict[Who, nn.Module] = {"original": original, "emulator": emulator}
    passes = reading.passes
    with progress.phase("compare gradients", 2 * len(probe), "examples") as advance:
        agreement = gradient_agreement(original, emulator, layers, probe, advance=advance, **passes)
    with progress.phase("compare logits", len(probe), "examples") as advance:
        divergence = logit_divergence(original, emulator, probe, advance=advance, **passes)
    losses: dict[Who, float] = {who: _loss(model, probe, reading) for who, model in models.items()}
    answers: dict[str, dict[Who, Evaluation]] = {}
    for task, asked in questions.items():
        for who, model in models.items():
            n = sum(max(1, len(e.options)) for e in asked)
            with progress.phase(f"ask the {who} {task}", n, "answers") as advance:
                answers.setdefault(task, {})[who] = evaluate(
                    model, asked, reading.tokenizer, max_length=reading.max_length,
                    device=next(model.parameters()).device.type, advance=advance, **passes,
                )  # fmt: skip
    healed = None
    if healing is not None:
        how, text = healing
        mended = copy.deepcopy(emulator)
        with progress.phase("heal a copy of the emulator", how.steps, "steps") as advance:
            train_middle(
                mended, text, how, adapters=list(layers.values()), pad_id=reading.pad_id,
                precision=reading.precision, seed=seed, advance=advance,
            )  # fmt: skip
        healed = _loss(mended, probe, reading)
    return Quality(
        parameter_ratios(original, emulator, layers), agreement, divergence, losses, healed, answers
    )


def _loss(model: nn.Module, probe: Sequence[Tokens], reading: Reading) -> float:
    losses: np.ndarray = pool_losses(model, probe, **reading.passes)
    return math.fsum(losses.tolist()) / len(losses)
