"""Scorers of single weights: from a model and data to scores, and from these to a mask.

    mask = GaLLoP(density=0.01).score(model, data).select()

A scorer is a frozen dataclass of its options with one function, `values`: a weight and what the
data says about it -> a score for every entry. All the rest is shared.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from selectune.data import Spec, Tokens, read_examples, tokenize
from selectune.errors import ConfigError
from selectune.registry import WeightNeed
from selectune.weights.base import base_fingerprint, refuse_chosen
from selectune.weights.budget import sizes_of
from selectune.weights.eligible import eligible_weights
from selectune.weights.options import ScorerOptions
from selectune.weights.scores import WeightScores
from selectune.weights.statistics import Advance, Statistics, estimate

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScorer(ScorerOptions):
    """A scorer that can be put to work; a subclass gives `values`."""

    def score(
        self,
        model: nn.Module,
        data: Spec | Sequence[Tokens] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 512,
        token_budget: int = 1024,
        precision: str | None = None,
        tuned: nn.Module | str | Path | None = None,
        spill: str | Path | None = None,
        advance: Advance | None = None,
    ) -> WeightScores:
        """Score every eligible weight of a model as it stands; nothing about it changes.

        Args:
            model: a causal LM, bare or with adapters around it.
            data: path, Hub name, datasets.Dataset, list of rows, or `selectune.data.Tokens`; for
                scorers that need examples.
            tokenizer: of the model; None loads it from where the model came from.
            max_length: tokens kept of an example.
            token_budget: padded tokens in one batch.
            precision: "float32" or "bfloat16"; None takes the type of the model's weights.
            tuned: the model after full fine-tuning, or its folder; for scorers that need it.
            spill: folder on whose disk sums of gradients lie meanwhile, 4 bytes per eligible
                weight; None keeps them in memory.
            advance: called with the number of examples just done.

        Raises:
            ConfigError: data or the fine-tuned model is needed and missing.
            DataError: the data cannot be used.
            SelectionError: no weight is eligible, the budget cannot be met, or single weights of
                the model train already.
            CoverageError: an eligible weight is quantised.
            TrainingError: a gradient is not a number, or all are zero.
            StorageError: the sums find no room in `spill`.
        """
        if isinstance(model, DistributedDataParallel):
            model = cast("nn.Module", model.module)
        refuse_chosen(
            model, where=type(model).__name__, do="`restore` the model first, or score a fresh one"
        )
        eligible = self.narrow(eligible_weights(model, self.eligible))
        sizes = sizes_of(model, eligible, self.lora_modules)
        needs = cast("frozenset[WeightNeed]", self.entry.needs)
        tokens, pad_id = (
            self._tokens(model, data, tokenizer, max_length) if needs - {"drift"} else ([], 0)
        )
        found = Statistics()
        if needs:
            held = next(iter(eligible.values())).parameter.dtype
            asked = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(held, "float32")
            found = estimate(
                model,
                tokens,
                needs,
                eligible,
                examples=self.examples,
                seed=self.seed,
                weighting=self.weighting,
                micro_batch=self.micro_batch_size(),
                pad_id=pad_id,
                precision=precision or asked,
                token_budget=token_budget,
                tuned=self._tuned(tuned) if "drift" in needs else None,
                spill=None if spill is None else Path(spill),
                advance=advance,
            )
        return WeightScores(self, eligible, found, sizes, base_fingerprint(model))

    def _tokens(
        self,
        model: nn.Module,
        data: Spec | Sequence[Tokens] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
    ) -> tuple[Sequence[Tokens], int]:
        if data is None:
            raise ConfigError(
                f"{self.entry.name} needs examples",
                where="data",
                why=f"it reads the {self._needs_words()} of their loss",
                do="give data=, rows of the task, or use a scorer without data such as "
                "low_magnitude",
            )
        if isinstance(data, Sequence) and data and isinstance(data[0], Tokens):
            pad_id = 0 if tokenizer is None else cast("int | None", tokenizer.pad_token_id)
            return cast("Sequence[Tokens]", data), pad_id or 0
        if tokenizer is None:
            name = str(cast("Any", model).config.name_or_path)
            tokenizer = cast(
                "PreTrainedTokenizerBase",
                AutoTokenizer.from_pretrained(name, trust_remote_code=False),
            )
        found = tokenize(read_examples(cast("Spec", data)), tokenizer, max_length=max_length)
        if found.n_truncated:
            _log.warning(
                "%d examples were cut to %d tokens; %d kept no target token and are left out: "
                "raise max_length",
                found.n_truncated, max_length, len(found.empty_ids),
            )  # fmt: skip
        return found, cast("int | None", tokenizer.pad_token_id) or 0

    def _tuned(self, tuned: nn.Module | str | Path | None) -> nn.Module:
        if tuned is None:
            raise ConfigError(
                f"{self.entry.name} needs the model after full fine-tuning",
                where="tuned",
                why="it scores weights by what fine-tuning changed",
                do="fine-tune a copy, and give it or its folder as tuned=",
            )
        if isinstance(tuned, nn.Module):
            return tuned
        return cast(
            "nn.Module",
            AutoModelForCausalLM.from_pretrained(tuned, dtype="auto", trust_remote_code=False),
        )

    def _needs_words(self) -> str:
        return " and ".join(sorted(need.replace("_", " ") for need in self.entry.needs))
