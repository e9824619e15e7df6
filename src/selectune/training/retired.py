"""What becomes of the optimizer's state of weights that stand still for a while."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from selectune.errors import ConfigError

Retire = Literal["keep", "drop", "offload"]


class RetiredStates:
    """The optimizer's state of parameters that are switched off."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, retire: Retire) -> None:
        if retire != "keep" and optimizer is None:
            raise ConfigError(
                f"retire={retire} needs the optimizer",
                where="retire",
                why="it is about the optimizer's state",
                do="use attach(model, optimizer), or retire=keep",
            )
        self._optimizer, self._retire = optimizer, retire
        self._homes: dict[int, dict[str, torch.device]] = {}

    def put_away(self, p: nn.Parameter) -> None:
        """Drop the state of a parameter, or move it into main memory."""
        if self._retire == "keep" or self._optimizer is None:
            return
        if self._retire == "drop":
            self._optimizer.state.pop(p, None)
        elif id(p) not in self._homes and p in self._optimizer.state:
            state = cast("dict[str, Any]", self._optimizer.state[p])
            tensors = {key: t for key, t in state.items() if isinstance(t, Tensor)}
            self._homes[id(p)] = {key: t.device for key, t in tensors.items()}
            state.update({key: move(t, torch.device("cpu")) for key, t in tensors.items()})

    def bring_back(self, p: nn.Parameter) -> None:
        """Move the state of a parameter to where it was."""
        homes = self._homes.pop(id(p), {})
        if self._optimizer is not None and p in self._optimizer.state:
            state = cast("dict[str, Any]", self._optimizer.state[p])
            for key in homes.keys() & state.keys():
                state[key] = move(state[key], homes[key])


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device."""
    return tensor.to(device)
