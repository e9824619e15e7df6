"""The folder that a data owner sends back, and all that its receiver checks before using it.

    adapter.safetensors    the layers that were trained, or the LoRA factors inside them
    manifest.json          package id, form, names, shapes and types; the checksum of both

No text, no ids, no losses, no counts.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from selectune.errors import CorruptFileError, IncompatibleRunError
from selectune.files import MANIFEST, Opened, open_dir, refuse_other_result, staged
from selectune.files.disk import storage_errors
from selectune.offsite import traces
from selectune.offsite.manifests import (
    VERSION,
    Form,
    Manifest,
    OwnerRecord,
    Part,
    TensorFacts,
    Terms,
    Text,
    damaged,
)

KIND = "plugin"
TENSORS = "adapter.safetensors"
A, B = ".lora_A", ".lora_B"
# A safetensors header takes some hundred bytes for a tensor.
_HEADER_BYTES, _HEADER_BYTES_EACH = 4096, 1024


class PluginFacts(Part):
    """What a plugin says of itself.

    Attributes:
        package: id of the package that it was trained on.
        start: fingerprint of what the package's layers were before training.
        form: whole layers ("full"), or LoRA factors ("lora").
        tensors: by the emulator's names.
        scales: of LoRA: module -> what the product of its factors is multiplied by.
    """

    version: Literal[1] = VERSION
    package: Text
    start: Text
    form: Form
    tensors: dict[str, TensorFacts] = Field(min_length=1)
    scales: dict[str, float] = Field(default_factory=dict)


def write(
    out: Path, manifest: Manifest, form: Form, tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
) -> None:  # fmt: skip
    """Write a plugin; see `plugin.save_plugin`."""
    refuse_other_result(out, KIND)
    facts = PluginFacts(
        package=manifest.package,
        start=manifest.start,
        form=form,
        tensors={name: TensorFacts.of(tensor) for name, tensor in tensors.items()},
        scales=dict(scales),
    )
    with staged(out, kind=KIND, meta=facts.model_dump(mode="json")) as stage:
        stage.write_tensors(TENSORS, tensors)


def open_plugin(path: Path, record: OwnerRecord) -> tuple[PluginFacts, Opened]:
    """Check a plugin's files and where it comes from, in this order, before any is parsed.

    1. Only the two files, no links, none larger than its tensors can be.  2. Checksums.
    3. This package, these start values, a form that was agreed.

    Raises:
        CorruptFileError: a file is too many, missing, too large, or changed.
        IncompatibleRunError: it was trained on another package, or in another form.
    """
    if path.is_dir():
        traces.refuse_foreign_files(path, {TENSORS})
        _refuse_oversize(path / TENSORS, record)
    opened = open_dir(path, kind=KIND)
    if opened.names != (TENSORS,):
        raise damaged(path / MANIFEST, f"its files are {', '.join(opened.names) or 'none'}")
    try:
        facts = PluginFacts.model_validate_json(json.dumps(opened.meta))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise damaged(path / MANIFEST, f"{place:.200}: {first['msg']:.200}") from None
    if facts.package != record.package:
        raise _of_another(path, "another package", facts.package, record.package)
    if facts.start != record.start:
        raise _of_another(path, "other start values", facts.start, record.start)
    if facts.form not in record.terms.forms:
        raise IncompatibleRunError(
            f'the plugin is of the form "{facts.form}"',
            where=str(path / MANIFEST),
            why=f"agreed is {' or '.join(record.terms.forms)}",
        )
    return facts, opened


def read_tensors(
    facts: PluginFacts, opened: Opened, record: OwnerRecord, linear: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Return a plugin's tensors after their names, shapes, types and values were checked.

    Args:
        facts: from `open_plugin`.
        opened: from `open_plugin`.
        record: what the owner kept.
        linear: outputs and inputs of every linear module in the layers that train, by the
            emulator's name.

    Raises:
        CorruptFileError: the tensors are not those that its manifest lists, or no numbers.
        IncompatibleRunError: they are not those of the layers that train.
    """
    file = opened.path / TENSORS
    tensors = opened.read_torch(TENSORS)
    odd = sorted(
        name
        for name in tensors.keys() | facts.tensors.keys()
        if name not in tensors
        or name not in facts.tensors
        or not facts.tensors[name].describes(tensors[name])
    )
    if odd:
        raise damaged(file, f'its tensor "{odd[0]:.200}" is not as its manifest describes it')
    expected = record.adapter
    if facts.form == "lora":
        expected = _factors(facts, file, record.terms, linear)
    elif facts.scales:
        raise damaged(opened.path / MANIFEST, "it has scales of LoRA and whole layers")
    for kind, names in (("extra", tensors.keys() - expected.keys()),
                        ("missing", expected.keys() - tensors.keys())):  # fmt: skip
        if names:
            raise IncompatibleRunError(
                f'the tensor "{min(names):.200}" is {kind}',
                where=str(file),
                why="a plugin holds the tensors of the layers that train, all of them and no other",
                do="ask the data owner for what `selectune tune` wrote",
            )
    for name, tensor in tensors.items():
        if not expected[name].describes(tensor):
            raise IncompatibleRunError(
                f'the tensor "{name:.200}" is {facts.tensors[name]}',
                where=str(file),
                why=f"it should be {expected[name]}",
                do="ask the data owner for what `selectune tune` wrote",
            )
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CorruptFileError(
                f'the tensor "{name}" holds values that are not finite numbers',
                where=str(file),
                why="training went astray, or the file was tampered with",
                do="ask the data owner to train again with a lower learning rate",
            )
    return tensors


