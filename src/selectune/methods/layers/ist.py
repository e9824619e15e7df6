"""IST: layers train in turns, the more often the more the loss misses their adapters.

    choice, every step        n_update of L layers, none twice, by weights sigmoid(-u)
    probe, every `interval`   U_k = n_suppress layers, none twice, by weights sigmoid(u)
                              L_k = loss of a few examples, adapters of U_k turned down
                              a_k = r_k - mean r,  r_k = exp(-L_k),  p = sigmoid(u)
                              u_l += lr * a_k * p_l (1 - p_l)  for l in U_k

Paper  "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
  Fine-tuning of Large Language Models", arXiv 2410.11772 (Findings of EMNLP 2024); constants and
  order of operations as in its release. Ours: at least one layer trains, draws by Gumbel noise,
  scales kept per module, reward "neg_loss" and "standardised", `probe_from`, `hold`, `merge`.
Cost   Time: `candidates` forward passes over `probe_batch` examples per interval, about +15 % work
  at batch 16; less in backward, which stops below the lowest drawn layer. Memory: no activations
  for the adapters of layers that stand still; the optimizer's state stays.
Fails  At high losses exp(-L) hardly moves u: use reward="neg_loss". Probes on training examples can
  chase layers that memorise. With activation checkpointing little memory is saved. RST is the
  control; merge=True rounds merged weights to the base's precision, and holds a copy of them.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from selectune.errors import ConfigError
from selectune.registry import training_method
from selectune.training.layer_sampling import (
    SETS,
    Hold,
    LayerSession,
    Merge,
    Share,
    count_of,
    draw,
    log_sigmoid,
    perturbed,
    ready,
)
from selectune.training.method import Method, Scene, Session
from selectune.training.probe_loss import Passes, probe_losses
from selectune.training.suppression import response_of

_log = logging.getLogger(__name__)

Reward = Literal["exp", "neg_loss", "standardised"]
Sets = list[list[int]]  # of places among the layers
Measure = Callable[[int, Sets], list[float]]  # (number of the probe, sets) -> losses

_REDRAWS = 100  # of one set, before a set is made from the noise of the last draw
# Losses that differ by less, relative to their size, differ by rounding.
_ROUNDING = 1e-6


@training_method("ist")
@dataclass(frozen=True, slots=True, kw_only=True)
class IST(Method):
    """Layers drawn by importance, which is learnt by turning adapters down."""

    layers: Annotated[
        Share,
        Field(description="share of the layers that train at a time, or a number of layers"),
    ] = 0.25
    suppress: Annotated[
        float, Field(gt=0, lt=1, description="share of the layers that a probe turns down")
    ] = 0.5
    candidates: Annotated[int, Field(ge=2, description="sets of layers in one probe")] = 3
    lr: Annotated[float, Field(ge=0, description="step size of the importance")] = 10.0
    suppression: Annotated[
        float, Field(ge=0, le=1, description="what a probe multiplies adapters by")
    ] = 0.25
    interval: Annotated[int, Field(ge=1, description="steps between probes")] = 10
    probe_batch: Annotated[int, Field(ge=1, description="examples in one probe")] = 16
    reward: Annotated[
        Reward,
        Field(description="exp(-loss) (release); ours: -loss, or -loss in standard deviations"),
    ] = "exp"
    probe_from: Annotated[
        Literal["pool", "target"],
        Field(description="probe training examples (release) or target examples (ours)"),
    ] = "pool"
    hold: Hold = 1
    merge: Merge = False

    @property
    def reads_target(self) -> bool:
        """Whether probes look at the scene's target examples."""
        return self.probe_from == "target"

    def start(self, scene: Scene) -> Session:
        """Take hold of the layers.

        Raises:
            ConfigError: too few layers, no adapters or examples, or layers that cannot be switched.
            SelectionError: the model has nothing to train in its layers.
        """
        scene, layers = ready(scene)
        count = count_of(self.layers, len(layers))
        if len(layers) < 2:
            raise ConfigError(
                "IST needs two layers, and the model has one that trains",
                where=layers[0].name,
                why="it compares layers with each other",
                do="train without it, or give adapters to more layers",
            )
        source = scene.pool if self.probe_from == "pool" else scene.target
        if source is None or source.n == 0:
            raise ConfigError(
                f'probe_from="{self.probe_from}" is not at hand',
                where="probe_from",
                why="no training set with rows by index was given"
                if self.probe_from == "pool"
                else "no target examples were given",
                do="use attach(..., pool=, target=), or a trainer on a data set that is no stream",
            )
        responses = [response_of(layer) for layer in layers]
        passes = Passes(source, self.probe_batch, seed=scene.seed)

        def measure(number: int, sets: Sets) -> list[float]:
            turned = [[responses[place] for place in places] for places in sets]
            return probe_losses(scene, passes.batch(number), turned, factor=self.suppression)

        return LayerSession(
            scene,
            layers,
            Importance(self, [layer.index for layer in layers], measure, seed=scene.seed),
            count=count,
            hold=self.hold,
            is_merged=self.merge,
            about=asdict(self),
        )


