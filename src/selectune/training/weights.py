"""Trained weights in and out of folders: peft's format, our deltas, or a whole bare model."""

import json
from pathlib import Path
from typing import Any, cast

import peft
from torch import nn

from selectune.files import Opened
from selectune.training.sparse.saving import RESUMED, SparseModel
from selectune.weights.delta import SparseDelta
from selectune.weights.delta_files import TENSORS as DELTA

_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


def save_weights(model: nn.Module, folder: Path) -> None:
    """Save the adapter, or the whole of a bare model, the same bytes in every process."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, peft.PeftModel):
        cast("Any", model).save_pretrained(folder)  # a sparse model writes its delta
        return
    # "auto" would ask the Hub for the base model's vocabulary at every save.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # peft 0.21 writes sets of module names in the order of their hashes, which differ by process.
    for path in folder.rglob(_ADAPTER_CONFIG):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("target_modules", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_weights(model: nn.Module, opened: Opened, *, but: str = "") -> None:
    """Put saved weights into the model that they were trained from.

    Args:
        model: as it was before training.
        opened: a checkpoint, or a finished folder.
        but: a file of tensors that are no weights.
    """
    names = [n for n in opened.names if n.endswith(".safetensors") and n != but]
    if isinstance(model, SparseModel):
        if RESUMED in names:  # a checkpoint: values as they are, an adapter's beside them
            model.load_state_dict(opened.read_torch(RESUMED), strict=False)
            return
        names.remove(DELTA)
        model.sparse.load(SparseDelta.load(opened.path))
    for name in names:
        tensors = opened.read_torch(name)
        if isinstance(model, peft.PeftModel):
            cast("Any", peft).set_peft_model_state_dict(model, tensors)
        else:
            model.load_state_dict(tensors, strict=False)
