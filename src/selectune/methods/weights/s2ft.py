"""S2FT: whole channels of the feed-forward layers, drawn at random.

    S = uniform in [0, 1) per input channel of a down projection, drawn by seed and tensor name;
    a chosen channel trains in all its entries

Paper  "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
  arXiv 2412.06289: random channels of down projections, ratio 0.03. Ours: no
  permutation of weights, as channels are trained where they stand.
Cost   Nothing: no data is read. Training keeps the inputs of the chosen channels only.
Fails  Where the task needs the attention to change. Channels are drawn without looking at them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selectune.errors import SelectionError
from selectune.registry import weight_scorer
from selectune.seeds import seeded
from selectune.weights.eligible import EligibleWeight, fits
from selectune.weights.options import TensorEvidence
from selectune.weights.scorer import WeightScorer

# What families call the projection from the hidden width of the feed-forward layer back.
_DOWN = ("down_proj", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")


@weight_scorer("s2ft")
@dataclass(frozen=True, slots=True, kw_only=True)
class S2FT(WeightScorer):
    """Random channels of down projections; `eligible="layers"` stands for all of these."""

    default_density: ClassVar[float] = 0.03

    def narrow(self, found: dict[str, EligibleWeight]) -> dict[str, EligibleWeight]:
        """Keep down projections, unless the user named weights.

        Raises:
            SelectionError: there is none, or a named weight is no matrix of a linear map.
        """
        if isinstance(self.eligible, list):
            odd = [name for name, weight in found.items() if not weight.is_linear]
            if odd:
                raise SelectionError(
                    f"{odd[0]} has no input channels",
                    where="eligible",
                    why="channels are chosen of Linear and Conv1D only",
                    do="name projections such as down_proj",
                )
            return found
        kept = {
            name: weight
            for name, weight in found.items()
            if weight.is_linear and any(fits(pattern, name) for pattern in _DOWN)
        }
        if not kept:
            raise SelectionError(
                "no down projection was found in the layers",
                where="eligible",
                why=f"none is called {', '.join(_DOWN)}",
                do='name them: eligible=["..."]',
            )
        return kept

    def units(self, shape: tuple[int, ...], is_input_first: bool) -> tuple[int, ...]:
        """Return one score per input channel."""
        return (shape[0], 1) if is_input_first else (1, shape[1])

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Draw a number for each channel."""
        shape = self.units(tuple(weight.shape), evidence.is_input_first)
        return torch.rand(shape, generator=seeded(self.seed, "s2ft", evidence.name))
