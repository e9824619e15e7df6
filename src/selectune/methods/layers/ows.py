"""OWS: as LISA, and layers with more outliers train more often.

    every `interval` steps, step 0 included: draw `layers` of the L layers, none twice, by d_l
    d_l = share of the weights of layer l with |W_ij| * ||X_j|| > outlier * mean over the layer

Paper  "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
  Fine-tuning", arXiv 2405.18380, its release in pixeli99/OwLore; it adds GaLore on the drawn
  layers, which is not done here. Outliers after OWL, arXiv 2310.05175. Ours: the threshold of 5,
  and one outlier for a layer that has none.
Cost   Time: one forward pass over `examples` before the first step. Memory: as LISA.
Fails  Odds are those of the base and never change, whatever the training does. Ratios of layers lie
  within a factor of two or three in most models, so that OWS is close to LISA: run it beside.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import ConfigError
from selectune.gradients.engine import dropout_off, precision_of
from selectune.gradients.loss import target_nll
from selectune.registry import training_method
from selectune.training.layer_sampling import PASSES, LayerSession, Share, count_of, ready
from selectune.training.layers import Layer
from selectune.training.method import BatchSource, Method, Scene, Session
from selectune.training.ranks import add_up, rank, world

_BATCH = 8  # examples in one forward pass


@training_method("ows")
@dataclass(frozen=True, slots=True, kw_only=True)
class OWS(Method):
    """A few layers drawn by their share of outlier weights, each draw kept for some steps."""

    layers: Annotated[
        Share,
        Field(description="layers that train at a time, or a share of the layers"),
    ] = 5
    interval: Annotated[int, Field(ge=1, description="steps for which a draw is kept")] = 50
    outlier: Annotated[
        float, Field(gt=0, description="times the layer's mean, from which a weight is an outlier")
    ] = 5.0
    examples: Annotated[
        int, Field(ge=1, description="pool examples whose activations decide on outliers")
    ] = 128

    def start(self, scene: Scene) -> Session:
        """Take hold of the layers.

        Raises:
            ConfigError: too few layers, no examples, or layers that cannot be switched.
            SelectionError: the model has nothing to train in its layers.
        """
        scene, layers = ready(scene)
        count = count_of(self.layers, len(layers))
        if scene.pool is None or scene.pool.n == 0:
            raise ConfigError(
                "OWS needs training examples, and none with rows by index were given",
                where="pool",
                why="a weight is an outlier by what flows through it",
                do="use attach(..., pool=), or a trainer on a data set that is no stream",
            )
        guide = Outliers(self, scene, layers, scene.pool)
        return LayerSession(
            scene, layers, guide, count=count, hold=self.interval, about=asdict(self)
        )


class Outliers:
    """Gives each layer its share of outliers, measured once."""

    def __init__(
        self, options: OWS, scene: Scene, layers: Sequence[Layer], pool: BatchSource
    ) -> None:
        self._options, self._scene, self._layers, self._pool = options, scene, layers, pool
        self.ratios: Float[np.ndarray, " layers"] | None = None

    def look(self, step: int) -> dict[str, Any]:
        """Measure where that is not done yet."""
        if self.ratios is not None:
            return {}
        self.ratios = outlier_ratios(
            self._scene, self._layers, self._pool, self._options.examples, self._options.outlier
        )
        return {"outlier_ratio": self.ratios.tolist()}

    def log_weights(self) -> Float[np.ndarray, " layers"]:
        """Return the logarithms of the ratios."""
        assert self.ratios is not None
        return np.log(self.ratios)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the ratios: the weights that they came from have moved."""
        return {}, {} if self.ratios is None else {"ratios": torch.tensor(self.ratios)}

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on with the ratios of another one."""
        if "ratios" in tensors:
            self.ratios = tensors["ratios"].cpu().numpy().astype(np.float64)


@torch.no_grad()
def outlier_ratios(
    scene: Scene, layers: Sequence[Layer], pool: BatchSource, n: int, threshold: float
) -> Float[np.ndarray, " layers"]:
    """Return each layer's share of weights with |W_ij| * ||X_j|| above a multiple of their mean.

    Args:
        scene: the model, in any mode, and left in it.
        layers: whose linear modules are looked at, those below an adapter included.
        pool: where the examples come from.
        n: how many of them.
        threshold: the multiple.
    """
    linears = [_linears(layer) for layer in layers]
    sums = {m: torch.zeros(_n_in(m), device=_weight(m).device) for f in linears for m in f}
    order = np.random.default_rng([scene.seed, 0, PASSES]).permutation(pool.n)[:n].tolist()
    device = next(scene.model.parameters()).device
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=forked), dropout_off(scene.model):
            for start in range(0, len(order), _BATCH):
                mine = order[start : start + _BATCH][rank() :: world()]
                batch = pool.draw(mine) if mine else None
                if batch is None or not batch.ids:
                    continue
                # `target_nll` moves rows to the left, and padding to the right.
                is_real = batch.attention_mask.sort(dim=1, descending=True).values.bool()
                with _summing_squares(sums, is_real), precision_of(device, scene.precision):
                    target_nll(scene.model, batch)
    finally:
        torch.clear_autocast_cache()
    norms = dict(zip(sums, [s.sqrt() for s in add_up(list(sums.values()))], strict=True))
    return np.asarray([_ratio(found, norms, threshold) for found in linears])


@contextmanager
def _summing_squares(
    sums: dict[nn.Module, Tensor], is_real: Bool[Tensor, "n t"]
) -> Generator[None]:
    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if isinstance(x, Tensor) and x.shape[:-1] == is_real.shape:
            sums[module] += x[is_real].float().square().sum(0)

    with ExitStack() as stack:
        for module in sums:
            stack.callback(module.register_forward_pre_hook(add).remove)
        yield


def _ratio(found: Sequence[nn.Module], norms: dict[nn.Module, Tensor], threshold: float) -> float:
    def sizes(module: nn.Module) -> Tensor:
        weight = _weight(module).float().abs()
        return weight * (norms[module][:, None] if isinstance(module, Conv1D) else norms[module])

    n = sum(_weight(m).numel() for m in found)
    limit = threshold * sum(float(sizes(m).double().sum()) for m in found) / n
    # A layer without outliers could never train.
    return max(1, sum(int((sizes(m) > limit).sum()) for m in found)) / n


def _weight(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight")
    return weight.detach()


def _n_in(module: nn.Module) -> int:
    return _weight(module).shape[0 if isinstance(module, Conv1D) else 1]


def _linears(layer: Layer) -> list[nn.Module]:
    """Return the base's own: adapters are small and fresh, and say nothing about the layer."""
    added: set[int] = set()
    for module in layer.block.modules():
        if isinstance(module, BaseTunerLayer):
            below = {id(m) for m in module.get_base_layer().modules()}
            added |= {id(m) for m in cast("nn.Module", module).modules()} - below
    return [
        m for m in layer.block.modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in added
    ]
