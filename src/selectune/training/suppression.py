"""Turn down what the adapters of a layer add, for some forward passes.

LoRA, DoRA, bottleneck adapters and prefixes have a scale, which is multiplied. So have single
weights that train: they stand in their matrix at the strength of the scale. Any other adapter is
mixed with the module below it: y = base + factor * (adapted - base).
"""

import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from peft.helpers import DoraCaching
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from selectune.adapters.bottleneck import BottleneckLayer
from selectune.adapters.prefix import BlockPrefix
from selectune.errors import ConfigError
from selectune.training.layers import Layer
from selectune.training.sparse.modules import SparseModule

_log = logging.getLogger(__name__)

_SCALED = (LoraLayer, BottleneckLayer, BlockPrefix, SparseModule)
_BELOW = "base_layer"  # where peft keeps the module that it adapts


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What the adapters of one layer add.

    Attributes:
        scales: a module's scales, and the adapter's name among them.
        mixed: adapted modules without a scale.
        unscaled: trainable parameters that belong to no adapter, and act as ever.
    """

    scales: tuple[tuple[dict[str, float], str], ...]
    mixed: tuple[nn.Module, ...]
    unscaled: tuple[str, ...]


def response_of(layer: Layer) -> Response:
    """Find what can be turned down in a layer.

    Raises:
        ConfigError: the layer trains, and none of it is an adapter.
    """
    modules = dict(layer.block.named_modules())
    # By table: two modules that share a weight have one for both.
    scales: dict[tuple[int, str], tuple[dict[str, float], str]] = {}
    mixed: dict[int, nn.Module] = {}
    unscaled: list[str] = []
    for full in layer.parameters:
        name = full.removeprefix(f"{layer.name}.")
        found = _owner(name, modules)
        if found is None:
            unscaled.append(full)
            continue
        module, inside = found
        if isinstance(module, _SCALED):
            is_sparse = isinstance(module, SparseModule)
            table = module.sparse_strengths if is_sparse else module.scaling
            named = [part for part in inside if part in table]
            if is_sparse and not named:  # a bias that trains beside single weights
                unscaled.append(full)
            # A prefix has one scale, and no name of an adapter in its parameters' names.
            for adapter in named or ([] if is_sparse else list(table)):
                scales[id(table), adapter] = table, adapter
        else:
            mixed[id(module)] = module
    if not scales and not mixed:
        raise ConfigError(
            f"{layer.name} has no adapter whose response could be turned down",
            where=unscaled[0],
            why="IST learns which layers matter by turning adapters down; full weights have none",
            do="use lisa or ows, which draw layers without it, or add a peft adapter",
        )
    if unscaled:
        _log.info(
            "%s: %d parameters belong to no adapter; they train with the layer, and probes leave "
            "them at full strength",
            layer.name, len(unscaled),
        )  # fmt: skip
    return Response(tuple(scales.values()), tuple(mixed.values()), tuple(unscaled))


@contextmanager
def turned_down(responses: Iterable[Response], factor: float) -> Generator[None]:
    """Multiply what the adapters of some layers add; afterwards every scale is what it was.

    Args:
        responses: of the layers.
        factor: 1 changes nothing, 0 leaves the base.
    """
    with ExitStack() as stack:
        # peft may keep a DoRA norm that was computed at another scale.
        stack.enter_context(DoraCaching(enabled=False))
        for response in responses:
            for table, adapter in response.scales:
                stack.callback(table.__setitem__, adapter, table[adapter])
                table[adapter] *= factor
            for module in response.mixed:
                handle = module.register_forward_hook(_mixing(factor), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _owner(name: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, list[str]] | None:
    """Return the adapted module that a parameter belongs to, and the parameter's name inside it."""
    parts = name.split(".")
    for k in range(len(parts) - 1, -1, -1):
        module = modules[".".join(parts[:k])]
        if isinstance(module, (*_SCALED, BaseTunerLayer)):
            # A bias that trains with LoRA is the base's own.
            return None if parts[k] == _BELOW else (cast("nn.Module", module), parts[k:])
    return None


def _mixing(factor: float) -> Callable[..., Tensor]:
    def mix(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> Tensor:
        base = cast("Any", module).base_layer(*args, **kwargs)
        if not isinstance(output, Tensor) or not isinstance(base, Tensor):
            raise ConfigError(
                f"the response of {type(module).__name__} cannot be turned down",
                where="ist",
                why="it returns more than one tensor",
                do="use LoRA, DoRA, bottleneck adapters or a prefix, or lisa",
            )
        return base + factor * (output - base)

    return mix
