"""The `checkpoint-N` folders of any transformers Trainer: weights, Adam's moments, learning rates.

A Trainer numbers what it trains: first the parameters with weight decay, then those without, each
in the model's own order. `optimizer.pt` has these numbers and no names, so names are found anew
from the model, and every shape is compared. What does not fit is refused, never guessed.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from selectune.errors import ConfigError, CorruptFileError, IncompatibleRunError
from selectune.gradients.adam import Moments
from selectune.gradients.capture import trainable

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE, _OPTIMIZER = "trainer_state.json", "optimizer.pt"


@dataclass(frozen=True, slots=True)
class TrainerCheckpoint:
    """One checkpoint of a training.

    Args:
        path: its folder.
        step: optimizer steps that lie behind it.
        learning_rate: mean of the rates that were logged since the checkpoint before.
    """

    path: Path
    step: int
    learning_rate: float


def trainer_checkpoints(folder: str | Path, n: int | None = None) -> list[TrainerCheckpoint]:
    """Return the checkpoints of a Trainer, oldest first.

    Args:
        folder: its `output_dir`, or one `checkpoint-N` in it.
        n: how many, from the first; None for all.

    Raises:
        ConfigError: there is no checkpoint, there are fewer than n, no learning rate was logged on
            the way to one, or all of them are 0.
        CorruptFileError: a `trainer_state.json` cannot be read.
    """
    found: list[TrainerCheckpoint] = []
    before = 0
    for path in checkpoint_folders(folder, n):
        state = _trainer_state(path)
        step = int(state["global_step"])
        rates = [
            float(row["learning_rate"])
            for row in state["log_history"]
            if "learning_rate" in row and before < row["step"] <= step
        ]
        if not rates:
            raise ConfigError(
                f"no learning rate was logged in the steps {before + 1} to {step}",
                where=str(path / _STATE),
                why="a checkpoint counts by the mean learning rate of the steps that led to it",
                do="train with logging_steps=1, or at least one log line between two checkpoints",
            )
        found.append(TrainerCheckpoint(path, step, sum(rates) / len(rates)))
        before = step
    # A schedule with a warm-up begins at 0: a first epoch of one step counts for nothing.
    if not any(one.learning_rate > 0 for one in found):
        raise ConfigError(
            f"no learning rate above 0 was logged up to step {before}",
            where=str(folder),
            why="checkpoints count by the learning rates that led to them, and all of these are 0",
            do="train for more steps: more epochs, or more examples to warm up on",
        )
    return found


def checkpoint_folders(folder: str | Path, n: int | None = None) -> list[Path]:
    """Return the `checkpoint-N` folders in a Trainer's output, by number; or the one named itself.

    Args:
        folder: the output, or one `checkpoint-N` in it.
        n: how many, from the first; None for all.

    Raises:
        ConfigError: there is none, or there are fewer than n.
    """
    root = Path(folder)
    if (root / _STATE).exists() and _NAME.fullmatch(root.resolve().name):
        found = [root]
    else:
        inside = list(root.iterdir()) if root.is_dir() else []
        named = [(m, p) for p in inside if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
        found = [path for _, path in sorted((int(m[1]), path) for m, path in named)]
    if not found:
        raise ConfigError(
            f"no checkpoint in {folder}",
            where=str(folder),
            why="a Trainer leaves folders called checkpoint-1, checkpoint-2 and so on",
            do="give the output_dir of a Trainer that saved checkpoints, or one checkpoint-N",
        )
    if (n or 1) > len(found):
        raise ConfigError(
            f"{n} checkpoints are asked for, {len(found)} are there",
            where=str(folder),
            why="the option epochs says at how many checkpoints gradients are taken",
            do=f"use epochs={len(found)} or less, or none to read all of them",
        )
    return found[:n]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of a model holds: its adapter, or all of a bare model."""
    if isinstance(model, peft.PeftModel):
        return peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return model.state_dict()


