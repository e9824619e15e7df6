"""The two trainers, with our batches, our loss and our files; everything else is theirs.

Both see the same batches, in the same order, and take the loss from `gradients.loss`: the mean
over all target tokens of an optimizer step, as transformers' own loss is, with the LM head
computed where a target token is predicted and nowhere else.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from selectune.data.collate import Batch, collate
from selectune.data.tokens import Tokens
from selectune.errors import TrainingError
from selectune.gradients.loss import target_nll
from selectune.training.method_callback import MethodCallback
from selectune.training.order import EpochBatches
from selectune.training.weights import save_weights


class Collate:
    """Turn indices into a padded batch of the given tokens, untouched and in that order."""

    def __init__(self, items: Sequence[Tokens], pad_id: int) -> None:
        """Keep the examples, so that a batch is named by indices only."""
        self.items, self.pad_id = items, pad_id

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return what the Trainer hands to `compute_loss`."""
        # datasets.Dataset gives a row as a mapping, a list as the index itself.
        indices: list[int] = [row if isinstance(row, int) else row["index"] for row in rows]
        batch = collate([self.items[i] for i in indices], pad_id=self.pad_id)
        return {
            "ids": batch.ids,
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }


class TransformersArm(Trainer):
    """transformers.Trainer on exactly the given tokens and targets."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: object,
        data_collator: Collate,
        callbacks: list[TrainerCallback],
        batches: EpochBatches,
        acting: MethodCallback | None = None,
    ) -> None:
        """Build the trainer of the next class in line, then take its printing away."""
        self.batches, self.acting = batches, acting
        self.is_own_loss = not has_auxiliary_loss(model)
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            model=cast("Any", model),
            args=args,
            train_dataset=cast("Any", train_dataset),
            data_collator=cast("Any", data_collator),
            callbacks=callbacks,
            **self._extra_arguments(),
            **_optimizer(acting, args),
        )
        self.remove_callback(PrinterCallback)
        # Without a tokenizer the Trainer changes no special tokens of the model and saves none.
        self.processing_class = None
        if self.is_own_loss:
            self.loss_is_scaled_for_ga = True

    def _extra_arguments(self) -> dict[str, Any]:
        return {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of `EpochBatches`."""
        loader: DataLoader[Any] = DataLoader(
            cast("Any", self.train_dataset),  # pyright: ignore[reportUnknownMemberType]
            batch_sampler=self.batches,
            collate_fn=cast("Any", self.data_collator),
        )
        return cast("Any", self.accelerator).prepare(loader)

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this batch's share of the mean loss over the target tokens of one step.

        Raises:
            TrainingError: the loss is not a finite number.
        """
        ids: tuple[str, ...] = inputs.pop("ids")
        if self.acting is not None and self.acting.session is not None:
            # The model itself is not given them: our loss reads hidden states.
            self.acting.session.expect(inputs["labels"], ids)
        if not self.is_own_loss:
            loss = cast(
                "Tensor",
                super().compute_loss(
                    cast("Any", model), inputs, num_items_in_batch=cast("Any", num_items_in_batch)
                ),
            )
            self._refuse_not_finite(loss, ids, None)
            return loss
        batch = Batch(ids, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        nats, n_tokens = target_nll(model, batch)
        if num_items_in_batch is None:
            # A model whose forward takes no loss arguments: transformers averages over passes.
            passes = self.current_gradient_accumulation_steps
            loss = nats.sum() / n_tokens.sum() / passes
        else:
            loss = nats.sum() / num_items_in_batch
        self._refuse_not_finite(loss, ids, nats)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights, but neither a pickle of the arguments nor a tokenizer."""
        model = cast("nn.Module", self.model)  # pyright: ignore[reportUnknownMemberType]
        save_weights(model, Path(cast("str", output_dir)))

    def _refuse_not_finite(self, loss: Tensor, ids: tuple[str, ...], nats: Tensor | None) -> None:
        if math.isfinite(loss.item()):
            return
        if nats is not None:
            is_bad = (~nats.isfinite()).nonzero().flatten()
            ids = tuple(ids[int(row)] for row in is_bad)
        raise TrainingError(
            f"the loss of step {self.state.global_step + 1} is {loss.item()}",
            where="example " + ", ".join(ids[:16]),
            why="every later weight would be lost as well",
            do="lower tune.learning_rate, or look at these examples"
            if self.state.global_step
            else "nothing has moved yet: check the base weights, or use model.dtype=float32",
        )


def _optimizer(acting: MethodCallback | None, args: TrainingArguments) -> dict[str, Any]:
    """Return the optimizer that a method works with alone, as a trainer is given it."""
    own = None if acting is None else acting.method.optimizer
    return {} if own is None else {"optimizer_cls_and_kwargs": (own, {"lr": args.learning_rate})}


def has_auxiliary_loss(model: nn.Module) -> bool:
    """Tell whether the model's own loss is more than cross-entropy, as with routed experts."""
    config = cast("Any", model).config.get_text_config()
    return bool(config.to_dict().get("output_router_logits", False))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training may change, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainable entries to main memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trainable(model).items()}


def count_moved(model: nn.Module, before: Mapping[str, Tensor]) -> int:
    """Count the entries that differ from `before`, bit patterns of a NaN included."""
    now = trainable(model)
    return sum(
        int(torch.count_nonzero(now[name].detach().to("cpu") != t)) for name, t in before.items()
    )
