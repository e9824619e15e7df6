"""Scores of single weights, kept as the evidence that they follow from, and masks made of them."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from selectune.errors import SelectionError
from selectune.weights.base import flat
from selectune.weights.budget import Sizes, count_of, every_form
from selectune.weights.choice import Choice
from selectune.weights.eligible import EligibleWeight
from selectune.weights.mask import WeightMask
from selectune.weights.options import Scope, ScorerOptions, TensorEvidence, Threshold
from selectune.weights.statistics import Statistics

_log = logging.getLogger(__name__)

_MANY_ZEROS = 0.1  # share of exact zeros among the chosen weights that is worth a warning


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class WeightScores:
    """The scores of a model's weights; `select` turns them into a mask, as often as wanted.

    Not the scores are kept but what they follow from: the live weights and the evidence about
    them. Scores of a tensor are computed when they are asked for.

    Attributes:
        scorer: with its options.
        weights: what may be chosen from, by bare name.
        statistics: the evidence.
        sizes: what budgets are measured by.
        base: fingerprint of the base weights.
    """

    scorer: ScorerOptions
    weights: Mapping[str, EligibleWeight]
    statistics: Statistics
    sizes: Sizes
    base: str
    _versions: dict[str, tuple[int, torch.dtype]] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Remember which weights were scored."""
        self._versions.update({name: _version(w) for name, w in self.weights.items()})

    def __repr__(self) -> str:
        return (
            f"WeightScores({self.scorer.entry.name}, {self.sizes.eligible:,} weights in "
            f"{len(self.weights)} tensors, {len(self.statistics.ids)} examples)"
        )

    def __len__(self) -> int:
        return self.sizes.eligible

    def of(self, name: str) -> Float32[Tensor, "*shape"]:
        """Return the scores of one tensor; along a dimension of size 1 all entries are alike.

        Raises:
            SelectionError: the weights have changed since they were scored, or a score is no
                number.
        """
        weight = self.weights[name]
        if _version(weight) != self._versions[name]:
            raise SelectionError(
                f"{name} has changed since it was scored",
                where="scores",
                why="scores follow from the weights, which have been trained or loaded since",
                do="select before training, or score the model again",
            )
        found = self.scorer.values(
            weight.parameter.detach().cpu().float(),
            TensorEvidence(
                name,
                weight.is_input_first,
                {need: tensors[name] for need, tensors in self.statistics.values.items()},
            ),
        )
        if bool(found.isnan().any()):
            raise SelectionError(
                f"a score of {name} is not a number",
                where=name,
                why="the weights hold NaN",
                do="check the weights of the base",
            )
        return found

    def select(
        self,
        *,
        density: float | None = None,
        percent_of_model: float | None = None,
        lora_rank: int | None = None,
        count: int | None = None,
        scope: Scope | None = None,
        threshold: Threshold | None = None,
        sample: int | None = None,
        floor: float | None = None,
        ceiling: float | None = None,
    ) -> WeightMask:
        """Choose the weights with the highest scores; ties go to the earlier tensor and place.

        Args:
            density: share of the eligible weights; this and the next three take the place of the
                scorer's budget.
            percent_of_model: k / (all base weights + k), in percent.
            lora_rank: as many as a LoRA of this rank trains.
            count: number of weights.
            scope: where weights compete: "global", "per_layer", "per_tensor".
            threshold: "exact" or "sampled".
            sample: scores in the sample.
            floor: least share of every tensor.
            ceiling: largest share of every tensor.

        Raises:
            ConfigError: an option is out of range, or contradicts another.
            SelectionError: the budget cannot be met, or the weights have changed.
        """
        asked = {
            "density": density, "percent_of_model": percent_of_model, "lora_rank": lora_rank,
            "count": count, "scope": scope, "threshold": threshold, "sample": sample,
            "floor": floor, "ceiling": ceiling,
        }  # fmt: skip
        changed = {key: value for key, value in asked.items() if value is not None}
        scorer = self.scorer.but(**changed) if changed else self.scorer
        share = Fraction(count_of(scorer.budget, self.sizes), self.sizes.eligible)
        found = dict(Choice(scorer, self.weights, self.of, share).indices())
        if not found:
            raise SelectionError(
                f"a share of {float(share):g} is not one weight of any tensor",
                where=scorer.entry.name,
                why="each tensor, or layer, has the same share, rounded down",
                do='give a larger budget, or use scope="global"',
            )
        about = self._about(scorer, found)
        shapes = {name: tuple(w.parameter.shape) for name, w in self.weights.items()}
        mask = WeightMask(found, shapes, self.base, about)
        _tell(mask)
        return mask

    def _about(self, scorer: ScorerOptions, found: Mapping[str, Tensor]) -> dict[str, Any]:
        n_zero = 0
        for name, index in found.items():
            weight = flat(self.weights[name].parameter)
            n_zero += int((weight[index.to(weight.device)] == 0).sum())
        ids = sorted(self.statistics.ids)
        return {
            "method": scorer.entry.name,
            "options": asdict(scorer),
            "scope": scorer.scope_used,
            "budget": every_form(sum(index.numel() for index in found.values()), self.sizes),
            "n_zero": n_zero,
            "silent": list(self.statistics.silent),
            "n_examples": len(ids),
            "examples": sha256("\n".join(ids).encode()).hexdigest()[:32] if ids else "",
        }


def _tell(mask: WeightMask) -> None:
    forms, n_zero = mask.about["budget"], mask.about["n_zero"]
    rank = forms["lora_rank"]
    shares = mask.densities().values()
    _log.info(
        "%s: %d weights train, %.3f %% of the eligible, %.3f %% of the model%s; "
        "%.3f to %.3f %% of a tensor; %d of them are exactly 0",
        mask.about["method"], mask.n_chosen, 100 * mask.density, forms["percent_of_model"],
        "" if rank is None else f", as a LoRA of rank {rank:.2f}",
        100 * min(shares), 100 * max(shares), n_zero,
    )  # fmt: skip
    if n_zero > _MANY_ZEROS * mask.n_chosen:
        _log.warning(
            "%d of %d chosen weights are exactly 0 in the base: weights that start at zero look "
            'important where small ones win; eligible="layers" leaves them out',
            n_zero, mask.n_chosen,
        )  # fmt: skip


def _version(weight: EligibleWeight) -> tuple[int, torch.dtype]:
    return weight.parameter._version, weight.parameter.dtype
