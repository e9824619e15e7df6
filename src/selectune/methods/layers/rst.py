"""RST: layers drawn at random train, the others stand still.

    every `hold` steps: draw `layers` of the L layers, all alike, none twice

Paper  Named as a baseline by IST (arXiv 2410.11772, Findings of EMNLP 2024), whose release lacks
  its file. Ours: IST with no importance and no probe.
Cost   Time: less than plain training, as backward stops below the lowest drawn layer. Memory: no
  activations for the weights of layers that stand still; the optimizer's state stays.
Fails  With few steps some layers hardly train. With activation checkpointing little memory is
  saved. merge=True rounds merged weights to the base's precision, and holds a copy of them.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from selectune.registry import training_method
from selectune.training.layer_sampling import (
    Even,
    Hold,
    LayerSession,
    Merge,
    Share,
    count_of,
    ready,
)
from selectune.training.method import Method, Scene, Session


@training_method("rst")
@dataclass(frozen=True, slots=True, kw_only=True)
class RST(Method):
    """Layers drawn evenly for every step: IST without importance."""

    layers: Annotated[
        Share,
        Field(description="share of the layers that train at a time, or a number of layers"),
    ] = 0.25
    hold: Hold = 1
    merge: Merge = False

    def start(self, scene: Scene) -> Session:
        """Take hold of the layers.

        Raises:
            ConfigError: too few layers, or layers that cannot be switched.
            SelectionError: the model has nothing to train in its layers.
        """
        scene, layers = ready(scene)
        return LayerSession(
            scene,
            layers,
            Even(len(layers)),
            count=count_of(self.layers, len(layers)),
            hold=self.hold,
            is_merged=self.merge,
            about=asdict(self),
        )
