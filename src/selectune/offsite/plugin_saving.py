"""What a data owner sends back: the layers that were trained, or the LoRA factors inside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import ConfigError, IncompatibleRunError, SelectionError, TrainingError
from selectune.files import Opened
from selectune.offsite import plugin_files, traces
from selectune.offsite.loading import open_package
from selectune.offsite.manifests import Form, PublicManifest
from selectune.offsite.plugin_files import A, B, check_terms
from selectune.weights.base import bare_name

_LINEAR = (nn.Linear, Conv1D)


def save_plugin(model: nn.Module, package: str | Path, out: str | Path) -> Path:
    """Write what training changed in an emulator, and nothing else.

    Args:
        model: the emulator of a package, trained as whole layers, or with LoRA by peft.
        package: its folder.
        out: folder to send back; an older plugin there is replaced.

    Raises:
        ConfigError: an adapter that cannot be plugged in.
        IncompatibleRunError: LoRA, or whole layers, that the package does not allow.
        SelectionError: the model is not the package's emulator, or more of it was trained.
        TrainingError: a trained value is not a finite number.
    """
    manifest, opened = open_package(package)
    form: Form = "lora" if isinstance(model, PeftModel) else "full"
    if form not in manifest.terms.forms:
        raise IncompatibleRunError(
            f'the package does not allow training of the form "{form}"',
            where=str(package),
            why=f"allowed is {' or '.join(manifest.terms.forms)}",
        )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    held = {bare_name(name): tensor for name, tensor in inner.state_dict().items()}
    _refuse_changed(held, manifest, opened, but_adapter=form == "full")
    scales: dict[str, float] = {}
    if isinstance(model, PeftModel):
        tensors, scales = _factors(model, manifest)
    else:
        tensors = {
            name: held[name].detach().to(getattr(torch, facts.dtype))
            for name, facts in manifest.tensors.items()
            if manifest.is_adapter(name)
        }
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise TrainingError(
                f"{name} holds values that are not finite numbers",
                why="training went astray, or a value does not fit the package's type",
                do="lower the learning rate",
            )
    plugin_files.write(Path(out), manifest, form, tensors, scales)
    return Path(out)


def _refuse_changed(
    held: Mapping[str, Tensor], manifest: PublicManifest, opened: Opened, *, but_adapter: bool
) -> None:
    """Refuse an emulator of which more was trained than may be, or another model."""
    for file in opened.names:
        if not file.endswith(traces.TENSORS):
            continue
        for name, stored in opened.read_torch(file).items():
            tensor = held.get(name)
            if tensor is None or tensor.shape != stored.shape:
                raise SelectionError(
                    "the model is not the emulator of this package",
                    where=str(opened.path),
                    why=f"{name} is missing, or of another shape",
                    do="load it by selectune.Emulator.from_pretrained, and train that",
                )
            if but_adapter and manifest.is_adapter(name):
                continue
            if not torch.equal(tensor.cpu(), stored.to(tensor.dtype)):
                raise SelectionError(
                    f"{name} is not what the package holds",
                    where=str(opened.path),
                    why="only the layers that the package names are plugged in; the rest has to "
                    "stay as it is",
                    do=f"train the layers {list(manifest.adapter_layers)} and no others",
                )


def _factors(
    model: PeftModel, manifest: PublicManifest
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the factors of a LoRA in fp32, and their scales by module."""
    adapter = str(model.active_adapter)
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig):
        raise _no_plain_lora(f"it is of the type {config.peft_type}")
    if config.use_dora or config.bias != "none" or config.modules_to_save:
        raise _no_plain_lora("it uses DoRA, biases or modules_to_save")
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not manifest.is_adapter(f"{name}.") or type(module.get_base_layer()) not in _LINEAR:
            raise _no_plain_lora(f"{name} is no linear module of the layers that may be trained")
        first, second = (
            cast("Any", part)[adapter].weight for part in (module.lora_A, module.lora_B)
        )
        check_terms(name, first.shape[0], manifest.terms, name)
        tensors |= {
            f"{name}{A}": first.detach().float(),
            f"{name}{B}": second.detach().float(),
        }
        scales[name] = float(module.scaling[adapter])
    return tensors, scales


def _no_plain_lora(why: str) -> ConfigError:
    return ConfigError(
        "this adapter cannot be plugged in",
        where="adapter",
        why=why,
        do="train the package's layers themselves (kind: full), or plain LoRA inside them",
    )
