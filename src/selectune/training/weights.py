"""Trained weights in and out of folders: peft's format, or transformers' for a bare model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn

_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


def save_weights(model: nn.Module, folder: Path) -> None:
    """Save the adapter, or the whole of a bare model, the same bytes in every process."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, peft.PeftModel):
        cast("Any", model).save_pretrained(folder)
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


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved weights into the model that they were trained from."""
    if isinstance(model, peft.PeftModel):
        cast("Any", peft).set_peft_model_state_dict(model, dict(tensors))
        return
    with torch.no_grad():
        model.load_state_dict(dict(tensors), strict=False)
