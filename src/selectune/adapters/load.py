"""Put saved adapters back, each tensor in its place."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from selectune.adapters.add import quiet
from selectune.adapters.prefix import put_in_blocks
from selectune.errors import ConfigError, CorruptFileError, IncompatibleRunError
from selectune.files import open_dir, sha256_file
from selectune.models import Base
from selectune.training.sparse import SparseModel, sparsify
from selectune.training.trainer_folder import checkpoint_folders
from selectune.weights.delta import SparseDelta
from selectune.weights.merging import merge


def load_adapter(base: Base, path: str | Path) -> nn.Module:
    """Put a saved peft adapter onto its base, trainable, in evaluation-ready form.

    peft 0.21 loads an adapter of another model, or of one with fewer layers, without a word; here
    every tensor has to find its place.

    Raises:
        ConfigError: the folder holds no peft adapter, or a prefix that no block can own.
        IncompatibleRunError: the adapter was made for another base.
    """
    folder = Path(path)
    weights, _ = _adapter_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with safe_open(weights, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, TypeError, ValueError, KeyError) as error:
        raise CorruptFileError(
            "the adapter cannot be read",
            where=str(folder),
            why=str(error),
            do="copy the adapter again",
        ) from error
    for p in base.model.parameters():
        p.requires_grad_(False)
    try:
        with quiet():
            # peft 0.21 refuses to load a prefix as trainable; in the blocks it trains all the same.
            adapted = PeftModel.from_pretrained(
                cast("Any", base.model),
                str(folder),
                config=config,
                is_trainable=not isinstance(config, PrefixTuningConfig),
            )
    except (RuntimeError, ValueError) as error:
        raise _other_base(folder, str(error).split("\n", 1)[0]) from error
    # peft names tensors otherwise on disk than in the model: DoRA's magnitudes, whole modules.
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    places = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    missing, extra = places.keys() - found.keys(), found.keys() - places.keys()
    odd = [name for name in places.keys() & found.keys() if places[name] != found[name]]
    if missing or extra or odd:
        first = sorted(missing or extra or odd)[0]
        raise _other_base(
            folder,
            f"{len(missing)} tensors are missing, {len(extra)} have no place in this model and "
            f"{len(odd)} have another shape; the first is {first}",
        )
    if isinstance(config, PrefixTuningConfig):
        put_in_blocks(adapted)
    return cast("nn.Module", adapted)


def adapter_fingerprint(path: str | Path) -> str:
    """Return a short hash of a saved adapter, its configuration included.

    Raises:
        ConfigError: the folder holds no peft adapter.
    """
    return _hash_of(_adapter_files(Path(path)))


def checkpoints_fingerprint(path: str | Path, n: int | None = None) -> str:
    """Return a short hash of a Trainer's checkpoints: adapters, optimizer states, learning rates.

    Args:
        path: its `output_dir`, or one `checkpoint-N` in it.
        n: how many, from the first; None for all.

    Raises:
        ConfigError: there are fewer, or one holds no peft adapter.
    """
    files: list[Path] = []
    for checkpoint in checkpoint_folders(path, n):
        states = (checkpoint / name for name in ("optimizer.pt", "trainer_state.json"))
        files += [*_adapter_files(checkpoint), *(file for file in states if file.exists())]
    return _hash_of(files)


def _hash_of(files: Iterable[Path]) -> str:
    parts = "".join(f"{file.name} {sha256_file(file)};" for file in files)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _adapter_files(folder: Path) -> tuple[Path, Path]:
    files = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not all(file.exists() for file in files):
        raise ConfigError(
            f"no peft adapter in {folder}",
            where="model.adapter",
            why="a peft adapter is adapter_config.json beside adapter_model.safetensors",
            do="give the folder that peft's save_pretrained wrote, or one checkpoint-N of a "
            "Trainer; only less and tracin read all of a Trainer's checkpoints",
        )
    return files


def _other_base(folder: Path, why: str) -> IncompatibleRunError:
    return IncompatibleRunError(
        "the adapter was made for another base model",
        where=str(folder),
        why=why,
        do="set model.base to the model that adapter_config.json names",
    )


def load_tuned(base: Base, path: Path) -> nn.Module:
    """Return the base with what `tune` saved: an adapter or a delta on it, or the whole model.

    Raises:
        CorruptFileError: the folder is not what its manifest says.
        IncompatibleRunError: the adapter was made for another base.
    """
    opened = open_dir(path, kind="adapter")
    delta = SparseDelta.load(path) if "sparse.json" in opened.names else None
    is_composed = delta is not None and delta.about.get("form") == "compose"
    if delta is not None and not is_composed:
        merge(base.model, delta)
    has_adapter = "adapter_config.json" in opened.names
    model = load_adapter(base, path) if has_adapter else base.model
    if delta is not None and is_composed:  # in half precision a merge would round it
        sparsify(model, delta.mask(), form="compose")
        cast("SparseModel", model).sparse.load(delta)
    if delta is not None or has_adapter:
        return model
    tensors: dict[str, Tensor] = {}
    for name in opened.names:
        if name.endswith(".safetensors"):
            tensors |= opened.read_torch(name)
    places = base.model.state_dict()
    # A tied tensor is saved once, under one of its names.
    held = {places[n].data_ptr() for n in tensors if n in places}
    missing = [n for n, t in places.items() if n not in tensors and t.data_ptr() not in held]
    extra = tensors.keys() - places.keys()
    if missing or extra:
        why = f"{len(missing)} tensors are missing and {len(extra)} have no place in this model"
        raise _other_base(path, why)
    for name, tensor in tensors.items():
        # What trained was held wider than the rest; it answers as it trained.
        places[name].data = places[name].data.to(tensor.dtype)
    base.model.load_state_dict(tensors, strict=False)
    return base.model
