"""GREATS: one pick of examples for the whole model, greedy, with redundancy taken off.

    gain_n = lr <g_n, mean target gradient>     take the best, then gain -= lr^2 <g_n, g_best>

Paper  "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration",
  NeurIPS 2024 (Jiachen-T-Wang/GREATS). Its release draws 2 target examples a step and keeps a fixed
  part of the batch.
Cost   Time: a second forward and backward pass over the whole batch, beside the target pass.
  Memory: one module's gradients per example, and the target gradient.
Fails  Greedy picks have no chance in them: with a poor target half of the examples are never learnt
  from. With small learning rates the redundancy term vanishes and what is left is top-k.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from selectune.methods.data_layer.gast import GAST, start
from selectune.registry import training_method
from selectune.training.aligned import Form
from selectune.training.method import Scene, Session


@training_method("greats")
@dataclass(frozen=True, slots=True, kw_only=True)
class GREATS(GAST):
    """Examples chosen for the whole model, by a greedy rule that avoids redundancy."""

    pick: Annotated[str, Field(description="row picker (paper: greedy)")] = "greedy"
    target_batch: Annotated[int, Field(ge=1, description="target examples in one target pass")] = 2
    form: Annotated[Form, Field(description="two_pass: picks are known before training")] = (
        "two_pass"
    )
    is_shared: Annotated[
        bool, Field(description="one pick for all layers (paper); false: one per layer (ours)")
    ] = True

    def start(self, scene: Scene) -> Session:
        """Hook gates onto the layers."""
        return start(self, scene, is_shared=self.is_shared)
