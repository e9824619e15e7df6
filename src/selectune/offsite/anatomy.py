"""Which matrices a decoder block has: attention's q, k, v and o, and the MLP's up, gate and down.

A table of names, one row per way of writing a block. What fits no row is refused: a matrix that was
guessed wrong would be cut where it must not be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import SelectionError

Role = Literal["q", "k", "v", "o"]

# q, k, v, o; one name in three places is one fused matrix with q, k and v one after another.
_ATTENTION = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),  # OPT
    ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),  # GPT-J
    ("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),  # GPT-2
)
# up, gate, down
_MLPS = (
    ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    ("mlp.up_proj", None, "mlp.down_proj"),
    ("fc1", None, "fc2"),  # OPT
    ("mlp.fc_in", None, "mlp.fc_out"),  # GPT-J
    ("mlp.c_fc", None, "mlp.c_proj"),  # GPT-2
)
# What parts of a module's name mean that no row of the tables covers.
_REASONS = {
    "expert": "a router sends each token to a few of them, so no channel has one set of statistics",
    "gate_up": "gate and up are fused, in an order that families disagree on",
    "qkv": "q, k and v are fused, in an order that families disagree on",
    "query_key_value": "q, k and v are fused, in an order that families disagree on",
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of attention.

    Attributes:
        name: of its module inside the block.
        part: the output features of the module that are this matrix; None for all.
        role: what it computes.
    """

    name: str
    part: tuple[int, int] | None
    role: Role

    @property
    def key(self) -> str:
        """A name for this matrix alone, such as "attn.c_attn[q]" where several are fused."""
        return self.name if self.part is None else f"{self.name}[{self.role}]"

    @property
    def rows(self) -> slice:
        """Its rows of the module's weight, which is [o, i]."""
        return slice(None) if self.part is None else slice(*self.part)


@dataclass(frozen=True, slots=True)
class Mlp:
    """The matrices around the channels of an MLP, by module name inside the block.

    Attributes:
        up: from the hidden state to the channels.
        gate: alike, multiplied with it through the activation; None in an MLP without gate.
        down: from the channels back.
    """

    up: str
    gate: str | None
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that there are."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Everything in a block that a compressor may cut.

    Attributes:
        matrices: of attention, q, k, v and o.
        mlp: the MLP.
    """

    matrices: tuple[Matrix, ...]
    mlp: Mlp


def anatomy_of(block: nn.Module) -> Anatomy:
    """Return which matrices a decoder block has.

    Raises:
        SelectionError: the block is written in no known way, or its matrices are no plain linear
            maps.
    """
    modules = dict(block.named_modules())
    for names in _ATTENTION:
        if all(name in modules for name in names):
            break
    else:
        raise _unknown(block, "attention", _ATTENTION)
    for up, gate, down in _MLPS:
        if all(name in modules for name in (up, gate, down) if name is not None):
            break
    else:
        raise _unknown(block, "MLP", [[n for n in names if n] for names in _MLPS])
    found = Anatomy(_matrices(modules, names), Mlp(up, gate, down))
    for name in dict.fromkeys((*names, *found.mlp.names)):
        _refuse_odd(block, name, modules[name])
    _refuse_more(block, found.mlp)
    return found


def weight_of(module: nn.Module) -> Float[Tensor, "o i"]:
    """Return a linear map's weight in Linear's order, as a view; Conv1D stores [i, o]."""
    weight = module.get_parameter("weight").detach()
    return weight.mT if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Float[Tensor, " o"] | None:
    """Return a linear map's bias."""
    bias: Tensor | None = module.bias  # pyright: ignore[reportAssignmentType]
    return None if bias is None else bias.detach()


def channel_size(block: nn.Module, mlp: Mlp) -> int:
    """Return how many numbers leave a block with one channel of its MLP, biases counted."""
    into = [block.get_submodule(name) for name in mlp.names if name != mlp.down]
    size = weight_of(block.get_submodule(mlp.down)).shape[0]
    return size + sum(weight_of(m).shape[1] + (bias_of(m) is not None) for m in into)


def _matrices(modules: Mapping[str, nn.Module], names: tuple[str, ...]) -> tuple[Matrix, ...]:
    q, k, v, o = names
    if q != k:
        return (
            Matrix(q, None, "q"),
            Matrix(k, None, "k"),
            Matrix(v, None, "v"),
            Matrix(o, None, "o"),
        )
    fused = modules[q]
    if not isinstance(fused, nn.Linear | Conv1D):
        return ()  # refused by the caller, with its name
    third, rest = divmod(weight_of(fused).shape[0], 3)
    if rest:
        raise SelectionError(
            f"{q} has {3 * third + rest} outputs, which are not q, k and v of one size",
            where=q,
            why="three equal parts are expected, one after another",
            do="use a model of another family",
        )
    parts = [Matrix(q, (n * third, (n + 1) * third), r) for n, r in enumerate(("q", "k", "v"))]
    return *parts, Matrix(o, None, "o")


def _refuse_odd(block: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse what only looks like a linear map: adapters around one, quantised weights."""
    if type(module) in (nn.Linear, Conv1D) and weight_of(module).is_floating_point():
        return
    raise SelectionError(
        f"{name} is a {type(module).__name__}, no plain Linear or Conv1D",
        where=type(block).__name__,
        why="low-rank factors and narrowed matrices stand in for plain linear maps only",
        do="merge or remove adapters, and load the weights unquantised",
    )


def _refuse_more(block: nn.Module, mlp: Mlp) -> None:
    """Refuse an MLP with further weights, such as a norm between up and down."""
    inside = mlp.up.rpartition(".")[0]
    if not inside:
        return
    known = {f"{name}.{kind}" for name in mlp.names for kind in ("weight", "bias")}
    for name, _ in block.named_parameters():
        if name.startswith(f"{inside}.") and name not in known:
            raise SelectionError(
                f"{name} is one weight more than {', '.join(mlp.names)}",
                where=type(block).__name__,
                why="a channel can leave an MLP only where nothing else looks at all of them",
                do="use a model of another family",
            )


def _unknown(block: nn.Module, part: str, known: Sequence[Sequence[str]]) -> SelectionError:
    found = [name for name, _ in block.named_modules() if name]
    reason = next(
        (f"{name}: {why}; " for name in found for word, why in _REASONS.items() if word in name), ""
    )
    looked = ", or ".join("/".join(dict.fromkeys(names)) for names in known)
    return SelectionError(
        f"the {part} of {type(block).__name__} is written in no known way",
        where=f"the block has: {', '.join(found)}",
        why=f"{reason}looked for: {looked}",
        do="use a compressor of whole layers (layer_drop, crash) with one share for both, or a "
        "model of another family",
    )
