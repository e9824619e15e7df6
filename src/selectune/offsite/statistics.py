"""What calibration text says about the matrices of a few middle layers, streamed.

    A = mean x x^T  [i, i]      S = mean s s^T  [o, o]      G = mean s x^T  [o, i]

The means are over all positions t that are no padding. x is what the matrix reads, with a constant
1 behind it where there is a bias. s_t = T_n dl_n/dy_t: the gradient of example n's *summed* loss,
so that tokens of long examples count as much as those of short ones.

With sampled labels (the Fisher matrix itself), s of S is the gradient at tokens that the model
draws, in a second forward and backward pass; A and G stay those of the text.

One pass serves a group of layers. Nothing below the lowest of them is recorded by autograd and no
gradient of a parameter is formed; each module's rows are added up and freed as backward passes by.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectune.data import Batch
from selectune.errors import CoverageError, DataError, TrainingError
from selectune.gradients.capture import tap
from selectune.gradients.engine import dropout_off, precision_of
from selectune.gradients.kernels import Call
from selectune.gradients.loss import target_nll
from selectune.models import blocks
from selectune.offsite.anatomy import weight_of
from selectune.offsite.moments import Site, any_bias, sites_of
from selectune.registry import CompressorNeed

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class MatrixStatistics:
    """The statistics of one matrix, in fp32 (fp64 for an fp64 model), where the model is.

    Attributes:
        A: second moments of the inputs; with a bias, the constant 1 stands last.
        S: second moments of the output gradients; None where only inputs were asked for.
        G: mean gradient of weight and bias, alike.
    """

    A: Float[Tensor, "i i"]
    S: Float[Tensor, "o o"] | None = None
    G: Float[Tensor, "o i"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerStatistics:
    """The statistics of one layer.

    Attributes:
        n_positions: that the means are over.
        matrices: by `Matrix.key` for attention and by module name for the MLP; q, k, v share one A,
            up and gate another.
    """

    n_positions: int
    matrices: Mapping[str, MatrixStatistics]


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[int],
    *,
    needs: frozenset[CompressorNeed],
    precision: str = "float32",
    seed: int = 0,
    advance: Advance | None = None,
) -> dict[int, LayerStatistics]:
    """Return the statistics of a group of layers from one pass over calibration text.

    Flags, modes and gradients of the model are left as they were.

    Args:
        model: the original.
        batches: of calibration text, padded on either side.
        layers: their indices; what they need in memory is `statistics_bytes` each.
        needs: "gradients" for A, S and G; "inputs" for A from forward passes alone; without either
            there is no pass, and no statistics. "sampled_labels" beside "gradients" for an S at
            tokens that the model draws.
        precision: autocast of the forward pass.
        seed: of these draws.
        advance: called with the number of examples just done.

    Raises:
        SelectionError: a layer is written in no known way.
        DataError: there is no text, or an example without a target token.
        CoverageError: a matrix did not see every position once.
        TrainingError: a statistic is not a number.
    """
    if not needs & {"gradients", "inputs"}:
        return {}
    every = blocks(model)
    is_backward = "gradients" in needs
    sites = {j: sites_of(j, every[j]) for j in layers}
    watched = [s for own in sites.values() for s in own if is_backward or s.reads_first]
    # Several sums from one pass, or one pass for each kind of label.
    sums = ("AG", "S") if "sampled_labels" in needs else ("ASG",)
    n_positions = 0
    with _watching(model, watched, precision, is_backward=is_backward) as run:
        for batch in batches:
            n_positions += run(batch, sums[0], None)
            for more in sums[1:]:
                run(batch, more, uniform_draws(batch, seed))
            if advance is not None:
                advance(len(batch.ids))
    if not n_positions:
        raise DataError(
            "there is no calibration text",
            where="calibration",
            why="the compressor reads how text passes through the layers",
            do="give some, or use a compressor without data such as svd_magnitude",
        )
    return {j: _finished(own, n_positions, is_backward) for j, own in sites.items()}


def statistics_bytes(block: nn.Module, needs: frozenset[CompressorNeed]) -> int:
    """Return what the statistics of one layer take in memory, in fp32, if it is like this block."""
    if not needs & {"gradients", "inputs"}:
        return 0
    is_backward = "gradients" in needs
    sites = sites_of(0, block)
    numbers = 0
    for site in sites:
        o, i = weight_of(site.module).shape
        if site.reads_first:
            numbers += (i + int(any_bias(sites, site.input_of))) ** 2
        for rows in site.parts.values() if is_backward else ():
            part = len(range(*rows.indices(o)))
            numbers += part * (part + i + int(site.has_bias))
    return 4 * numbers


@contextmanager
def _watching(
    model: nn.Module, sites: list[Site], precision: str, *, is_backward: bool
) -> Generator[Callable[[Batch, str, Tensor | None], int]]:
    """Yield a function that runs a batch, adds it up at the sites and counts its positions.

    It takes the batch, what it is added to, and the draws of labels, None for those of the text.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    device = next(iter(flags)).device
    anchor = torch.zeros((), requires_grad=True, device=device)
    is_token: Bool[Tensor, " nt"] = torch.zeros(0, dtype=torch.bool)
    sums = ""

    def at_tokens(x: Tensor) -> Tensor:
        # OPT calls its MLP on [n * t, .]; the tokens stand in the batch's order there.
        return x.detach().reshape(-1, x.shape[-1])[is_token]

    def hook(site: Site) -> Callable[..., Tensor | None]:
        def after_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if is_backward:
                return tap(module, args, kwargs, output, receive, anchor=anchor)
            with torch.autocast(device.type, enabled=False):
                site.add(at_tokens(args[0] if args else next(iter(kwargs.values()))), None, sums)
            return None

        def receive(call: Call) -> None:
            site.add(at_tokens(call.input), at_tokens(call.D), sums)

        return after_forward

    def run(batch: Batch, of: str, draws: Tensor | None) -> int:
        nonlocal is_token, sums
        batch, sums = batch.to(device), of
        is_token = tokens_at_left(batch).flatten()
        with torch.set_grad_enabled(is_backward):
            with precision_of(device, precision):
                nats, _ = target_nll(model, batch, None if draws is None else draws.to(device))
            if is_backward:
                nats.sum().backward()
                anchor.grad = None
        return int(is_token.sum())

    with ExitStack() as stack:
        stack.enter_context(dropout_off(model))
        try:
            for p in flags:  # so that autograd records nothing below the lowest tap
                p.requires_grad_(False)
            for site in sites:
                handle = site.module.register_forward_hook(hook(site), with_kwargs=True)
                stack.callback(handle.remove)
            yield run
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)


