"""A stock Trainer on a tiny peft model: its output folder, and what was in its optimizer."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from selectune.data import Tokens, collate


@dataclass
class Seen:
    """What the live optimizer held when a checkpoint was written, by parameter name."""

    weights: dict[str, Tensor]
    m: dict[str, Tensor]
    v: dict[str, Tensor]
    n_steps: int


@dataclass
class Stock:
    """A finished training."""

    folder: Path
    model: nn.Module
    seen: list[Seen] = field(default_factory=list)


class _Spy(TrainerCallback):
    def __init__(self, seen: list[Seen]) -> None:
        self._seen = seen

    def on_save(self, args: object, state: Any, control: object, **kwargs: Any) -> None:  # noqa: ANN401
        named = {n: p for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        state_of = kwargs["optimizer"].optimizer.state
        self._seen.append(
            Seen(
                {n: p.detach().clone() for n, p in named.items()},
                {n: state_of[p]["exp_avg"].clone() for n, p in named.items()},
                {n: state_of[p]["exp_avg_sq"].clone() for n, p in named.items()},
                state.global_step,
            )
        )


def stock_model(seed: int = 0) -> nn.Module:
    """Return a peft model of which factors (decayed) and biases (not decayed) train."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], bias="lora_only", task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_model("qwen2"), config)


def train_stock(folder: Path, items: Sequence[Tokens] | None = None, **arguments: object) -> Stock:
    """Train as a user would, with a checkpoint after each of three epochs."""
    model = stock_model()
    stock = Stock(folder, model)
    items = items or tiny_tokens(6, 5)

    def collated(rows: Sequence[Tokens]) -> dict[str, Tensor]:
        batch = collate(rows, pad_id=0)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }

    plain: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**plain | arguments),
        train_dataset=list(items),
        data_collator=collated,
        callbacks=[_Spy(stock.seen)],
    )
    trainer.train()
    return stock


def at(stock: Stock, k: int) -> nn.Module:
    """Return the model in fp64 as it was at checkpoint k."""
    model = deepcopy(stock.model).eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in stock.seen[k].weights.items():
            named[name].copy_(value)
    return model.double()
