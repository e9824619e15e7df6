"""Which tokens of an example ask for a direction: the inner product <g_n, u>, token by token.

    u = V U_r U_r^T 1/M                       the mean target gradient inside the targets' space
    loss      <grad nats_k, u> / T_n          of target token k of T_n, by one forward-mode pass
    position  sum over modules D_n[t]^T u X_n[t]        at token t, by one ordinary backward pass

Both add up to <g_n, u>. The first says whose loss asks for u; the second at which tokens the
modules ran that answer it, tokens of the prompt included. With u a gradient of the target's loss,
a token above 0 lowers that loss when it is trained on: in nats per unit of an SGD learning rate.

Source  Ours, for what GIST (arXiv 2602.18584) leaves to whole examples: u = P mean c_j.
Cost    Direction: one gradient pass over the targets, with their gradients on disk. Scores: two to
  three forward passes of the examples (loss), or one gradient pass (position).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectune.data import Batch, Tokens, collate, length_sorted_batches
from selectune.errors import ConfigError, CoverageError
from selectune.gradients.capture import trainable
from selectune.gradients.directions import Directions
from selectune.gradients.engine import GradientEngine, dropout_off, precision_of
from selectune.gradients.kernels import Rows, by_position
from selectune.gradients.loss import token_nll
from selectune.gradients.subspace import Spectrum, rank_of, spectrum


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """One direction among all trainable numbers.

    Args:
        parts: its part of each parameter, by name.
        rank: directions of the target space that it was taken in.
        norm: its length.
    """

    parts: Mapping[str, Float[Tensor, "..."]]
    rank: int
    norm: float


def mean_weights(directions: Spectrum, rank: int) -> Float[np.ndarray, " m"]:
    """Return w = U_r U_r^T 1/M: V w is the mean target's part inside the first r directions."""
    U = directions.U[:, :rank]
    return U @ U.mean(0)


def task_direction(
    engine: GradientEngine,
    targets: Sequence[Tokens],
    *,
    rule: int | str,
    seed: int,
    file: Path,
    pad_id: int,
    token_budget: int,
    advance: Callable[[int], None],
) -> Direction:
    """Return the direction in which the targets' mean loss changes, inside their own space.

    Args:
        engine: at the checkpoint where gradients are taken.
        targets: of one task.
        rule: how many directions the space has, as `rank_of` takes it.
        seed: of the halves of rank "split".
        file: for the target gradients, fp32; it is there only while this runs.
        pad_id: token id for padding.
        token_budget: padded tokens in one batch.
        advance: called with the number of targets just done.

    Raises:
        SelectionError: the target gradients are zero or not finite.
        StorageError: the disk cannot take them.
    """
    sizes = {name: p.numel() for name, p in engine.parameters.items()}
    device = next(iter(engine.parameters.values())).device
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    try:
        with Directions(file, sizes, len(targets), device) as V:
            first, ids = 0, list[str]()
            lengths = [len(t.input_ids) for t in targets]
            for rows in length_sorted_batches(lengths, token_budget=token_budget):
                batch = collate([targets[k] for k in rows], pad_id=pad_id, device=device)

                def keep(name: str, rows: Rows, first: int = first) -> None:
                    V.write(name, first, rows.dense())

                engine.run(batch, keep)
                first += len(rows)
                ids += batch.ids
                advance(len(rows))
            gram = V.gram().numpy()
            found = spectrum(gram)
            rank = rank_of(rule, found, gram, ids, seed=seed)
            w = mean_weights(found, rank)
            weights = torch.as_tensor(w, dtype=torch.float32, device=device)
            parts = {n: (weights @ V.read(n)).view_as(p) for n, p in engine.parameters.items()}
    finally:
        file.unlink(missing_ok=True)
    return Direction(parts, rank, float(np.sqrt(w @ gram @ w)))


class _TokenLosses(nn.Module):
    """The loss of each target token as a module, so that parameters can be put in its place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]:
        return token_nll(self.model, batch)


@cache
def _hear_of_script() -> None:
    # torch 2.13 makes ready for its first dual by a function that it has itself deprecated.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def loss_scores(
    model: nn.Module, batch: Batch, direction: Mapping[str, Tensor], precision: str
) -> Float[Tensor, "n k"]:
    """Return how far each target token's loss asks for a direction; a row adds up to <g_n, u>.

    Args:
        model: in any mode, and left in it; dropout is off.
        batch: of examples.
        direction: one tensor per trainable parameter.
        precision: "float32", or the autocast of the pass.

    Returns:
        In the order of an example's target tokens; 0 behind the last.

    Raises:
        ConfigError: the model uses an operation without a forward-mode derivative.
    """
    _hear_of_script()
    losses = _TokenLosses(model)
    with (
        dropout_off(model),
        torch.no_grad(),
        forward_ad.dual_level(),
        # The fused kernels of attention have no forward-mode derivative.
        sdpa_kernel(SDPBackend.MATH),
        precision_of(batch.input_ids.device, precision),
    ):
        moved = {
            f"model.{name}": forward_ad.make_dual(p.detach(), direction[name].to(p))
            for name, p in trainable(model).items()
        }
        try:
            nats, is_real = torch.func.functional_call(losses, moved, (batch,))
        except (NotImplementedError, RuntimeError) as error:
            # What torch says of an operator, and of a function of somebody's own.
            if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
                raise
            raise ConfigError(
                "this model has no forward-mode derivative",
                where=type(model).__name__,
                why=str(error).split("\n", 1)[0],
                do="use model.attention=eager, or `selectune tokens --form position`",
            ) from error
        change: Any = forward_ad.unpack_dual(nats).tangent
    if change is None:
        return torch.zeros_like(nats)
    return change / is_real.sum(1, keepdim=True)


def position_scores(
    engine: GradientEngine, batch: Batch, direction: Mapping[str, Tensor]
) -> Float[Tensor, "n t"]:
    """Return how far each token's rows, over all modules, answer a direction; sums are <g_n, u>.

    Args:
        engine: of the model.
        batch: of examples, padded on the right.
        direction: one tensor per trainable parameter.

    Raises:
        CoverageError: a parameter's rows are not one per token, as those of a bias or a norm.
    """
    n, t = batch.input_ids.shape
    found = torch.zeros(n, t, device=batch.input_ids.device)
    unsplit: list[str] = []

    def add(name: str, rows: Rows) -> None:
        nonlocal found
        part = by_position(rows, direction[name], t)
        if part is None:
            unsplit.append(name)
        else:
            found = found + part

    engine.run(batch, add)
    if unsplit:
        raise CoverageError(
            f"{len(unsplit)} parameters cannot be split by position",
            where=unsplit[0],
            why="biases, norms and what no kernel covers are summed over tokens",
            do="use --form loss, or an adapter of kind lora",
        )
    return found
