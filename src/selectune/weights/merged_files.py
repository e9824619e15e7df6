"""A merged model as a plain folder that any tool loads, with what is needed to undo the merge."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selectune.errors import ConfigError, CorruptFileError, SelectionError
from selectune.files import open_dir, refuse_other_result, staged
from selectune.weights.base import base_fingerprint, base_weights, flat
from selectune.weights.merged import merged

KIND = "merged model"
OVERWRITTEN = "overwritten.safetensors"


def save_merged(
    model: nn.Module, path: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write a model with its merged deltas as `save_pretrained` does, and the base's values beside.

    Args:
        model: that deltas were merged into.
        path: the folder; one that this function wrote is replaced at once.
        tokenizer: to be saved with it.

    Raises:
        ConfigError: the model is no model of transformers, such as one with an adapter around it.
        SelectionError: nothing is merged into it.
        StorageError: the folder cannot be written.
    """
    handle = merged(model)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"a {type(model).__name__} cannot be saved as a plain model",
            why="only models of transformers write folders that any tool loads",
            do="save the base that is inside it",
        )
    if handle is None:
        raise SelectionError(
            "no delta is merged into this model", do="call selectune.merge first, or save it as is"
        )
    refuse_other_result(Path(path), KIND)
    kept: dict[str, Tensor] = {}
    for name, (places, values) in handle.overwritten.items():
        kept |= {f"{name}.idx": places, f"{name}.base": values}
    parts = [
        {"delta": key, "scale": part.scale, "about": dict(part.delta.about)}
        for key, part in handle.parts.items()
    ]
    meta = {"base": handle.base, "deltas": parts}
    with staged(Path(path), kind=KIND, meta=meta) as stage:
        model.save_pretrained(str(stage.path))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(stage.path))
        stage.write_tensors(OVERWRITTEN, kept)
    return Path(path)


@torch.no_grad()
def load_unmerged(path: str | Path) -> nn.Module:
    """Load what `save_merged` wrote as the base that it was made from, bit for bit.

    Raises:
        CorruptFileError: a byte is not what was written, or the base does not come out.
    """
    opened = open_dir(Path(path), kind=KIND)
    kept: Mapping[str, Tensor] = opened.read_torch(OVERWRITTEN)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        str(path), dtype="auto", trust_remote_code=False
    )
    weights = base_weights(model)
    for name in (key.removesuffix(".base") for key in kept if key.endswith(".base")):
        if name not in weights:
            raise _odd(path, f"the model has no {name}")
        try:
            flat(weights[name])[kept[f"{name}.idx"].long()] = kept[f"{name}.base"]
        except (KeyError, IndexError, RuntimeError) as error:
            raise _odd(path, f"{name}: {error}") from error
    found = base_fingerprint(model)
    if found != opened.meta.get("base"):
        raise _odd(path, f"expected the fingerprint {opened.meta.get('base')}, found {found}")
    return model


def _odd(path: str | Path, why: str) -> CorruptFileError:
    return CorruptFileError(
        "the base does not come out of this merged model",
        where=str(path),
        why=why,
        do="load the base itself",
    )
