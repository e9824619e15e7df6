"""Back into the whole model: what a data owner trained, around the owner's own middle.

Before a weight is changed, all of these hold; what fails is named, and nothing is written:
(1) only the expected files, no links, no pickles, none too large  (2) checksums  (3) this package
and its start values  (4) the original is the one that the package was made of  (5) tensor names
(6) shapes and types  (7) finite values. Afterwards (8) every other tensor is bit-identical, and
(9) how far each tensor moved is reported. None of this sees a backdoor in well-formed tensors:
evaluate a plugged model before it is used.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from selectune.errors import ConfigError
from selectune.files import open_dir, refuse_other_result, staged
from selectune.models import fingerprint
from selectune.offsite import manifests, plugging, plugin_files
from selectune.offsite.manifests import Form, OwnerRecord
from selectune.offsite.package import OWNER_KIND

TUNED_KIND = "tuned model"
_FAR = 1.0  # a tensor that moved by more than its own norm


@dataclass(frozen=True, slots=True, eq=False)
class Plugged:
    """A model with a plugin in its adapter layers.

    Attributes:
        model: the original, changed in place.
        form: whole layers, or LoRA that was merged.
        changes: by the original's tensor names, how far each moved: norm of the change over its
            own norm.
    """

    model: nn.Module
    form: Form
    changes: Mapping[str, float]


def plug(original: nn.Module | str | Path, plugin: str | Path, owner: str | Path) -> Plugged:
    """Put a plugin into the layers of the original that it was trained for.

    Args:
        original: the model that the package was made of; changed in place. Or where to load it
            from; what lies there is left as it is.
        plugin: the folder that a data owner sent.
        owner: the folder that was written with the package.

    Returns:
        The model, and how far each tensor moved; a warning names those that moved far. The same
        whole layers once more change nothing.

    Raises:
        CorruptFileError: a file is not what it should be.
        IncompatibleRunError: package, original or tensors do not belong together.
    """
    record = read_owner(owner)
    facts, opened = plugin_files.open_plugin(Path(plugin), record)
    model = _load(original, record) if isinstance(original, str | Path) else original
    adapter = plugging.adapter_of(model, record)
    tensors = plugin_files.read_tensors(facts, opened, record, plugging.linear_of(model, record))
    found = fingerprint(adapter)
    is_again = facts.form == "full" and found == fingerprint(tensors)
    if found != record.start and not is_again:
        why = "its layers that train are not as they were handed out"
        raise plugging.another_base(record, why)
    if facts.form == "lora":
        tensors = plugging.merged(model, record, tensors, facts.scales)
    changes = plugging.change(model, record, adapter, tensors)
    far = [name for name, change in changes.items() if change > _FAR]
    if far:
        warnings.warn(
            f"{len(far)} of {len(changes)} tensors moved by more than their own norm, the first is "
            f"{far[0]}, by {changes[far[0]]:.3g} times: evaluate the model before it is used",
            stacklevel=2,
        )
    return Plugged(model, facts.form, changes)


def plug_files(
    original: str | Path, plugin: str | Path, owner: str | Path, out: str | Path
) -> Plugged:
    """Write the model with a plugin in it as a new folder; the original's is left as it is.

    Args:
        original: folder of the original, or its name on the Hub.
        plugin: the folder that a data owner sent.
        owner: the folder that was written with the package.
        out: the folder to write; one that this function wrote is replaced at once.

    Raises:
        ConfigError: `out` lies in the original's folder, or the other way round.
        CorruptFileError: a file is not what it should be.
        IncompatibleRunError: package, original or tensors do not belong together.
        StorageError: the folder cannot be written, or holds something else.
    """
    target = Path(out).resolve()
    for folder in (original, plugin, owner):
        other = Path(folder).resolve()
        if other == target or other in target.parents or target in other.parents:
            raise ConfigError(
                f"the tuned model cannot be written to {out}",
                where=str(folder),
                why="one folder lies in the other, and neither may be overwritten",
                do="choose another output",
            )
    refuse_other_result(Path(out), TUNED_KIND)
    plugged = plug(original, plugin, owner)
    meta = {"package": read_owner(owner).package, "form": plugged.form}
    with staged(Path(out), kind=TUNED_KIND, meta=meta) as stage:
        cast("Any", plugged.model).save_pretrained(str(stage.path))
        tokenizer = _tokenizer(original)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(stage.path))
    return plugged


def read_owner(owner: str | Path) -> OwnerRecord:
    """Return what an owner kept of a package.

    Raises:
        CorruptFileError: the folder is none that was written with a package, or was changed.
    """
    opened = open_dir(Path(owner), kind=OWNER_KIND)
    return manifests.read(OwnerRecord, opened, manifests.OWNER)


def _load(original: str | Path, record: OwnerRecord) -> nn.Module:
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(original), dtype=getattr(torch, record.dtype), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'the original "{original}" cannot be loaded',
            where=str(original),
            why=str(error).strip().split("\n", 1)[0],
            do="give the folder, or the name on the Hub, that the package was made of",
        ) from error


def _tokenizer(original: str | Path) -> PreTrainedTokenizerBase | None:
    try:
        return cast("Any", AutoTokenizer).from_pretrained(str(original), trust_remote_code=False)
    except (OSError, ValueError):
        return None  # a model may come without
