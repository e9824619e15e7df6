"""Layer drop, distilled: the layers that stay are trained to hand on what all of them did.

    loss = LM + 30 KD      KD = mean(((h_T - h_S) / rms(h_T))^2) where the middle ends

Paper  Xiao et al., "Offsite-Tuning: Transfer Learning without Full Model", arXiv 2302.04870:
  weight 30, learning rate 1e-4 with a cosine, blocks of 512 tokens, one epoch of a shard of the
  Pile in batches of 144, warm-up over 2,000 steps. Ours: far fewer and smaller steps, the warm-up
  as a share of them.
Cost   Time: per step a forward pass of the original and a training step of the emulator. Memory:
  both models, and fp32 optimizer state of the layers that stay.
Fails  On little text the layers learn it by heart. The better the emulator, the more it gives away,
  and the less tuning it through the full model is worth over using it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from selectune.methods.compressors.layer_drop import dropped
from selectune.offsite.pieces import MiddleLayer
from selectune.offsite.views import StackView
from selectune.registry import compressor


@compressor("layer_drop_distilled", needs={"distillation"})
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDropDistilled:
    """Every so many layers one, trained afterwards."""

    steps: Annotated[int, Field(ge=1, description="of the optimizer")] = 200
    learning_rate: Annotated[float, Field(gt=0, description="peak")] = 1e-4
    warmup: Annotated[
        float, Field(ge=0, le=1, description="share of steps in which the learning rate rises")
    ] = 0.05
    batch_size: Annotated[int, Field(ge=1, description="blocks of text in one step")] = 8
    distillation: Annotated[
        float, Field(ge=0, description="weight of KD beside the language model's loss")
    ] = 30.0

    def arrange(self, stack: StackView) -> Mapping[int, MiddleLayer]:
        """Keep evenly spaced layers, as they are before training."""
        return dropped(stack)
