"""The two folders that `emulate` ends in: one to hand out, one to keep.

    package/    an ordinary model folder: config.json, weights, tokenizer; emulator.json says which
                layers train, manifest.json holds the checksum of every file
    owner/      owner.json: what the package was made of, and how

The checksums find accidents. Nothing is signed: who sends another package can send other checksums.
"""

import copy
import hashlib
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from selectune.errors import ConfigError, SelectionError
from selectune.files import StagedDir, refuse_other_result, sha256_file, staged
from selectune.models import fingerprint
from selectune.offsite import manifests, traces
from selectune.offsite.arrangement import Arrangement
from selectune.offsite.emulator import block_prefix, original_name, own_tensors
from selectune.offsite.layout import Layout
from selectune.offsite.manifests import OwnerRecord, PublicManifest, TensorFacts, Terms
from selectune.offsite.pieces import CompressedLayer, MiddleLayer

KIND, OWNER_KIND = "package", "record of the owner"
# Another name where the configuration does not say all: `AutoModelForCausalLM` then finds no
# weights and says so, instead of filling what it misses with random numbers.
PLAIN_WEIGHTS, OWN_WEIGHTS = "model", "emulator"
SHARD_BYTES = 4 << 30
_MODEL_FILES = frozenset({"config.json", "generation_config.json"})


def save_package(
    emulator: nn.Module,
    original: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    layout: Layout,
    middle: Mapping[int, MiddleLayer],
    package: str | Path,
    owner: str | Path,
    about: Mapping[str, Any] | None = None,
    terms: Terms | None = None,
) -> PublicManifest:
    """Write an emulator as the package for the data owner, and what the owner keeps of it.

    Args:
        emulator: as `build_emulator` made it; its middle may have been trained since.
        original: what it was made of.
        tokenizer: of both.
        layout: which layers of the original train.
        middle: what became of the others.
        package: folder to hand out.
        owner: folder to keep.
        about: plain values for the owner's record: method, options, ratios, what was kept, seeds,
            quality.
        terms: what the data owner may train; by default all that can be plugged in.

    Returns:
        The public manifest.

    Raises:
        ConfigError: one folder would lie inside the other.
        SelectionError: the emulator differs from the original outside its middle.
        DataError: a file of the package would name the base.
        StorageError: a folder cannot be written, or holds something else.
    """
    package, owner = Path(package), Path(owner)
    _refuse_nested(package, owner)
    refuse_other_result(package, KIND)
    refuse_other_result(owner, OWNER_KIND)
    plan = Arrangement.of(layout, middle)
    prefix = block_prefix(original)
    own = own_tensors(emulator)
    _refuse_changed(own, original, prefix, plan)
    adapter = {n: t for n, t in own.items() if layer_of(n, prefix) in plan.adapters}
    common: dict[str, Any] = {
        "package": secrets.token_hex(16),
        "blocks": prefix,
        "adapter_layers": plan.adapters,
        "start": fingerprint(adapter),
        "terms": terms or Terms(),
    }
    record = OwnerRecord(
        **common,
        rest=fingerprint(tensors_outside(original, prefix, layout.adapters)),
        dtype=TensorFacts.of(next(original.parameters())).dtype,
        n_layers=layout.n_layers,
        positions=plan.positions,
        sources=plan.sources,
        adapter={name: TensorFacts.of(tensor) for name, tensor in adapter.items()},
        about=dict(about or {}),
    )
    is_plain = not plan.shared and not any(
        isinstance(layer, CompressedLayer) and layer.pieces for layer in middle.values()
    )
    # First what the package cannot be used without.
    with staged(owner, kind=OWNER_KIND, meta={"package": record.package}) as stage:
        stage.write_json(manifests.OWNER, record.model_dump(mode="json"))
    with staged(package, kind=KIND, meta={"package": record.package}) as stage:
        _write_texts(stage.path, emulator, original, tokenizer)
        manifest = PublicManifest(
            **common,
            architecture=type(emulator).__name__,
            is_plain=is_plain,
            n_layers=len(plan.positions),
            shared=tuple(sorted(plan.shared.items())),
            tensors={name: TensorFacts.of(tensor) for name, tensor in own.items()},
            tokenizer=_tokenizer_sha256(stage.path),
        )
        stage.write_json(manifests.PUBLIC, manifest.model_dump(mode="json"))
        _write_shards(stage, own, PLAIN_WEIGHTS if is_plain else OWN_WEIGHTS)
    return manifest


def tensors_outside(model: nn.Module, prefix: str, layers: Collection[int]) -> dict[str, Tensor]:
    """Return every tensor of a model but those of some of its layers.

    Args:
        model: any causal LM.
        prefix: of its decoder blocks.
        layers: indices of those that are left out.
    """
    return {n: t for n, t in model.state_dict().items() if layer_of(n, prefix) not in layers}


def layer_of(name: str, prefix: str) -> int | None:
    """Return the index of the decoder block that a tensor belongs to, None for no block."""
    if not name.startswith(f"{prefix}."):
        return None
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])


def _refuse_nested(package: Path, owner: Path) -> None:
    one, other = package.resolve(), owner.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ConfigError(
            "the owner's folder and the package lie in one another",
            where=f"{owner} and {package}",
            why="who is given the package would be given what must stay at home",
            do="choose two folders side by side",
        )


def _refuse_changed(
    own: Mapping[str, Tensor], original: nn.Module, prefix: str, plan: Arrangement
) -> None:
    """Refuse an emulator that differs outside its middle: plugging in would not fit."""
    held = original.state_dict()
    for name, tensor in own.items():
        index = layer_of(name, prefix)
        if index is not None and index not in plan.adapters:
            continue
        source = held.get(original_name(name, prefix, plan.positions))
        if source is None or source.dtype != tensor.dtype or not torch.equal(source, tensor):
            raise SelectionError(
                f"the emulator's {name} is not the original's",
                why="adapter layers, embeddings, norm and head are handed out as they are",
                do="train nothing but the emulator's middle before it is saved",
            )


def _write_texts(
    folder: Path,
    emulator: nn.Module,
    original: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write configuration and tokenizer, and take out of them where they came from."""
    made: Any = emulator
    config = copy.deepcopy(made.config)
    config.architectures = [type(emulator).__name__]
    config.save_pretrained(str(folder))
    made.generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    traces.strip(folder)
    origins = {cast("Any", model).config.name_or_path or "" for model in (emulator, original)}
    if tokenizer is not None:
        origins.add(tokenizer.name_or_path)
    traces.refuse_names(folder, origins)


def _tokenizer_sha256(folder: Path) -> str:
    """Return a checksum of all files of a tokenizer, "" where there is none."""
    digest = hashlib.sha256()
    files = [file for file in sorted(folder.iterdir()) if file.name not in _MODEL_FILES]
    for file in files:
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest() if files else ""


def _write_shards(stage: StagedDir, tensors: Mapping[str, Tensor], name: str) -> None:
    """Write tensors as transformers does: one file, or several with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    n_bytes = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and n_bytes + size > SHARD_BYTES:
            shards.append({})
            n_bytes = 0
        shards[-1][key] = tensor
        n_bytes += size
    if len(shards) == 1:
        stage.write_tensors(f"{name}{traces.TENSORS}", shards[0])
        return
    homes: dict[str, str] = {}
    for k, shard in enumerate(shards, start=1):
        file = f"{name}-{k:05d}-of-{len(shards):05d}{traces.TENSORS}"
        stage.write_tensors(file, shard)
        homes |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    stage.write_json(f"{name}{traces.TENSORS}.index.json", index)
