"""Where layers cannot be switched on and off while a model trains."""

import logging

from peft import PeftModel, PrefixTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selectune.adapters.prefix import BlockwiseEncoder
from selectune.errors import ConfigError
from selectune.training.method import Scene

_log = logging.getLogger(__name__)


def refuse_unfit(scene: Scene) -> None:
    """Check what can be seen of a model before training starts.

    Raises:
        ConfigError: layers that are switched off would train, or break the training.
    """
    model = scene.model
    merged = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and module.merged
    ]
    if merged:
        raise ConfigError(
            f"{len(merged)} adapters are merged into their base",
            where=merged[0],
            why="a merged adapter adds nothing of its own that could train or be turned down",
            do="call model.unmerge_adapter() first",
        )
    _refuse_undivided_prefix(model)
    if isinstance(model, DistributedDataParallel):
        _refuse_strict(model)
    kind = _sharding(scene)
    if kind:
        raise ConfigError(
            f"layers cannot be switched on and off under {kind}",
            where=type(model).__name__,
            why="it divides the parameters once, by what trains at that time",
            do="use one process, or DDP with find_unused_parameters=True",
        )
    if any(name.rpartition(".")[2] == "_orig_mod" for name, _ in model.named_modules()):
        _log.warning(
            "the model is compiled: it is compiled anew for new sets of layers, up to torch's "
            "limit; a larger hold makes that rarer, and an uncompiled model avoids it"
        )


def _refuse_undivided_prefix(model: nn.Module) -> None:
    if not isinstance(model, PeftModel):
        return
    if not isinstance(model.active_peft_config, PrefixTuningConfig):
        return
    if any(isinstance(part, BlockwiseEncoder) for part in model.prompt_encoder.values()):
        return
    raise ConfigError(
        "the prefix is one tensor for all layers",
        where="prompt_encoder",
        why="layers train or not by themselves, and a part of a tensor cannot",
        do="call selectune.adapters.put_in_blocks(model) before the optimizer is made",
    )


def _refuse_strict(model: DistributedDataParallel) -> None:
    is_strict = model.static_graph or not model.find_unused_parameters
    if is_strict:
        raise ConfigError(
            "DistributedDataParallel waits for the gradients of layers that are off",
            where="static_graph=True" if model.static_graph else "find_unused_parameters=False",
            why="other layers train in every step",
            do="use DistributedDataParallel(..., find_unused_parameters=True)",
        )


def _sharding(scene: Scene) -> str:
    if type(scene.model).__module__.startswith("deepspeed") or any(
        "ds_id" in vars(p) for p in scene.model.parameters()
    ):
        return "DeepSpeed"
    if type(scene.optimizer).__module__.startswith("deepspeed"):
        return "DeepSpeed"
    if not dist.is_available():
        return ""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(m, FullyShardedDataParallel) for m in scene.model.modules()):
        return "FSDP"
    if any(isinstance(p, DTensor) for p in scene.model.parameters()):
        return "FSDP2 or another sharding by DTensor"
    return ""
