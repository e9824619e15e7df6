"""A package on the data owner's side: checked in every byte, then loaded without foreign code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from selectune.files import Opened, open_dir
from selectune.files.disk import exists
from selectune.files.manifest import read_manifest
from selectune.models import blocks
from selectune.offsite import manifests, traces
from selectune.offsite.emulator import empty_model, fill, own_tensors, share
from selectune.offsite.manifests import PublicManifest, damaged
from selectune.offsite.modules import pieces_of_shapes, put_pieces
from selectune.offsite.package import KIND, layer_of

# What a model may compute of its configuration alone: masks, positions. Real ones take megabytes.
_BUFFER_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Emulator:
    """An emulator as its data owner has it.

    Attributes:
        model: a causal LM of transformers; train it like any other.
        manifest: what the package says of itself: which layers train, under which terms.
    """

    model: PreTrainedModel
    manifest: PublicManifest

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        attention: str = "sdpa",
    ) -> "Emulator":
        """Check a package and load it; only the layers that may be trained take gradients.

        Args:
            folder: the package.
            dtype: of the weights; None for the one that they are stored in.
            attention: implementation of attention.

        Raises:
            CorruptFileError: a file is missing, too many, changed, or of a kind that is not
                exchanged.
            IncompatibleRunError: a newer selectune wrote it.
        """
        manifest, opened = open_package(folder)
        model = _load(manifest, opened, dtype, attention)
        trained = set(manifest.adapter_layers)
        for p in model.parameters():
            p.requires_grad_(False)
        for index, block in enumerate(blocks(model)):
            for p in block.parameters():
                if index in trained:
                    p.requires_grad_(True)
        return cls(cast("PreTrainedModel", model), manifest)

    @property
    def adapter_layers(self) -> tuple[int, ...]:
        """Indices of the layers that train."""
        return self.manifest.adapter_layers


def load_emulator(
    folder: str | Path, *, dtype: torch.dtype | None = None, attention: str = "sdpa"
) -> nn.Module:
    """Return the bare model of a package; see `Emulator.from_pretrained`."""
    return Emulator.from_pretrained(folder, dtype=dtype, attention=attention).model


def open_package(folder: str | Path) -> tuple[PublicManifest, Opened]:
    """Check every file of a package; nothing of it is run or loaded.

    Raises:
        CorruptFileError: a file is missing, too many, changed, or of a kind that is not exchanged.
        IncompatibleRunError: a newer selectune wrote it.
    """
    path = Path(folder)
    opened = open_dir(path, kind=KIND)
    traces.refuse_foreign_files(path, opened.names)
    traces.refuse_code(path, opened.names)
    manifest = manifests.read(PublicManifest, opened, manifests.PUBLIC)
    _refuse_contradictions(manifest, path / manifests.PUBLIC)
    return manifest, opened


def manifest_of(folder: str | Path) -> PublicManifest:
    """Return what a package says of itself; its weights are checked when they are loaded.

    Raises:
        CorruptFileError: the folder is no package, or its manifest was changed.
        IncompatibleRunError: a newer selectune wrote it.
    """
    path = Path(folder)
    return manifests.read(PublicManifest, Opened(path, read_manifest(path, KIND)), manifests.PUBLIC)


def adapter_layers(folder: str | Path) -> tuple[int, ...]:
    """Return which layers of a package train, by the emulator's numbers; see `manifest_of`."""
    return manifest_of(folder).adapter_layers


def is_package(folder: str | Path) -> bool:
    """Return whether a folder claims to be an emulator package."""
    return exists(Path(folder) / manifests.PUBLIC)


def _refuse_contradictions(manifest: PublicManifest, file: Path) -> None:
    n, shared = manifest.n_layers, dict(manifest.shared)
    names: set[int] = set()
    for name in manifest.tensors:
        try:
            names.add(-1 if (index := layer_of(name, manifest.blocks)) is None else index)
        except ValueError:
            raise damaged(file, f"{name:.200} is in no layer") from None
    # Every layer holds tensors or shares them, so what was read bounds how many there can be.
    if n > len(names) + len(shared) or names - {-1} != set(range(n)) - set(shared):
        raise damaged(file, f"its tensors are not those of {n} layers, of which some are shared")
    trained = manifest.adapter_layers
    if list(trained) != sorted(set(trained)) or trained[-1] >= n:
        raise damaged(file, f"of {n} layers {list(trained)} shall train")
    for index, source in manifest.shared:
        if source in shared or source >= n or index in trained or source in trained:
            raise damaged(file, f"layer {index} cannot share the weights of layer {source}")