def set_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `weights_of` returned."""
    if isinstance(model, peft.PeftModel):
        cast("Any", peft).set_peft_model_state_dict(model, dict(tensors))
    else:
        model.load_state_dict(tensors, strict=False)


def put_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a model of the same making.

    Raises:
        ConfigError: the folder holds no weights.
        CorruptFileError: they cannot be read.
        IncompatibleRunError: a tensor is missing, has no place, or has another shape.
    """
    is_peft = isinstance(model, peft.PeftModel)
    pattern = "adapter_model.safetensors" if is_peft else "model*.safetensors"
    files = sorted(checkpoint.glob(pattern))
    if not files:
        raise ConfigError(
            f"no weights in {checkpoint}",
            where=str(checkpoint),
            why="an adapter lies in adapter_model.safetensors, a whole model in model.safetensors",
            do="give the checkpoints of the model that is scored with",
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CorruptFileError(
                "the weights cannot be read", where=str(file), why=str(error), do="copy them again"
            ) from error
    places = weights_of(model)
    # A tied tensor is saved once, under one of its names.
    held = {places[name].data_ptr() for name in tensors if name in places}
    missing = [n for n, t in places.items() if n not in tensors and t.data_ptr() not in held]
    odd = [n for n, t in tensors.items() if n not in places or places[n].shape != t.shape]
    if missing or odd:
        raise IncompatibleRunError(
            "the checkpoint was made of another model",
            where=str(checkpoint),
            why=f"{len(missing)} tensors are missing and {len(odd)} have no place of their shape; "
            f"the first is {sorted(missing or odd)[0]}",
            do="give the model that this Trainer trained, with the same adapter configuration",
        )
    set_weights(model, tensors)


def read_moments(model: nn.Module, checkpoint: Path) -> dict[str, Moments]:
    """Return Adam's moments of every trainable parameter, by name.

    Args:
        model: what was trained, with the same parameters trainable.
        checkpoint: a folder with `optimizer.pt`.

    Raises:
        ConfigError: there is no optimizer state, or it is none of Adam's.
        CorruptFileError: the state cannot be read.
        IncompatibleRunError: it is of other parameters.
    """
    path = checkpoint / _OPTIMIZER
    if not path.exists():
        raise ConfigError(
            f"no {_OPTIMIZER} in {checkpoint.name}",
            where=str(checkpoint),
            why="Adam's step at an example needs the moments that training left; the Trainer "
            "leaves them out with save_only_model=True, and under FSDP or DeepSpeed in other files",
            do='train again in one process with save_only_model=False, or use adam="none"',
        )
    state = _optimizer_state(path)
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    found: dict[str, Moments] = {}
    for names, group in zip(_orders(model, state, path), state["param_groups"], strict=True):
        for name, key in zip(names, group["params"], strict=True):
            entry = state["state"].get(key)
            found[name] = _moments(name, parameters[name], entry, group, path, device)
    return found


def _orders(model: nn.Module, state: Mapping[str, Any], path: Path) -> list[list[str]]:
    """Return the names of each group of the optimizer, in the order of its numbers."""
    names = list(trainable(model))
    # A method of the Trainer that reads nothing of it: the rule of the installed version.
    decays = set(Trainer.get_decay_parameter_names(cast("Any", None), cast("Any", model)))
    sizes = [len(group["params"]) for group in state["param_groups"]]
    orders = [[n for n in names if n in decays], [n for n in names if n not in decays]]
    if len(sizes) == 1:  # an optimizer made by hand over model.parameters()
        orders = [names]
    if sizes != [len(order) for order in orders]:
        raise IncompatibleRunError(
            "the optimizer state is of other parameters",
            where=str(path),
            why=f"its groups hold {_listed(sizes)} parameters; of this model "
            f"{_listed([len(order) for order in orders])} train, with and without weight decay",
            do="give the model that this Trainer trained, with the same parameters trainable",
        )
    return orders


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def _moments(
    name: str,
    parameter: nn.Parameter,
    entry: Mapping[str, Any] | None,
    group: Mapping[str, Any],
    path: Path,
    device: torch.device,
) -> Moments:
    if entry is None or not {"exp_avg", "exp_avg_sq", "step"} <= entry.keys():
        has = "nothing" if entry is None else ", ".join(sorted(map(str, entry)))
        raise ConfigError(
            f"the optimizer kept no moments of {name}",
            where=str(path),
            why=f"Adam keeps exp_avg, exp_avg_sq and step of what it trains; here stands {has}",
            do='train all of these parameters with AdamW (optim="adamw_torch"), or use adam="none"',
        )
    m, v = (entry[key].to(device, torch.float32) for key in ("exp_avg", "exp_avg_sq"))
    if m.shape != parameter.shape or v.shape != parameter.shape:
        raise IncompatibleRunError(
            f"the moments of {name} have another shape",
            where=str(path),
            why=f"they are {list(m.shape)} and {list(v.shape)}, the parameter is "
            f"{list(parameter.shape)}",
            do="give the model that this Trainer trained, with the same adapter configuration",
        )
    betas, eps = group["betas"], float(group["eps"])
    return Moments(m, v, int(entry["step"]), (float(betas[0]), float(betas[1])), eps)


def _optimizer_state(path: Path) -> Mapping[str, Any]:
    try:
        # torch's own file, as the Trainer left it; `weights_only` makes tensors and plain
        # containers of it and runs nothing.
        data = io.BytesIO(path.read_bytes())
        state = torch.load(data, map_location="cpu", weights_only=True)  # noqa: TID251
        _ = state["state"], [group["params"] for group in state["param_groups"]]
    except Exception as error:  # an unpickler fails in any way it likes
        raise CorruptFileError(
            "the optimizer state cannot be read",
            where=str(path),
            why=str(error).split("\n", 1)[0],
            do="copy the checkpoint again",
        ) from error
    return state


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        _ = int(state["global_step"]), [row["step"] for row in state["log_history"]]
    except FileNotFoundError as error:
        raise ConfigError(
            f"no {_STATE} in {checkpoint.name}",
            where=str(checkpoint),
            why="the Trainer keeps its steps and learning rates there",
            do="give a folder that transformers.Trainer wrote",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            "the Trainer's state cannot be read",
            where=str(path),
            why=str(error),
            do="copy the checkpoint again",
        ) from error
    return state