def check_terms(module: str, rank: int, terms: Terms, where: str) -> None:
    """Refuse LoRA factors that were not agreed.

    Args:
        module: that they are in.
        rank: of theirs.
        terms: what was agreed.
        where: for the message.

    Raises:
        IncompatibleRunError: another module, or a larger rank.
    """
    leaf = module.rpartition(".")[-1]
    if terms.modules is not None and leaf not in terms.modules:
        raise IncompatibleRunError(
            f'"{module:.200}" has LoRA factors',
            where=where,
            why=f"agreed are those in {', '.join(terms.modules)}",
        )
    if terms.max_rank is not None and rank > terms.max_rank:
        raise IncompatibleRunError(
            f'the factors of "{module:.200}" have the rank {rank}',
            where=where,
            why=f"agreed are ranks up to {terms.max_rank}",
        )


def _factors(
    facts: PluginFacts, file: Path, terms: Terms, linear: Mapping[str, tuple[int, int]]
) -> dict[str, TensorFacts]:
    """Return what the factors of the modules that a plugin names have to be."""
    expected: dict[str, TensorFacts] = {}
    for module, scale in facts.scales.items():
        if module not in linear:
            raise IncompatibleRunError(
                f'"{module:.200}" is no linear module of a layer that trains',
                where=str(file),
                do="ask the data owner for what `selectune tune` wrote",
            )
        if not math.isfinite(scale):
            raise damaged(file, f'the scale of "{module}" is {scale}')
        first = facts.tensors.get(f"{module}{A}")
        # One that is missing is named later, with all names at hand.
        rank = first.shape[0] if first is not None and first.shape else 1
        n_out, n_in = linear[module]
        check_terms(module, rank, terms, str(file))
        if rank > min(n_out, n_in):
            raise damaged(file, f'the factors of "{module}" have the rank {rank}')
        expected[f"{module}{A}"] = TensorFacts(shape=(rank, n_in), dtype="float32")
        expected[f"{module}{B}"] = TensorFacts(shape=(n_out, rank), dtype="float32")
    return expected


def _refuse_oversize(file: Path, record: OwnerRecord) -> None:
    """Refuse a file that is larger than what was agreed can be, before a byte of it is read."""
    n_bytes = _HEADER_BYTES
    for facts in record.adapter.values():
        form_bytes = [facts.n_bytes]
        if len(facts.shape) == 2:
            rank = min(*facts.shape, record.terms.max_rank or math.inf)
            form_bytes.append(int(4 * rank * sum(facts.shape)))
        n_bytes += max(form_bytes) + _HEADER_BYTES_EACH
    with storage_errors(file, "read"):
        found = file.stat().st_size if file.exists() else 0
    if found > n_bytes:
        raise CorruptFileError(
            f"{file.name} has {found} bytes",
            where=str(file),
            why=f"what was agreed to train fits into {n_bytes}",
            do="ask the data owner for what `selectune tune` wrote",
        )


def _of_another(path: Path, what: str, found: str, own: str) -> IncompatibleRunError:
    return IncompatibleRunError(
        f"the plugin was trained on {what}",
        where=str(path / MANIFEST),
        why=f"it names {found:.64}, the owner's record {own}",
        do="give the owner's folder that was written with the package",
    )
