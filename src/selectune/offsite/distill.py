"""Training of an emulator's middle on generic text: distilled from the original, or healed.

    loss = LM + weight * KD        KD = mean(((h_T - h_S) / rms(h_T))^2)

`h_T` and `h_S` are what original and emulator hand on where a run of middle layers ends. Without a
teacher only LM is left: what anybody with an emulator and text can do to it.

Paper  Xiao et al., Offsite-Tuning, arXiv 2302.04870: weight 30, AdamW at 1e-4 with a cosine. Ours:
       several runs of middle layers, where adapters stand between them, weigh the same.
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune.data import Batch, Tokens, collate
from selectune.errors import DataError, TrainingError
from selectune.gradients.engine import dropout_off, precision_of
from selectune.gradients.loss import target_nll
from selectune.models import blocks
from selectune.offsite.layout import Layout
from selectune.offsite.modes import training_only

# Index of a block in the original -> of the block in the emulator that hands on the same state.
Ends = Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MiddleTraining:
    """How a middle is trained.

    Attributes:
        steps: of the optimizer.
        learning_rate: peak.
        warmup: share of the steps in which the learning rate rises; then it falls as a cosine.
        batch_size: examples in one step.
        distillation: weight of KD; of no account without a teacher.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup: float = 0.05
    batch_size: int = 8
    distillation: float = 30.0


def middle_ends(layout: Layout, places: Mapping[int, int]) -> dict[int, int]:
    """Return where each run of middle layers ends: in the original -> in the emulator.

    Args:
        layout: of the original.
        places: original index -> index in the emulator, of the layers that it has.
    """
    middle = set(layout.middle)
    ends: dict[int, int] = {}
    for j in layout.middle:
        # A run may have lost its last layers: the one before them hands the state on.
        left = [i for i in range(j + 1) if i in places]
        if j + 1 not in middle and left:
            ends[j] = places[left[-1]]
    return ends


def train_middle(
    emulator: nn.Module,
    items: Sequence[Tokens],
    how: MiddleTraining,
    *,
    adapters: Iterable[int],
    teacher: nn.Module | None = None,
    ends: Ends | None = None,
    pad_id: int,
    precision: str = "float32",
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[float]:
    """Train every block of an emulator but its adapter layers, in place.

    The weights keep their type; the optimizer works on fp32 copies of them.

    Args:
        emulator: a causal LM.
        items: blocks of generic text, read in an order drawn anew for each pass over them.
        how: steps, learning rate and so on.
        adapters: indices in the emulator of the layers that stay as they are.
        teacher: the original, for distillation.
        ends: where teacher and emulator shall agree; see `middle_ends`.
        pad_id: token id at padding.
        precision: autocast of the forward pass.
        seed: of the order.
        advance: called with the number of steps just done.

    Returns:
        The loss of every step, LM and KD together.

    Raises:
        DataError: there is no text.
        TrainingError: the emulator has no middle left to train, or a loss is not a number.
    """
    if not items:
        raise DataError("there is no text to train the emulator's middle on", where="calibration")
    fixed = set(adapters)
    middle = [b for i, b in enumerate(blocks(emulator)) if i not in fixed]
    trained = list(dict.fromkeys(p for block in middle for p in block.parameters()))
    if not trained:
        raise TrainingError(
            "the emulator has no middle left to train",
            where=type(emulator).__name__,
            why="every layer that it has is an adapter's",
            do="keep more of the middle, or use a compressor that trains nothing",
        )
    pairs = dict(ends or {}) if teacher is not None else {}
    device = trained[0].device
    losses: list[float] = []
    masters = [nn.Parameter(p.detach().float().clone()) for p in trained]
    with dropout_off(emulator), training_only(emulator, trained):
        optimizer = torch.optim.AdamW(masters, lr=how.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, how))
        for rows in _order(len(items), how.batch_size, how.steps, seed):
            batch = collate([items[k] for k in rows], pad_id=pad_id, device=device)
            with precision_of(device, precision):
                wanted = {} if teacher is None else _states(teacher, pairs.keys(), batch)
                with _watching(emulator, pairs.values()) as seen:
                    nats, n_tokens = target_nll(emulator, batch)
            loss = nats.sum() / n_tokens.sum()
            if pairs:
                is_text = batch.attention_mask.bool()
                parts = [_distance(wanted[j][is_text], seen[i][is_text]) for j, i in pairs.items()]
                loss = loss + how.distillation * torch.stack(parts).mean()
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"the loss of step {len(losses) + 1} is not a number",
                    where="training of the emulator's middle",
                    why="the forward pass overflowed, or a weight already holds NaN",
                    do="lower the learning rate, or use float32",
                )
            found: Any = torch.autograd.grad(loss, trained, allow_unused=True)
            gradients: tuple[Tensor | None, ...] = found
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.float()
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for p, master in zip(trained, masters, strict=True):
                    p.copy_(master)
            losses.append(float(loss.detach()))
            if advance is not None:
                advance(1)
    return losses


def _distance(teacher: Tensor, student: Tensor) -> Tensor:
    teacher, student = teacher.float(), student.float()
    return ((teacher - student) / teacher.square().mean().sqrt()).square().mean()


def _rate(step: int, how: MiddleTraining) -> float:
    rising = max(1, round(how.warmup * how.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, how.steps - rising)))


def _order(n: int, batch_size: int, steps: int, seed: int) -> Generator[list[int]]:
    """Yield the rows of each step: every pass over them in an order of its own."""
    draw = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < min(batch_size, n):
            waiting += torch.randperm(n, generator=draw).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


@contextmanager
def _watching(model: nn.Module, indices: Iterable[int]) -> Generator[dict[int, Tensor]]:
    """Collect what some blocks hand on in the forward passes of the context."""
    every = blocks(model)
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: object, output: Any) -> None:  # noqa: ANN401
            seen[index] = output if isinstance(output, Tensor) else output[0]

        return after

    handles = [every[index].register_forward_hook(keep(index)) for index in set(indices)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _states(model: nn.Module, indices: Iterable[int], batch: Batch) -> dict[int, Tensor]:
    """Return what some blocks of the teacher hand on; its head is not asked."""
    with dropout_off(model), torch.no_grad(), _watching(model, indices) as seen:
        cast("Any", model).base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return seen