def uniform_draws(batch: Batch, seed: int) -> Float[Tensor, "n t"]:
    """Return uniform numbers for the tokens of each example, the same in whatever batch it stands.

    Args:
        batch: of examples with ids.
        seed: of all draws.
    """
    rows: list[Tensor] = []
    for example_id in batch.ids:
        digest = hashlib.sha256(f"labels:{seed}:{example_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        rows.append(torch.rand(batch.input_ids.shape[1], generator=generator))
    return torch.stack(rows)


def tokens_at_left(batch: Batch) -> Bool[Tensor, "n t"]:
    """Tell where tokens stand inside `target_nll`, which moves every example to the left."""
    places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return places < batch.attention_mask.sum(1)[:, None]


def _finished(sites: list[Site], n_positions: int, is_backward: bool) -> LayerStatistics:
    for site in sites:
        if site.n_seen != n_positions and (is_backward or site.reads_first):
            raise CoverageError(
                f"{site.name} of layer {site.layer} saw {site.n_seen} of {n_positions} positions",
                where=site.name,
                why="statistics are means over all positions, each counted once",
                do="use a model whose layers run once, on every token",
            )
    inputs: dict[str, Tensor] = {}
    for site in (s for s in sites if s.reads_first):
        inputs[site.name] = site.inputs(has_constant=any_bias(sites, site.name))
    found: dict[str, MatrixStatistics] = {}
    for site in sites:
        A = inputs[site.input_of]
        if not site.has_bias and any_bias(sites, site.input_of):
            A = A[:-1, :-1]
        for key in site.parts:
            S, G = site.gradients(key) if is_backward else (None, None)
            found[key] = MatrixStatistics(A, S, G)
            if not all(bool(m.isfinite().all()) for m in (A, S, G) if m is not None):
                raise TrainingError(
                    f"the statistics of {key} in layer {site.layer} are not numbers",
                    where=key,
                    why="the pass overflowed, or the weights already hold NaN",
                    do="use precision=float32, and check the weights",
                )
    return LayerStatistics(n_positions, found)
