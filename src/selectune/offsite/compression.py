"""All middle layers of a model, compressed one after the other; what is done is done for good."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from torch import nn

from selectune.data import Batch, Tokens, collate, length_sorted_batches
from selectune.models import blocks
from selectune.offsite.arrangement import Arrangement
from selectune.offsite.budget import together
from selectune.offsite.compressor import (
    LayerCompressor,
    StackCompressor,
    compress_layer,
    compress_stack,
    needs_of,
    score_layer,
)
from selectune.offsite.distill import MiddleTraining, middle_ends, train_middle
from selectune.offsite.factors import build_layer
from selectune.offsite.layout import Layout
from selectune.offsite.outlook import Compressor
from selectune.offsite.pieces import CompressedLayer, MiddleLayer
from selectune.offsite.record import LayerRecord
from selectune.offsite.statistics import LayerStatistics, collect
from selectune.offsite.work import Work
from selectune.progress import Progress

Budget = Literal["uniform", "global"]
Recorded = tuple[CompressedLayer, dict[str, Any]]
_Act = Callable[[int, LayerStatistics | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How much of the middle is kept.

    Attributes:
        keep_attention: share of the numbers of q, k, v and o; 1 leaves them alone.
        keep_mlp: share of the channels, alike.
        budget: "uniform" in every matrix, "global" in all together, by score.
    """

    keep_attention: float
    keep_mlp: float
    budget: Budget

    @property
    def each(self) -> dict[str, float]:
        """The two shares by name."""
        return {"keep_attention": self.keep_attention, "keep_mlp": self.keep_mlp}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compression:
    """Everything that decides what becomes of a middle.

    Attributes:
        model: the original.
        layout: which of its layers train.
        compressor: a registered one.
        shares: how much is kept.
        text: blocks of calibration text.
        pad_id: token id at padding.
        precision: autocast of forward passes.
        token_budget: padded tokens in one batch.
        at_once: layers whose statistics are held at once.
        seed: of draws.
        work: where finished layers lie.
        progress: told of every part.
    """

    model: nn.Module
    layout: Layout
    compressor: Compressor
    shares: Shares
    text: Sequence[Tokens]
    pad_id: int
    precision: str
    token_budget: int
    at_once: int
    seed: int
    work: Work
    progress: Progress

    def middle(self) -> tuple[dict[int, MiddleLayer], list[dict[str, Any]]]:
        """Return what became of every middle layer, and plain values that only the owner keeps.

        Raises:
            SelectionError: a share leaves too little, or a score is not a number.
            CoverageError: a matrix did not see every position once.
            TrainingError: a statistic is not a number.
        """
        if isinstance(self.compressor, StackCompressor):
            with self.progress.phase("arrange layers", len(self.text), "blocks") as advance:
                middle, record = compress_stack(
                    self.model, self.layout, self.compressor, batches=self._batches(),
                    precision=self.precision, advance=advance, **self.shares.each,
                )  # fmt: skip
            return middle, [record.to_json()]
        is_global = self.shares.budget == "global"
        found = (self._by_one_budget if is_global else self._one_by_one)(self.compressor)
        ordered = [found[j] for j in self.layout.middle]
        return {layer.original: layer for layer, _ in ordered}, [record for _, record in ordered]

    def distil(self, emulator: nn.Module, plan: Arrangement) -> None:
        """Train the middle of an emulator, where its compressor asks for that.

        Args:
            emulator: of the model.
            plan: its layers.
        """
        if "distillation" not in needs_of(self.compressor):
            return
        indices = [i for i in range(len(plan.positions)) if i not in plan.adapters]
        if self.work.has_trained_middle(emulator, indices):
            return
        how = MiddleTraining(**asdict(cast("Any", self.compressor)))
        with self.progress.phase("distil the middle", how.steps, "steps") as advance:
            train_middle(
                emulator, self.text, how, adapters=plan.adapters, teacher=self.model,
                ends=middle_ends(self.layout, plan.places), pad_id=self.pad_id,
                precision=self.precision, seed=self.seed, advance=advance,
            )  # fmt: skip
        self.work.keep_trained_middle(emulator, indices)

    def _one_by_one(self, compressor: LayerCompressor) -> dict[int, Recorded]:
        every = blocks(self.model)
        done = {j: found for j in self.layout.middle if (found := self.work.layer(j)) is not None}

        def compress(j: int, statistics: LayerStatistics | None) -> None:
            layer, record = compress_layer(
                every[j], j, compressor, statistics, seed=self.seed, **self.shares.each
            )
            done[j] = layer, record.to_json()
            self.work.keep_layer(*done[j])

        self._each("compress layers", done, compress)
        return done

    def _by_one_budget(self, compressor: LayerCompressor) -> dict[int, Recorded]:
        every, shares = blocks(self.model), self.shares
        scores = {
            j: known for j in self.layout.middle if (known := self.work.scores(j)) is not None
        }

        def score(j: int, statistics: LayerStatistics | None) -> None:
            scores[j] = score_layer(
                every[j], j, compressor, statistics, attention=shares.keep_attention < 1,
                mlp=shares.keep_mlp < 1, seed=self.seed,
            )  # fmt: skip
            self.work.keep_scores(scores[j])

        self._each("score layers", scores, score)
        plans = together([scores[j] for j in self.layout.middle], **shares.each)
        found: dict[int, Recorded] = {}
        with self.progress.phase("compress layers", len(plans), "layers") as advance:
            for j, plan in plans.items():
                found[j] = build_layer(every[j], j, plan), LayerRecord(scores[j], plan).to_json()
                advance(1)
        return found

    def _each(self, name: str, done: Mapping[int, object], act: _Act) -> None:
        """Do something with the statistics of every layer that is not done, group by group."""
        # The last first: backward passes to them are the shortest, so mistakes show early.
        left = [j for j in reversed(self.layout.middle) if j not in done]
        groups = [left[k : k + self.at_once] for k in range(0, len(left), self.at_once)]
        needs = needs_of(self.compressor)
        with self.progress.phase(name, len(groups) * len(self.text), "blocks") as advance:
            for group in groups:
                statistics = collect(
                    self.model, self._batches(), sorted(group), needs=needs,
                    precision=self.precision, seed=self.seed, advance=advance,
                )  # fmt: skip
                for j in group:
                    act(j, statistics.pop(j, None))

    def _batches(self) -> list[Batch]:
        lengths = [len(block.input_ids) for block in self.text]
        groups = length_sorted_batches(lengths, token_budget=self.token_budget)
        return [collate([self.text[k] for k in group], pad_id=self.pad_id) for group in groups]
