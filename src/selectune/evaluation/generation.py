"""Accuracy of answers that a model writes, not of options that it ranks.

The model continues each prompt greedily, and the option that its words end on is its answer. A
model that no longer answers in the form asked for fails here and not in `evaluate`, where some
option is always the likeliest: only generated accuracy can collapse. Conversely, a base model that
never learnt the form looks bad here and may rank well. Read the two beside each other.

An answer is the last option that occurs in the words, as whole words and without regard to case,
spacing, kinds of quotes and full stops; of two that end at the same place, the longer. Words with
no option in them are unparsed: wrong, and counted.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from selectune.data.collate import Batch, collate, length_sorted_batches
from selectune.data.encode import encode_pairs, opening_ids
from selectune.data.examples import Example
from selectune.data.tokens import Tokens, option_tokens
from selectune.errors import ConfigError, CoverageError, DataError, TrainingError
from selectune.evaluation.answers import are_alike, find_answer
from selectune.evaluation.options import check_questions

COLUMNS = {
    "id": "string",
    "source": "string",
    "generated": "string",
    "given": "int64",
    "is_parsed": "bool",
    "is_right": "bool",
}

ANSWER_SLACK = 16
"""Tokens that an answer may have beyond the longest option, for words around it."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What one model wrote, question by question.

    Args:
        table: columns of `COLUMNS`, in the order of the questions. `given` is the index of the
            option found in the words, null where there is none.
        left_out: ids of examples without options, which cannot be judged so.
        n_truncated: questions whose prompt lost its beginning.
    """

    table: pa.Table
    left_out: tuple[str, ...] = ()
    n_truncated: int = 0

    def column(self, name: str) -> list[Any]:
        """Return one column of the table, None where it is null."""
        return self.table[name].to_pylist()

    @property
    def n(self) -> int:
        """Questions answered."""
        return self.table.num_rows

    @property
    def accuracy(self) -> float:
        """Share of questions whose answer is the right option; unparsed ones are wrong."""
        return sum(self.column("is_right")) / self.n

    @property
    def n_unparsed(self) -> int:
        """Questions whose words hold no option."""
        return self.n - sum(self.column("is_parsed"))

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {
            "n": self.n,
            "accuracy": self.accuracy,
            "n_unparsed": self.n_unparsed,
            "n_truncated": self.n_truncated,
            "left_out": list(self.left_out),
        }


def generate_answers(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    pad_id: int,
    device: str = "cpu",
    precision: str = "float32",
    token_budget: int = 4096,
    stop: Sequence[str] = ("\n",),
    slack: int = ANSWER_SLACK,
    advance: Callable[[int], None] | None = None,
) -> Generation:
    """Let a model answer every question in its own words.

    Decoding is greedy whatever the model's generation config says of sampling or penalties; it
    ends at an end-of-text token, a stop text, or `slack` tokens beyond the question's longest
    option. Neither the order of the questions nor the size of the batches changes the answers,
    unless two next tokens are equally likely to within rounding.

    Args:
        model: a causal LM on `device`, bare or wrapped by peft; dropout is off meanwhile.
        examples: held-out examples; those without options are left out, and named.
        tokenizer: the model's.
        max_length: tokens of prompt and answer together; a longer prompt loses its beginning.
        pad_id: id of the padding token.
        device: where the batches go.
        precision: bfloat16 runs the model under autocast.
        token_budget: tokens in one batch, padding and room for the answers included.
        stop: texts that end an answer, and are no part of it. One that stands in an option of a
            question does not end that question's answer.
        slack: tokens granted beyond the longest option, for words around it.
        advance: called with the number of questions just answered.

    Returns:
        One row per question, in the given order.

    Raises:
        ConfigError: `slack` is negative.
        DataError: no example has options, or a question cannot be asked.
        CoverageError: the model cannot generate.
        TrainingError: the model gives logits that are not numbers.
    """
    questions = [example for example in examples if example.options]
    if not questions:
        raise DataError(
            "there is nothing to answer",
            why="none of the held-out examples has options" if examples else "no examples given",
            do='give the held-out rows "options"',
        )
    if slack < 0:
        raise ConfigError(f"slack is {slack}", why="an option could not be written in full")
    _refuse_mute(model)
    check_questions(questions, tokenizer, max_length)
    asked, limits, n_truncated = _prompts(questions, tokenizer, max_length, slack)
    stops = [_stops(example, stop) for example in questions]
    lengths = [len(a.input_ids) + n for a, n in zip(asked, limits, strict=True)]
    words: dict[int, str] = {}
    with _asking(model) as ends:
        if (own := cast("int | None", tokenizer.eos_token_id)) is not None:
            ends |= {own}
        for rows in length_sorted_batches(lengths, token_budget=token_budget):
            batch = collate([asked[k] for k in rows], pad_id=pad_id, side="left", device=device)
            width, room = batch.input_ids.shape[1], [limits[k] for k in rows]
            written = _Written(tokenizer, room, [stops[k] for k in rows], ends, width)
            # Entered anew for each batch: autocast keeps its casts of weights until it is left.
            with torch.autocast(
                torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"
            ):
                _write(model, batch, written, max(room), pad_id)
            words.update((k, written.words[row]) for row, k in enumerate(rows))
            if advance is not None:
                advance(len(rows))
    table = pa.Table.from_pylist(
        [_row(example, words[k]) for k, example in enumerate(questions)],
        schema=pa.schema(list(COLUMNS.items())),
    )
    left_out = tuple(example.id for example in examples if not example.options)
    return Generation(table, left_out, n_truncated)


def _refuse_mute(model: nn.Module) -> None:
    if not any(isinstance(module, GenerationMixin) for module in model.modules()):
        why = "generated answers need a causal LM of transformers"
    elif isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        # peft 0.21 hands the prefix over under a name that transformers 5.23 sets aside once it has
        # a cache of its own: `generate` runs, and its answers are another model's.
        why = "peft loses virtual tokens on the way through transformers' `generate`"
    else:
        return
    raise CoverageError(
        f"{type(model).__name__} cannot write its answers",
        why=why,
        do="rank the options instead: `evaluate`",
    )


def _row(example: Example, words: str) -> dict[str, Any]:
    given = find_answer(words, example.options)
    # Compared as texts: of options that are alike, the first is found, and any may be right.
    right = example.options[example.answer]
    is_right = given is not None and are_alike(example.options[given], right)
    return {
        "id": example.id,
        "source": example.source,
        "generated": words,
        "given": given,
        "is_parsed": given is not None,
        "is_right": is_right,
    }


def _stops(example: Example, stop: Sequence[str]) -> list[str]:
    return [text for text in stop if not any(text in o.strip() for o in example.options)]


def _prompts(
    questions: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    slack: int,
) -> tuple[list[Tokens], list[int], int]:
    """Return each prompt's tokens, how many may follow, and how many prompts were cut."""
    prefix = opening_ids(tokenizer)
    prompts = [example.content["prompt"] for example in questions]
    encoded = encode_pairs(prompts, [""] * len(prompts), tokenizer)
    asked: list[Tokens] = []
    limits: list[int] = []
    n_truncated = 0
    for example, (ids, _) in zip(questions, encoded, strict=True):
        options = option_tokens(example, tokenizer, max_length)
        limit = max(int(option.is_target.sum()) for option in options) + slack
        room = max_length - limit
        whole = [*prefix, *ids]
        if room < 1 or not whole:
            raise DataError(
                f"question {example.id} leaves no token to begin from",
                where=example.origin,
                why=f"its answer may take {limit} of {max_length} tokens"
                if whole
                else "its prompt is empty, and the tokenizer puts nothing before a text",
                do="raise `max_length`, or lower `slack`" if whole else "give it a prompt",
            )
        n_truncated += len(whole) > room
        input_ids = np.array(whole[-room:], dtype=np.int64)
        asked.append(Tokens(example.id, input_ids, np.zeros(len(input_ids), dtype=bool)))
        limits.append(limit)
    return asked, limits, n_truncated


