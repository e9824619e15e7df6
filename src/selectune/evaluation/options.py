"""Held-out answer loss and option accuracy, from one pass.

Questions are asked in cloze form: the options are not shown, each is appended to the prompt and the
most likely one is the model's choice. Likelihood is ranked in two ways, as lm-eval does: raw is the
sum over the option's tokens (lm-eval's `acc`); length-normalised divides that by the number of
characters of the option's text without its leading space (lm-eval's `acc_norm`: `len(choice)`, in
characters, neither bytes nor tokens). Ties go to the lowest index. No end-of-text token is scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.data.collate import collate, length_sorted_batches
from selectune.data.examples import Example
from selectune.data.tokens import Tokens, option_tokens, tokenize
from selectune.errors import DataError, TrainingError
from selectune.gradients.loss import target_nll

# pyarrow ships no types: it is touched by the lines that carry an ignore, and nowhere else.
COLUMNS = {
    "id": "string",
    "source": "string",
    "answer_loss": "double",
    "n_target_tokens": "int64",
    "correct_raw": "bool",
    "correct_norm": "bool",
    "chosen": "int64",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one model answered, example by example.

    Args:
        table: columns of `COLUMNS`, in the order of the examples. `answer_loss` is in nats per
            token of the right answer; `chosen` is the length-normalised choice. The last three
            are null where an example has no options.
        left_out: ids of examples that truncation left without a target token.
    """

    table: pa.Table  # pyright: ignore[reportUnknownMemberType]
    left_out: tuple[str, ...] = ()

    def column(self, name: str) -> list[Any]:
        """Return one column of the table, None where it is null."""
        return self.table[name].to_pylist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    @property
    def n(self) -> int:
        """Examples answered."""
        return len(self.column("id"))

    @property
    def answer_loss(self) -> float:
        """Mean over examples of the right answer's nats per token."""
        return float(np.mean(self.column("answer_loss")))

    @property
    def accuracy(self) -> float | None:
        """Share of questions answered right by length-normalised likelihood; None without any."""
        return self._share("correct_norm")

    @property
    def accuracy_raw(self) -> float | None:
        """Share of questions answered right by raw likelihood; None without any."""
        return self._share("correct_raw")

    def _share(self, column: str) -> float | None:
        known = [value for value in self.column(column) if value is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {
            "n": self.n,
            "answer_loss": self.answer_loss,
            "accuracy": self.accuracy,
            "accuracy_raw": self.accuracy_raw,
            "left_out": list(self.left_out),
        }


def together(by_task: Mapping[str, Evaluation]) -> Evaluation:
    """Return the answers to all tasks as one table; ids stay apart by task."""
    tables: list[Any] = []
    for task, found in by_task.items():
        table: Any = found.table  # pyright: ignore[reportUnknownMemberType]
        ids = [f"{task}/{i}" for i in found.column("id")]
        column: Any = pa.array(ids, pa.string())  # pyright: ignore[reportUnknownMemberType]
        tables.append(table.set_column(table.schema.get_field_index("id"), "id", column))
    left_out = tuple(i for found in by_task.values() for i in found.left_out)
    return Evaluation(pa.concat_tables(tables), left_out)


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    pad_id: int,
    device: str = "cpu",
    precision: str = "float32",
    token_budget: int = 4096,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask a model every example, and rank its options where it has some.

    Examples without options get the loss of their targets (the completion; assistant turns; the
    whole text), less the end-of-text token that training appends; the token that ends a turn is
    the chat template's, and stays. Neither the order of the examples nor the size of the batches
    changes the answers beyond rounding.

    Args:
        model: a causal LM on `device`; dropout is off meanwhile, and then as it was.
        examples: held-out examples.
        tokenizer: the model's.
        max_length: tokens of prompt and answer together.
        pad_id: id of the padding token.
        device: where the batches go.
        precision: bfloat16 runs the model under autocast; losses are summed in fp32 either way.
        token_budget: padded tokens in one batch.
        advance: called with the number of sequences just scored.

    Returns:
        One row per example, in the given order.

    Raises:
        DataError: no examples, or one that cannot be scored.
        TrainingError: the model gives a loss that is not a number.
    """
    if not examples:
        raise DataError(
            "there is nothing to evaluate",
            why="no held-out examples were given",
            do="set `data.heldout`",
        )
    asked, left_out = _sequences(examples, tokenizer, max_length)
    nll, n_tokens = _score(
        model,
        [tokens for sequences in asked.values() for tokens in sequences],
        pad_id=pad_id,
        device=device,
        precision=precision,
        token_budget=token_budget,
        advance=advance,
    )
    rows: list[dict[str, Any]] = []
    start = 0
    for example in examples:
        if example.id not in asked:
            continue
        stop = start + len(asked[example.id])
        rows.append(_row(example, nll[start:stop], n_tokens[start:stop]))
        start = stop
    schema = pa.schema(list(COLUMNS.items()))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    table = pa.Table.from_pylist(rows, schema=schema)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return Evaluation(table, left_out)  # pyright: ignore[reportUnknownArgumentType]


def check_questions(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Refuse what `evaluate` would, before anything is trained.

    Raises:
        DataError: an example cannot be scored.
    """
    _sequences(examples, tokenizer, max_length)


def _row(example: Example, nll: np.ndarray, n_tokens: np.ndarray) -> dict[str, Any]:
    right = example.answer if example.options else 0
    row: dict[str, Any] = {
        "id": example.id,
        "source": example.source,
        "answer_loss": float(nll[right] / n_tokens[right]),
        "n_target_tokens": int(n_tokens[right]),
    }
    if example.options:
        n_characters = np.array([len(option.removeprefix(" ")) for option in example.options])
        chosen = int(np.argmin(nll / n_characters))
        row |= {
            "correct_raw": int(np.argmin(nll)) == right,
            "correct_norm": chosen == right,
            "chosen": chosen,
        }
    return row


def _sequences(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Tokens]], tuple[str, ...]]:
    plain = [example for example in examples if not example.options]
    tokenized = tokenize(plain, tokenizer, max_length=max_length, append_eos=False)
    found = {tokens.id: tokens for tokens in tokenized}
    asked: dict[str, list[Tokens]] = {}
    for example in examples:
        if example.options:
            _refuse_odd(example)
            asked[example.id] = option_tokens(example, tokenizer, max_length)
        elif example.id in found:
            asked[example.id] = [found[example.id]]
    return asked, tokenized.empty_ids


