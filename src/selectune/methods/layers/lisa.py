"""LISA: a few layers, drawn at random, train for some steps; then others do.

    every `interval` steps, step 0 included: draw `layers` of the L layers, all alike, none twice

Paper  "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
  arXiv 2403.17919 (NeurIPS 2024), its release in LMFlow. It trains embeddings, final norm and head
  beside the layers; here they train if they are trainable. Ours: `retire`.
Cost   Time: less than plain training, as backward stops below the lowest drawn layer, unless the
  embeddings train. Memory: no activations for the weights of layers that stand still; with
  retire="drop" or "offload" no optimizer state of theirs on the device either.
Fails  With fewer intervals than layers some never train. retire="drop" starts the moments of a
  layer from zero at each draw. An interval of a few steps gives AdamW no time to settle.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from selectune.registry import training_method
from selectune.training.layer_sampling import Even, LayerSession, Share, count_of, ready
from selectune.training.method import Method, Scene, Session
from selectune.training.retired import Retire


@training_method("lisa")
@dataclass(frozen=True, slots=True, kw_only=True)
class LISA(Method):
    """A few layers drawn evenly, each draw kept for some steps; also for full weights."""

    layers: Annotated[
        Share,
        Field(description="layers that train at a time, or a share of the layers"),
    ] = 2
    interval: Annotated[int, Field(ge=1, description="steps for which a draw is kept")] = 20
    retire: Annotated[
        Retire,
        Field(
            description="optimizer state of layers that stand still: keep it, drop it, or offload "
            "it to main memory (ours)"
        ),
    ] = "keep"

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
            hold=self.interval,
            retire=self.retire,
            about=asdict(self),
        )
