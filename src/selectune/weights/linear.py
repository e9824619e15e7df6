"""Linear maps as they are used, whatever their matrix is stored as.

Libraries for quantisation bring classes of their own, which have no base in common: bitsandbytes
packs a matrix into bytes, torchao wraps it, others keep it in buffers of another name. All of them
tell, like nn.Linear, how many features go in and come out.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A module that multiplies its inputs by a matrix.

    Attributes:
        module: the live one.
        shape: of the matrix, as a base that is not quantised stores it.
        input_axis: the axis of the inputs: 1 for [out, in], 0 for [in, out], as GPT-2's are.
        is_quantised: whether the entries of the matrix are no numbers that could be changed.
    """

    module: nn.Module
    shape: tuple[int, int]
    input_axis: int
    is_quantised: bool

    @property
    def weight(self) -> Tensor | None:
        """The tensor that stands where an unquantised matrix does."""
        return vars(self.module)["_parameters"].get("weight")

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return next(chain(self.module.parameters(), self.module.buffers())).device

    def stored(self) -> dict[str, Tensor]:
        """Return all tensors that make up the matrix, scales included, by name."""
        state = self.module.state_dict()
        return {name: t for name, t in state.items() if isinstance(t, Tensor)}


def linear_map(module: nn.Module) -> LinearMap | None:
    """Return what a module is as a linear map, None where it is none."""
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        is_input_first = True
    else:
        n_in, n_out = (getattr(module, f"{side}_features", None) for side in ("in", "out"))
        if not isinstance(n_in, int) or not isinstance(n_out, int):
            return None
        # transformers turns GPT-2's matrices when it quantises them, and notes what they were.
        source = vars(module).get("source_cls")
        is_input_first = isinstance(source, type) and issubclass(source, Conv1D)
    shape = (n_in, n_out) if is_input_first else (n_out, n_in)
    weight = vars(module)["_parameters"].get("weight")
    is_plain = (
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.dtype in PLAIN
        and tuple(weight.shape) == shape
    )
    return LinearMap(module, shape, 0 if is_input_first else 1, not is_plain)
