"""What a trainer may not be told when a training method acts in it."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from selectune.errors import ConfigError
from selectune.training.ranks import world

# What a trainer can be told that hides from a method what it must see.
_HIDING = {
    "packing": "a row then holds several examples, which cannot be told apart",
    "padding_free": "a row then holds several examples, which cannot be told apart",
    "use_liger_kernel": "a fused loss hides what layers see",
    "torch_compile": "a compiled model does not run the hooks that choose",
    "label_smoothing_factor": "the model is then called without labels, and a smoothed loss is no "
    "mean over target tokens",
}
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def refuse_arguments(args: TrainingArguments) -> None:
    """Check what the trainer was told.

    Raises:
        ConfigError: it cannot work with a method that chooses examples or layers.
    """
    asked = vars(args)
    for key, why in _HIDING.items():
        if asked.get(key):
            raise ConfigError(
                f"{key}={asked[key]} cannot be used with a training method",
                where=f"{type(args).__name__}.{key}",
                why=why,
                do=f"set {key}={0.0 if key == 'label_smoothing_factor' else False}",
            )
    by_name = [key for key in ("deepspeed", "fsdp") if asked.get(key)]
    # `accelerate launch` says so in the environment alone.
    if by_name or AcceleratorState().distributed_type in _SHARDED:
        raise ConfigError(
            "a training method runs under plain DDP only",
            where=f"{type(args).__name__}.{by_name[0]}" if by_name else "accelerate's config",
            why="sharded parameters have no gradient that a layer could deliver, and must not be "
            "frozen after the first step",
            do="use one process, or DDP",
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"a training method cannot run in one process on {args.n_gpu} devices",
            where="torch.nn.DataParallel",
            why="its copies of the model are made anew in every step",
            do="start one process per device, with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one of them",
        )
    if world() > 1 and args.ddp_find_unused_parameters is False:
        raise ConfigError(
            "ddp_find_unused_parameters=False cannot be used with a training method",
            where=f"{type(args).__name__}.ddp_find_unused_parameters",
            why="DDP would wait for the gradients of layers that are frozen in this step",
            do="set ddp_find_unused_parameters=True",
        )
