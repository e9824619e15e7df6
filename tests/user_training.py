"""Tiny models in transformers.Trainer and trl.SFTTrainer, written as their users do."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from selectune.training.method import Method
from selectune.training.method_callback import MethodCallback
from workspace import byte_tokenizer

TRAINERS = ("transformers", "trl")
TOKENIZER = byte_tokenizer()
N_LAYERS = 2


def rows(n: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Return prompts and completions of different lengths."""
    rng = np.random.default_rng(seed)
    words = ["red", "cow", "green", "owl", "blue", "cat", "white", "dog"]

    def some(most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, most)))

    return [{"prompt": some(4), "completion": f" {some(4)}"} for _ in range(n)]


def tokenised(n: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return the same examples as tokens, of which only the completion counts in the loss."""
    found = []
    for row in rows(n, seed):
        prompt, answer = (TOKENIZER(row[key])["input_ids"] for key in ("prompt", "completion"))
        answer = [*answer, TOKENIZER.eos_token_id]
        labels = [-100] * len(prompt) + answer
        found.append({"input_ids": prompt + answer, "labels": labels})
    return found


def bare() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": N_LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, **shape, **heads, **special))


def lora(dropout: float = 0.1) -> nn.Module:
    model = bare()
    torch.manual_seed(1)
    names = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():  # B = 0 would leave every gradient of A at zero
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    return adapted


class Run:
    """One training of a tiny model."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        method: Method | None = None,
        *,
        model: nn.Module | None = None,
        data: object = None,
        more: list[TrainerCallback] | None = None,
        given: dict[str, Any] | None = None,
        **arguments: object,
    ) -> None:
        self.method = method
        self.callback = None if method is None else method.callback()
        usual = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "max_steps": 4,
            "max_grad_norm": 0.1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 2,  # every layer is drawn, whether draws are kept for one step or two
        }
        callbacks = [*(more or []), *([] if self.callback is None else [self.callback])]
        self.model = lora() if model is None else model
        self.hooks = count_hooks(self.model)
        if kind == "trl":
            self.trainer: Trainer = SFTTrainer(
                self.model,
                SFTConfig(**{**usual, **arguments}),
                train_dataset=Dataset.from_list(rows()) if data is None else data,
                processing_class=TOKENIZER,
                callbacks=callbacks,
                **(given or {}),
            )
        else:
            self.trainer = Trainer(
                self.model,
                TrainingArguments(**{**usual, **arguments}),
                train_dataset=tokenised() if data is None else data,
                data_collator=DataCollatorForSeq2Seq(TOKENIZER),
                callbacks=callbacks,
                **(given or {}),
            )

    def train(self, resume: Path | None = None) -> "Run":
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return self

    @property
    def records(self) -> list[tuple[int, dict[str, Any]]]:
        assert isinstance(self.callback, MethodCallback)
        return self.callback.records

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.trainer.state.log_history if "loss" in row]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


def count_hooks(model: nn.Module) -> list[tuple[int, int, int]]:
    return [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]


def assert_same_bits(a: Run, b: Run) -> None:
    assert a.losses == b.losses
    assert_close(a.weights, b.weights, rtol=0, atol=0)
    if a.method is not None and b.method is not None:
        assert a.records == b.records
