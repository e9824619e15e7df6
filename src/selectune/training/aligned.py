"""Examples per layer while a model trains: target gradients, alignments, picks.

Per optimizer step one pass over a few target examples gives the target gradient of every layer.
Per forward pass the gates (`training.gate`) ask, layer by layer, how the examples of the batch
align with it, and a row picker says which of them the layer learns from.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.data import Batch
from selectune.data.collate import NO_LOSS
from selectune.errors import ConfigError, CoverageError, DataError
from selectune.gradients.capture import trainable
from selectune.gradients.engine import GradientEngine, dropout_off
from selectune.gradients.kernels import DenseRows, Rows, gram, ones
from selectune.training.forward_pass import (
    ForwardPass,
    Scored,
    content_keys,
    draw_noise,
    read_batch,
    with_answers,
)
from selectune.training.gate import Gates
from selectune.training.layers import Layer, trainable_layers
from selectune.training.method import (
    BatchSource,
    Scene,
    Session,
    Weighting,
    refuse_missing,
    refuse_other_state,
)
from selectune.training.pick_facts import Seen, pick_facts
from selectune.training.picks import Aggregate, Alignments, Picker, factors, wanted
from selectune.training.ranks import Exchange, rank
from selectune.training.target_gradient import TargetGradient
from selectune.training.weighting import detect

Form = Literal["separate", "two_pass", "concat"]
_STREAM = 2  # of the seed; 1 draws target examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligning:
    """How examples are picked for layers.

    Attributes:
        keep: share of each batch, or a number of examples.
        pick: says which examples one layer learns from.
        needs: what `pick` reads: "score", "norm2", "gram"; nothing else is computed.
        score: inner product or cosine with the target gradient.
        is_shared: one pick for all layers, from scores summed over them.
        is_same_noise: every layer draws with the same noise.
        granularity: what picks: a decoder block, or each module by itself.
        target_batch: target examples per pass.
        refresh_every: optimizer steps between target passes.
        momentum: share of the old target gradient that a new one keeps.
        temperature: of the softmax.
        aggregate: see `picks.factors`.
        form: see `methods.data_layer.gast`.
        pick_scope: whether processes pick from their own examples or from all.
    """

    keep: float | int
    pick: Picker
    needs: frozenset[str]
    score: Literal["dot", "cosine"]
    is_shared: bool
    is_same_noise: bool
    granularity: Literal["layer", "module"]
    target_batch: int
    refresh_every: int
    momentum: float
    temperature: float | int
    aggregate: Aggregate
    form: Form
    pick_scope: Literal["local", "global"]


_ALL = "all layers"  # the picking unit where all layers share one pick


class AlignedSession:
    """Picks examples for the layers of one model while it trains.

    Args:
        scene: the model and what is around it.
        how: what to pick, and how.
        source: of target examples.
        sampler: chooses the active layers; the others have no gate.
        about: the options, as they stand in a saved state.
    """

    def __init__(
        self,
        scene: Scene,
        how: Aligning,
        source: BatchSource,
        *,
        sampler: Session | None,
        about: Mapping[str, Any],
    ) -> None:
        self._scene, self._how, self._sampler, self._about = scene, how, sampler, dict(about)
        self._layers = trainable_layers(scene.model)
        refuse_missing(scene, {n: p for layer in self._layers for n, p in layer.parameters.items()})
        self._unit = {
            n: self._unit_of(layer, n) for layer in self._layers for n in layer.parameters
        }
        self._units = {unit: k for k, unit in enumerate(dict.fromkeys(self._unit.values()))}
        if how.form == "concat" and (outside := trainable(scene.model).keys() - self._unit.keys()):
            raise ConfigError(
                f"{len(outside)} parameters outside of the layers would learn from the targets",
                where=", ".join(sorted(outside)[:3]),
                why="with form=concat target rows are part of the batch, and no layer leaves "
                "them out there",
                do="freeze these parameters, or set form=separate",
            )
        with dropout_off(scene.model):
            self._engine = GradientEngine(
                scene.model, precision=scene.precision, only=self._unit.keys()
            )
        self.target = TargetGradient(
            self._engine,
            self._layers,
            source,
            size=how.target_batch,
            momentum=how.momentum,
            seed=scene.seed,
            apart=self._apart,
        )
        self._weighting: Weighting | None = scene.weighting
        self._exchange = Exchange() if how.pick_scope == "global" else None
        self._now: ForwardPass | None = None
        self._expected: tuple[Tensor, tuple[str, ...]] | None = None
        self._is_apart = False
        self._is_checked = False
        self._step = self._n_forwards = 0
        self._learning_rate = 0.0
        self._seen: dict[int, Seen] = {}
        self._ids: list[str] = []
        self._cosines: list[float | None] | None = None
        self._gates = Gates(self._layers, current=self._current, deliver=self._deliver)
        self._arrival = scene.model.register_forward_pre_hook(self._arrive, with_kwargs=True)

    @property
    def peak_rows(self) -> int:
        """The most elements of rows and gradients per example that were held at once."""
        return self._gates.peak_rows

    def begin_step(self, step: int) -> None:
        """Choose the layers, and take the target gradient where it is due."""
        if self._sampler is not None:
            self._sampler.begin_step(step)
        self._step, self._n_forwards, self._now = step, 0, None
        self._seen, self._ids, self._cosines = {}, [], None
        if self._scene.optimizer is not None:
            self._learning_rate = float(self._scene.optimizer.param_groups[0]["lr"])
        if self._how.form == "concat" or "score" not in self._how.needs:
            return
        if step % self._how.refresh_every == 0 or not self.target.gradients:
            # Kept for several steps it serves layers that are frozen in this one.
            keeps = self._how.refresh_every > 1 or self._how.momentum > 0
            with self._all_trainable(keeps):
                self._cosines = self.target.refresh(step)

    def expect(self, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Hear of the labels of the coming forward pass."""
        self._expected = labels, tuple(ids)

    def end_step(self) -> dict[str, Any]:
        """Return what the layers picked in the step just done."""
        facts: dict[str, Any] = {} if self._sampler is None else self._sampler.end_step()
        places = [layer.index for layer in self._layers]
        # A sampler knows the active layers better: one of them may have picked nothing.
        is_scored = "score" in self._how.needs
        facts = pick_facts(self._seen, places, is_scored=is_scored) | facts
        if self._step == 0:
            facts["layers"] = places
        if self._ids:
            facts["examples"] = list(self._ids)
        if self._cosines is not None and any(c is not None for c in self._cosines):
            facts["target_cosine"] = self._cosines
        return facts

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a resumed run needs: the kept target gradient, the sampler's state."""
        facts = {**self._identity(), "weighting": self._weighting}
        # Even where the next step takes it anew: that step says how far it turned.
        tensors = {f"target.{name}": t for name, t in self.target.gradients.items()}
        if self._sampler is not None:
            own, own_tensors = self._sampler.state()
            facts["sampler"] = own
            tensors |= {f"sampler.{name}": t for name, t in own_tensors.items()}
        return facts, tensors

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where another session stopped.

        Raises:
            IncompatibleRunError: it worked on other layers, or with other options.
        """
        refuse_other_state(facts, self._identity())
        self._weighting = facts["weighting"]
        device = next(self._scene.model.parameters()).device
        self.target.gradients = {
            name.removeprefix("target."): t.to(device)
            for name, t in tensors.items()
            if name.startswith("target.")
        }
        if self._sampler is not None:
            theirs = {
                name.removeprefix("sampler."): t
                for name, t in tensors.items()
                if name.startswith("sampler.")
            }
            self._sampler.load_state(facts["sampler"], theirs)

    def close(self) -> None:
        """Remove the gates and give the layers back as they came."""
        self._gates.close()
        self._arrival.remove()
        if self._sampler is not None:
            self._sampler.close()

    def _identity(self) -> dict[str, Any]:
        return {"layers": [x.name for x in self._layers], "options": self._about}

    def _unit_of(self, layer: Layer, name: str) -> str:
        if self._how.is_shared:
            return _ALL
        return layer.name if self._how.granularity == "layer" else name.rpartition(".")[0]

    @contextmanager
    def _apart(self, *, as_trained: bool = False) -> Generator[None]:
        """Run passes of our own: gates stand open; dropout is off unless they run as the loop's."""
        self._is_apart = True
        kind = next(self._scene.model.parameters()).device.type
        try:
            with ExitStack() as stack:
                if not as_trained:
                    stack.enter_context(dropout_off(self._scene.model))
                    # The loop may be inside of an autocast, which would round inner products.
                    stack.enter_context(torch.autocast(kind, enabled=False))
                yield
        finally:
            self._is_apart = False
            # A cast made in our pass must not outlive it in an autocast that the loop is inside of.
            torch.clear_autocast_cache()

    @contextmanager
    def _all_trainable(self, is_wanted: bool) -> Generator[None]:
        """Let every layer ask for gradients, whatever the sampler froze."""
        frozen = [
            p
            for layer in self._layers
            for p in layer.parameters.values()
            if is_wanted and not p.requires_grad
        ]
        for p in frozen:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def _current(self) -> tuple[ForwardPass, int] | None:
        if self._is_apart or self._now is None:
            return None
        return self._now, self._now.n

    def _arrive(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_apart:
            return
        self._now = None
        if not torch.is_grad_enabled():
            return
        expected, self._expected = self._expected, None
        batch = read_batch(args, kwargs, expected)
        self._now = now = self._forward(batch)
        batch = with_answers(batch)
        self._check_coverage(batch)
        self._n_forwards += 1
        self._ids += [id for id in batch.ids if id]
        if self._how.form == "two_pass":
            self._score_first(batch, now)
        if self._weighting is None and now.is_telling:
            self._replay(batch, now)

    def _check_coverage(self, batch: Batch) -> None:
        """Compare the rows of every parameter with autograd, once.

        Raises:
            CoverageError: a parameter of a layer has no rows that add up to its gradient.
        """
        if self._is_checked:
            return
        self._is_checked = True
        with torch.random.fork_rng(), self._apart(), self._all_trainable(True):
            self._engine.probe(batch)
        if lost := sorted(self._engine.looped):
            raise CoverageError(
                f"{len(lost)} parameters of the layers have no gradient per example",
                where=", ".join(lost[:3]),
                why="no gradient kernel covers their module, or they are used in another way too",
                do="freeze them, or train other modules",
            )

    def _forward(self, batch: Batch) -> ForwardPass:
        tokens = batch.input_ids
        n_tokens = (batch.labels[:, 1:] != NO_LOSS).sum(1)
        n = len(tokens)
        n_aside = self._how.target_batch if self._how.form == "concat" else 0
        if n_aside >= n:
            raise DataError(
                f"a batch of {n} holds no example beside {n_aside} targets",
                where="target_batch",
                do="append the target rows to the training rows of every batch",
            )
        is_valid = n_tokens > 0
        is_valid[n - n_aside :] = False
        # One look at the device: what is drawn here must not make the backward pass wait.
        keys = content_keys(tokens, batch.attention_mask)
        valid = is_valid.cpu()
        counts, start = [n], 0
        if self._exchange is not None:
            counts = self._exchange.counts(n, tokens.device)
            keys = self._exchange.rows(keys.to(tokens.device), counts).cpu()
            valid = self._exchange.rows(is_valid.to(torch.uint8), counts).cpu().bool()
            start = sum(counts[: rank()])
        n_valid = int(valid.sum())
        self._refuse_single(n_valid)
        own = 0 if self._exchange is not None else rank()
        seed = (self._scene.seed, self._step, self._n_forwards, own, _STREAM)
        noise = draw_noise(keys, len(self._units), seed, is_same=self._how.is_same_noise)
        return ForwardPass(
            n=n,
            n_aside=n_aside,
            n_tokens=n_tokens,
            is_valid=is_valid,
            noise=noise.to(tokens.device),
            k=_count(self._how.keep, n_valid),
            mine=slice(start, start + n),
            counts=counts,
        )

    def _refuse_single(self, n_valid: int) -> None:
        # The last batch of an epoch may be short; the first one is what the user asked for.
        if n_valid == 1 and self._step == 0 and self._how.keep != 1.0 and self._n_forwards == 0:
            raise ConfigError(
                "there is nothing to choose from in a batch of one example",
                where="keep",
                why="examples are picked within a forward pass",
                do="raise the batch size and lower the accumulation, or set keep=1.0",
            )

    def _score_first(self, batch: Batch, now: ForwardPass) -> None:
        """Two passes: measure the batch before the forward pass that trains on it."""

        def add(name: str, rows: Rows) -> None:
            unit = now.scored.setdefault(self._unit[name], Scored())
            self._add(unit, name, rows, ones(rows), now)

        with self._apart():
            self._engine.run(batch, add)

    def _replay(self, batch: Batch, now: ForwardPass) -> None:
        """Run the batch once more under each example's own mean loss, with the same dropout."""
        last = next(x for x in reversed(self._layers) if _is_active(x))
        found: list[tuple[float, str, Rows]] = []

        def keep(name: str, rows: Rows) -> None:
            if name in last.parameters:
                found.append((float(rows.norm2().sum()), name, DenseRows(rows.dense())))
                found[:] = [max(found, key=lambda x: x[0])]

        with torch.random.fork_rng(), self._apart(as_trained=True):
            self._engine.run(batch, keep)
        now.replay = {name: rows for _, name, rows in found}
        now.is_half = (
            self._scene.precision != "float32"
            or torch.is_autocast_enabled(batch.input_ids.device.type)
            or any(p.dtype.itemsize == 2 for p in self._scene.model.parameters())
        )

    def _add(
        self, unit: Scored, name: str, rows: Rows, weight: Float[Tensor, " n"], now: ForwardPass
    ) -> None:
        """Add one parameter's share of alignment, norm and Gram, as if every weight were 1."""
        inverse = torch.where(weight > 0, 1 / weight, 0.0)
        if "score" in self._how.needs:
            if now.n_aside:
                aside = torch.zeros_like(inverse)
                aside[now.n - now.n_aside :] = inverse[now.n - now.n_aside :] / now.n_aside
                target: Tensor | None = rows.combine(aside)
            else:
                target = self.target.gradients.get(name)
            score = 0.0 if target is None else rows.dot(target.to(inverse.dtype)) * inverse
            unit.score = unit.score + score
        if "norm2" in self._how.needs or self._how.score == "cosine":
            unit.norm2 = unit.norm2 + rows.norm2() * inverse.square()
        if "gram" in self._how.needs:
            unit.gram = unit.gram + gram(rows) * torch.outer(inverse, inverse)

    def _deliver(
        self, layer: Layer, now: ForwardPass, rows: Mapping[str, Rows]
    ) -> dict[str, Tensor]:
        """Return a layer's gradients from the examples that it picks."""
        if self._weighting is None:
            self._find_weighting(now, rows)
        like = ones(next(iter(rows.values())))
        has_target = now.n_tokens > 0
        # Undecided means that all examples are equally long, where both readings agree.
        by_token = self._weighting != "example"
        weight = now.n_tokens.to(like.dtype) if by_token else has_target.to(like.dtype)
        gradients: dict[str, Tensor] = {}
        by_unit: dict[str, list[str]] = {}
        for name in rows:
            by_unit.setdefault(self._unit[name], []).append(name)
        for unit, names in by_unit.items():
            scored = now.scored.get(unit)
            if scored is None:
                scored = Scored()
                for name in names:
                    self._add(scored, name, rows[name], weight, now)
            factor = self._pick(layer, unit, scored, weight, now)
            gradients |= {name: rows[name].combine(factor) for name in names}
        return gradients

    def _pick(
        self,
        layer: Layer,
        unit: str,
        scored: Scored,
        weight: Float[Tensor, " n"],
        now: ForwardPass,
    ) -> Float[Tensor, " n"]:
        score = torch.as_tensor(scored.score, dtype=weight.dtype, device=weight.device)
        score = score.expand(now.n)
        norm2 = scored.norm2 if isinstance(scored.norm2, Tensor) else None
        if self._how.score == "cosine" and norm2 is not None:
            score = score / norm2.sqrt().clamp_min(1e-30)
        is_valid, trained = now.is_valid, weight * now.is_valid
        if self._exchange is not None:
            together = torch.stack([score, trained, is_valid.to(score.dtype)], dim=1)
            score, trained, valid = self._exchange.rows(together, now.counts).unbind(1)
            is_valid = valid > 0
        alignments = Alignments(
            score,
            now.noise[self._units[unit]].to(score.dtype),
            is_valid,
            now.k,
            float(self._how.temperature),
            norm2 if self._exchange is None else None,
            scored.gram if isinstance(scored.gram, Tensor) else None,
            self._learning_rate,
        )
        picked = self._how.pick(alignments)
        factor = factors(picked, trained, self._how.aggregate, alignments)[now.mine]
        picked = picked[now.mine]
        seen = self._seen.setdefault(layer.index, Seen())
        if len(seen.picked) < self._n_forwards:
            mean, spread = alignments.moments()
            # A mean loss divides every gradient by the sum of weights; the first of two passes
            # has no such loss, and with targets in the batch theirs is divided too.
            size = torch.ones_like(mean)
            if self._how.score == "dot" and unit not in now.scored:
                size = weight.sum().square() if now.n_aside else trained.sum()
            z = alignments.standardised()
            seen.stats.append(torch.stack([mean * size, spread * size, z.abs().max()]))
            seen.picked.append(picked[: now.n - now.n_aside] > 0)
            seen.tokens.append(now.n_tokens * (picked > 0))
        return factor

    def _find_weighting(self, now: ForwardPass, rows: Mapping[str, Rows]) -> None:
        for name in now.replay.keys() & rows.keys():
            self._weighting = detect(
                rows[name],
                now.replay[name],
                now.n_tokens,
                now.is_valid,
                is_half=now.is_half,
            )
            now.replay = {}


def _count(keep: float | int, n: int) -> int:
    """Return how many of n examples are kept: a share keeps its ratio in a short batch."""
    return min(max(1, wanted(keep, n)), n)


def _is_active(layer: Layer) -> bool:
    return any(p.requires_grad for p in layer.parameters.values())
