"""Which of several processes this is: what `torchrun`, `accelerate launch` and `--shard` say.

Processes that score together talk through the run folder alone (`selectune.files.claims`). So all
that is read of a launch is which process this is; the rest of what a launcher leaves in the
environment is taken away, or the trainer of the warm-up would wait for a group of processes.
"""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from selectune.errors import ConfigError

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
              "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
              "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
_LAUNCHERS_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_")
_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Launch:
    """One process of several that a launcher started.

    Args:
        rank: which one, from 0; 0 leads: it prints, and goes on alone once all is scored.
        world: how many there are.
        local_rank: which one on its machine, from 0.
        name: tells this launch from others.
    """

    rank: int
    world: int
    local_rank: int
    name: str

    @property
    def is_leader(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0


def take_launch(environment: MutableMapping[str, str]) -> Launch | None:
    """Read what a launcher left in the environment, and take it out.

    Args:
        environment: `os.environ`, or a copy.

    Returns:
        None where this is the only process.

    Raises:
        ConfigError: the variables are no numbers, or do not fit together.
    """
    said = {name: environment.get(name, "") for name in _LAUNCHERS}
    if not (said["RANK"] and said["WORLD_SIZE"]):
        return None
    numbers = (said["RANK"], said["WORLD_SIZE"], said["LOCAL_RANK"] or "0")
    if not all(n.isdecimal() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise ConfigError(
            f"process {said['RANK']} of {said['WORLD_SIZE']} cannot be",
            where="environment, RANK, WORLD_SIZE and LOCAL_RANK",
            why="RANK counts from 0 up to WORLD_SIZE - 1",
            do="start with torchrun or accelerate launch, or unset these variables",
        )
    for name in list(environment):
        if name in _LAUNCHERS or name.startswith(_LAUNCHERS_PREFIXES):
            del environment[name]
    rank, world, local_rank = map(int, numbers)
    if world == 1:
        return None
    return Launch(
        rank, world, local_rank, f"launch {said['MASTER_ADDR']}:{said['MASTER_PORT']} of {world}"
    )


def take_gpu(launch: Launch) -> None:
    """Leave this process one GPU of its machine: the one with its local rank.

    To be called before anything runs on a GPU. With fewer GPUs than processes, they go round.
    """
    import torch

    said = os.environ.get(_GPUS)
    # Of what a person lists, or of all: asked without waking CUDA, which reads the list only once.
    visible = said.split(",") if said else [str(k) for k in range(torch.cuda.device_count())]
    if visible:
        os.environ[_GPUS] = visible[launch.local_rank % len(visible)].strip()


@dataclass(frozen=True, slots=True)
class Part:
    """What one of several processes does of a work.

    Args:
        index: which one, from 0.
        n: how many there are.
        launch: the launch that they belong to; "" where each was started by hand (`--shard`).
    """

    index: int
    n: int
    launch: str = ""

    @property
    def is_leader(self) -> bool:
        """Whether this process stays until all is scored, and goes on from there."""
        return bool(self.launch) and self.index == 0


def read_part(shard: str, launch: Launch | None, *, allow: str = "") -> Part | None:
    """Return this process's part of a work, None for all of it.

    Args:
        shard: what `--shard` says, "" for nothing.
        launch: the launch that this process belongs to.
        allow: what `--allow` says.

    Raises:
        ConfigError: the shard is not i/n, or stands beside a launch or `--allow`.
    """
    if not shard and launch is None:
        return None
    where = f"command line, --shard {shard}" if shard else "command line, --allow"
    if allow:
        raise ConfigError(
            "several processes cannot share a run that is being changed",
            where=where,
            why="one of them would remove what others are still working on",
            do="run the same command in one process, or choose another output",
        )
    if launch is not None:
        if shard:
            raise ConfigError(
                "--shard cannot be used under torchrun or accelerate launch",
                where=where,
                why=f"the {launch.world} processes of the launch take shards as they get free",
                do="leave --shard out, or start selectune without a launcher",
            )
        return Part(launch.rank, launch.world, launch.name)
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(
            f'"{shard}" is no shard',
            where=where,
            why="a shard is i/n, where i counts from 1 to n",
            do="write --shard 1/4 for the first of four",
        )
    return Part(int(found[1]) - 1, int(found[2]))