def suppressed_sets(
    u: Float[np.ndarray, " layers"], size: int, n_sets: int, rng: np.random.Generator
) -> Sets:
    """Draw different sets of layers by weights sigmoid(u), as many as there are, at most `n_sets`.

    A set that was drawn before is drawn anew. Where some layers are all but certain that may take
    for ever; then the noise of the last draw says which set comes next.
    """
    weights = log_sigmoid(u)
    sets: Sets = []
    while len(sets) < min(n_sets, math.comb(len(u), size)):
        for _ in range(_REDRAWS):
            found = draw(weights, size, rng)
            if found not in sets:
                break
        else:
            order: list[int] = np.argsort(-perturbed(weights, rng)).tolist()
            rest = (sorted(some) for some in itertools.combinations(order, size))
            found = next(some for some in rest if some not in sets)
        sets.append(found)
    return sets


def advantages(losses: Sequence[float], reward: Reward) -> Float[np.ndarray, " sets"]:
    """Return by how much each set did better than the mean of the sets."""
    nats = np.asarray(losses, np.float64)
    r = np.exp(-nats) if reward == "exp" else -nats
    a = r - r.mean()
    if reward == "standardised":
        spread = a.std()
        a = np.zeros_like(a) if spread <= _ROUNDING * abs(nats).max() else a / spread
    return a


def updated(
    u: Float[np.ndarray, " layers"], sets: Sets, a: Float[np.ndarray, " sets"], lr: float
) -> Float[np.ndarray, " layers"]:
    """Return u after one probe: layers that were turned down move, as their sets did."""
    p = np.exp(log_sigmoid(u))
    moved = u.copy()
    for places, advantage in zip(sets, a, strict=True):
        moved[places] += lr * advantage * (p * (1 - p))[places]
    return moved


class Importance:
    """Learns u by probes; a large u means that a layer matters little."""

    def __init__(
        self, options: IST, indices: Sequence[int], measure: Measure, *, seed: int
    ) -> None:
        """Know nothing: all layers are alike.

        Args:
            options: of the method.
            indices: of the layers, for facts.
            measure: takes the losses of a probe.
            seed: of the sets.
        """
        self._options, self._indices = options, list(indices)
        self._measure, self._seed = measure, seed
        self._size = max(1, math.floor(options.suppress * len(indices) + 1e-9))
        self._probed = 0  # step of the last probe
        self.u: Float[np.ndarray, " layers"] = np.zeros(len(indices))
        self.history: list[dict[str, Any]] = []

    def look(self, step: int) -> dict[str, Any]:
        """Probe where it is due."""
        options = self._options
        facts: dict[str, Any] = {}
        # A bare loop that goes on has begun its step before it loads a state of that step.
        if step > self._probed and step % options.interval == 0:
            self._probed = step
            rng = np.random.default_rng([self._seed, step, SETS])
            sets = suppressed_sets(self.u, self._size, options.candidates, rng)
            losses = self._measure(step // options.interval - 1, sets)
            if all(math.isfinite(x) for x in losses):
                a = advantages(losses, options.reward)
                self.u = updated(self.u, sets, a, options.lr)
                self.history.append(
                    {"step": step, "u": self.u.tolist(), "sets": sets, "losses": losses}
                )
                named = [[self._indices[place] for place in places] for places in sets]
                facts["probe"] = {"sets": named, "losses": losses}
            else:
                _log.warning("step %d: a loss of the probe is no number, importance stays", step)
        if facts or step == 0:
            facts["importance"] = np.exp(self.log_weights()).tolist()
        return facts

    def log_weights(self) -> Float[np.ndarray, " layers"]:
        """Return log sigmoid(-u)."""
        return log_sigmoid(-self.u)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return u and how it came about."""
        return {"probed": self._probed, "history": self.history}, {"u": torch.tensor(self.u)}

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where another one stopped."""
        self._probed, self.history = facts["probed"], list(facts["history"])
        self.u = tensors["u"].cpu().numpy().astype(np.float64)
