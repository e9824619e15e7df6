"""The two manifests of an emulator: the public one goes with the package, the other stays at home.

The package carries a random id and nothing that names the base. What the id stands for, the owner's
record alone knows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from selectune.errors import CorruptFileError, IncompatibleRunError
from selectune.files import Opened

VERSION = 1
PUBLIC, OWNER = "emulator.json", "owner.json"

Index = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Form = Literal["full", "lora"]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
_Read = TypeVar("_Read", bound="Manifest")


class Part(BaseModel):
    """A value of a manifest: exact types, no unknown keys, no later changes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TensorFacts(Part):
    """Shape and type of one tensor, the type as torch names it."""

    shape: tuple[Size, ...]
    dtype: Dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorFacts":
        """Return those of a tensor."""
        dtype: Any = type_name(tensor)
        return cls(shape=tuple(tensor.shape), dtype=dtype)

    @property
    def n_bytes(self) -> int:
        """How many bytes the tensor takes."""
        one: torch.dtype = getattr(torch, self.dtype)
        n_bytes = one.itemsize
        for size in self.shape:
            n_bytes *= size
        return n_bytes

    def describes(self, tensor: Tensor) -> bool:
        """Return whether a tensor, of whatever type, has these."""
        return (tuple(tensor.shape), type_name(tensor)) == (self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def type_name(tensor: Tensor) -> str:
    """Return a tensor's type as it is written in manifests."""
    return str(tensor.dtype).removeprefix("torch.")


class Terms(Part):
    """What the model's owner lets a data owner train, and under which terms.

    Attributes:
        forms: whole layers ("full"), LoRA factors inside them ("lora"), or either.
        max_rank: of LoRA; None for any that fits.
        modules: that LoRA may be in, by the last part of their name; None for every linear one.
        licence: a note for people.
    """

    forms: Annotated[tuple[Form, ...], Field(min_length=1)] = ("full", "lora")
    max_rank: Size | None = None
    modules: tuple[Text, ...] | None = None
    licence: str = ""


class Manifest(Part):
    """What both manifests say.

    Attributes:
        package: random id.
        blocks: name of the list of decoder blocks.
        adapter_layers: the emulator's indices of the layers that train.
        start: fingerprint of these layers as they are handed out, by the emulator's names.
        terms: what may be trained.
    """

    version: Literal[1] = VERSION
    package: Text
    blocks: Text
    adapter_layers: Annotated[tuple[Index, ...], Field(min_length=1)]
    start: Text
    terms: Terms

    def is_adapter(self, name: str) -> bool:
        """Return whether a tensor of the emulator belongs to a layer that trains."""
        return any(name.startswith(f"{self.blocks}.{i}.") for i in self.adapter_layers)


class PublicManifest(Manifest):
    """`emulator.json`: all that a package says of itself.

    Attributes:
        architecture: class of transformers that the emulator is one of.
        is_plain: its configuration says all about its shapes, so that `AutoModelForCausalLM`
            loads it.
        n_layers: of the emulator.
        shared: pairs of layers; the first runs the weights of the second.
        tensors: by name, what is tied or shared under one name only.
        tokenizer: sha256 of its files; "" without one.
    """

    architecture: Text
    is_plain: bool
    n_layers: Size
    shared: tuple[tuple[Index, Index], ...]
    tensors: dict[str, TensorFacts]
    tokenizer: str


class OwnerRecord(Manifest):
    """`owner.json`: what the package leaves out; it never leaves the owner.

    Attributes:
        rest: fingerprint of every tensor of the original outside the adapter layers.
        dtype: of the original's weights.
        n_layers: of the original.
        positions: for each layer of the emulator, its place in the original.
        sources: for each, the layer of the original whose weights it runs.
        adapter: the tensors of the layers that train, by the emulator's names.
        about: plain facts: method, options, ratios, what was kept, seeds, quality.
    """

    rest: Text
    dtype: Dtype
    n_layers: Size
    positions: tuple[Index, ...]
    sources: tuple[Index, ...]
    adapter: dict[str, TensorFacts]
    about: dict[str, Any]


def read(kind: type[_Read], opened: Opened, name: str) -> _Read:
    """Return the manifest that a checked folder holds.

    Raises:
        CorruptFileError: it says what no manifest of ours does.
        IncompatibleRunError: a newer selectune wrote it.
    """
    value: object = opened.read_json(name)
    if isinstance(value, Mapping) and value.get("version") not in (None, VERSION):
        raise IncompatibleRunError(
            f"{name} has the version {value.get('version')!r:.80}",
            where=str(opened.path / name),
            why=f"this selectune reads version {VERSION}",
            do="upgrade selectune",
        )
    try:
        return kind.model_validate_json(opened.read_bytes(name))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise damaged(opened.path / name, f"{place:.200}: {first['msg']:.200}") from None


def damaged(file: Path, why: str) -> CorruptFileError:
    """Return the error for a file that somebody else has to send again."""
    return CorruptFileError(
        f"{file.name} is damaged", where=str(file), why=why, do="ask for the folder again"
    )