def outline(folder: str | Path) -> nn.Module:
    """Return the model of a package as shapes only, its parameters on "meta".

    Raises:
        CorruptFileError: a file is missing, too many, changed, or of a kind that is not exchanged.
        IncompatibleRunError: a newer selectune wrote it.
    """
    return _empty(*open_package(folder), attention="sdpa")


def _load(
    manifest: PublicManifest, opened: Opened, dtype: torch.dtype | None, attention: str
) -> nn.Module:
    model = _empty(manifest, opened, attention=attention)
    fill(model, _tensors(manifest, opened, dtype))
    if "generation_config.json" in opened.names:
        loaded = GenerationConfig.from_pretrained(str(opened.path))
        cast("Any", model).generation_config = loaded
    return model.eval()


def _empty(manifest: PublicManifest, opened: Opened, *, attention: str) -> nn.Module:
    """Return the model that a package describes, its parameters on "meta"."""
    folder = opened.path
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if config.num_hidden_layers != manifest.n_layers:
            raise ValueError(f"config.json has {config.num_hidden_layers} layers")
        # First without memory for anything: nobody knows yet how large a model it describes.
        with torch.device("meta"):
            _refuse_another(empty_model(config, attention=attention), manifest)
        model = empty_model(config, attention=attention)
        _shape(model, manifest)
    except ImportError:
        raise  # a library of the attention that was asked for
    except Exception as error:  # transformers checks a configuration with errors of many classes
        first = str(error).strip().split("\n", 1)[0]
        why = f"config.json and it do not make up a model: {first:.300}"
        raise damaged(folder / manifests.PUBLIC, why) from error
    return model


def _refuse_another(model: nn.Module, manifest: PublicManifest) -> None:
    """Refuse a configuration of another model than the manifest describes.

    Raises:
        ValueError: it is.
    """
    _shape(model, manifest)
    found = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    told = {name: facts.shape for name, facts in manifest.tensors.items()}
    if type(model).__name__ != manifest.architecture or found != told:
        odd = sorted(n for n in found.keys() | told.keys() if found.get(n) != told.get(n))
        raise ValueError(
            f"a {type(model).__name__} of {len(found)} tensors comes of it; {len(odd)} are not "
            f"those listed, the first is {(odd or ['none'])[0]:.200}"
        )
    n_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if n_bytes > _BUFFER_BYTES:
        raise ValueError(f"it asks for {n_bytes} bytes of masks and positions")


def _shape(model: nn.Module, manifest: PublicManifest) -> None:
    """Give the empty model of a plain configuration the modules that the package has."""
    shared = dict(manifest.shared)
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, facts in manifest.tensors.items():
        index = layer_of(name, manifest.blocks)
        if index is not None:
            inside = name.removeprefix(f"{manifest.blocks}.{index}.")
            shapes.setdefault(index, {})[inside] = facts.shape
    for index, block in enumerate(blocks(model)):
        if index not in manifest.adapter_layers:
            here = shapes[shared.get(index, index)]
            put_pieces(block, pieces_of_shapes(block, here))
    share(model, shared)


def _tensors(
    manifest: PublicManifest, opened: Opened, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return all tensors of a package, each exactly as its manifest describes it."""
    tensors: dict[str, Tensor] = {}
    for name in opened.names:
        if not name.endswith(traces.TENSORS):
            continue
        for key, tensor in opened.read_torch(name).items():
            facts = manifest.tensors.get(key)
            if facts is None or key in tensors or not facts.describes(tensor):
                raise damaged(opened.path / name, f'its tensor "{key:.200}" is not as described')
            is_cast = dtype is not None and tensor.is_floating_point()
            tensors[key] = tensor.to(dtype) if is_cast else tensor
    missing = manifest.tensors.keys() - tensors.keys()
    if missing:
        raise damaged(opened.path / manifests.PUBLIC, f'no file holds "{min(missing):.200}"')
    return tensors