def _refuse_odd(example: Example) -> None:
    if not 0 <= example.answer < len(example.options):
        raise DataError(
            f"question {example.id} does not say which of its options is right",
            where=example.origin,
            do='let "completion" equal one of "options", or give "answer" as its index from 0',
        )
    if not all(option.removeprefix(" ") for option in example.options):
        raise DataError(
            f"question {example.id} has an empty option",
            where=example.origin,
            why="its likelihood per character is undefined",
            do="take the empty option out",
        )


def _score(
    model: nn.Module,
    items: list[Tokens],
    *,
    pad_id: int,
    device: str,
    precision: str,
    token_budget: int,
    advance: Callable[[int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    # Equal sequences are scored once: in different batches their sums would differ by rounding,
    # and a tie between two equal options would then not go to the lower index.
    keys = [tokens.input_ids.tobytes() + tokens.is_target.tobytes() for tokens in items]
    first: dict[bytes, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    distinct = list(first.values())
    nll, n_tokens = np.zeros(len(items)), np.zeros(len(items), dtype=np.int64)
    lengths = [len(items[index].input_ids) for index in distinct]
    noisy = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for members in length_sorted_batches(lengths, token_budget=token_budget):
            rows = [distinct[member] for member in members]
            batch = collate([items[row] for row in rows], pad_id=pad_id, device=device)
            # Entered anew for each batch: autocast keeps its casts of weights until it is left.
            autocast = torch.autocast(
                torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"
            )
            with torch.inference_mode(), autocast:
                sums, counts = target_nll(model, batch)
            nll[rows], n_tokens[rows] = sums.double().cpu().numpy(), counts.cpu().numpy()
            _refuse_nan(nll, rows, items)
            if advance is not None:
                advance(len(rows))
    finally:
        for module in noisy:
            module.training = True
    source = [first[key] for key in keys]
    return nll[source], n_tokens[source]


def _refuse_nan(nll: np.ndarray, rows: list[int], items: list[Tokens]) -> None:
    bad = [items[row].id for row in rows if not np.isfinite(nll[row])]
    if bad:
        raise TrainingError(
            f"the loss of {len(bad)} held-out sequences is not a number",
            where="example " + ", ".join(bad[:5]),
            why="the model's weights overflowed, or were not a number to begin with",
            do="lower `tune.learning_rate`, or set `model.dtype=float32`",
        )