class _Written(StoppingCriteria):
    """What each row of a batch has written so far, and whether it is done."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Sequence[int],
        stops: Sequence[Sequence[str]],
        ends: frozenset[int],
        width: int,
    ) -> None:
        self.words: dict[int, str] = {}
        self._tokenizer = tokenizer
        self._limits = limits
        self._stops = stops
        self._ends = ends
        self._width = width

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "n t"], scores: object, **kwargs: object
    ) -> Bool[Tensor, " n"]:
        for row, ids in enumerate(input_ids[:, self._width :].tolist()):
            if row not in self.words:
                self._read(row, ids)
        is_done = [row in self.words for row in range(len(input_ids))]
        return torch.tensor(is_done, device=input_ids.device)

    def _read(self, row: int, ids: list[int]) -> None:
        is_done = len(ids) == self._limits[row] or ids[-1] in self._ends
        text = cast(
            "str",
            self._tokenizer.decode(
                ids[:-1] if ids[-1] in self._ends else ids,
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            ),
        )
        places = [text.index(stop) for stop in self._stops[row] if stop in text]
        if is_done or places:
            self.words[row] = text[: min(places)] if places else text


class _Finite(LogitsProcessor):
    """Notes the rows whose next token cannot be told; changes nothing."""

    def __init__(self) -> None:
        self.is_bad: Tensor | None = None

    def __call__(
        self, input_ids: Int[Tensor, "n t"], scores: Float[Tensor, "n v"]
    ) -> Float[Tensor, "n v"]:
        # The maximum alone: NaN comes through it, and -inf at a single token is a model's right.
        is_bad = ~scores.amax(-1).isfinite()
        self.is_bad = is_bad if self.is_bad is None else self.is_bad | is_bad
        return scores


def _write(model: nn.Module, batch: Batch, written: _Written, n_new: int, pad_id: int) -> None:
    finite = _Finite()
    # peft passes transformers' method on, so no type knows of it.
    cast("Any", model).generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=n_new, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad_id
        ),
        stopping_criteria=StoppingCriteriaList([written]),
        logits_processor=LogitsProcessorList([finite]),
    )
    if finite.is_bad is not None and bool(finite.is_bad.any()):
        bad = [id for id, is_bad in zip(batch.ids, finite.is_bad.tolist(), strict=True) if is_bad]
        raise TrainingError(
            f"the next token of {len(bad)} held-out questions cannot be told",
            where="example " + ", ".join(bad[:5]),
            why="the model's logits are not numbers: its weights overflowed",
            do="lower `tune.learning_rate`, or set `model.dtype=float32`",
        )


@contextmanager
def _asking(model: nn.Module) -> Generator[frozenset[int]]:
    """Turn dropout off and set the model's own habits of decoding aside; yield its end tokens.

    transformers fills whatever a call leaves open from the model's generation config: sampling,
    penalties, forbidden and forced tokens.
    """
    noisy = [module for module in model.modules() if module.training]
    habits = [
        (module, config)
        for module in model.modules()
        if isinstance(config := vars(module).get("generation_config"), GenerationConfig)
    ]
    ends: set[int] = set()
    for module, config in habits:
        found = config.eos_token_id
        ends.update([found] if isinstance(found, int) else found or [])
        vars(module)["generation_config"] = GenerationConfig()
    model.eval()
    try:
        yield frozenset(ends)
    finally:
        for module, config in habits:
            vars(module)["generation_config"] = config
        for module in noisy:
            module.training = True
