"""A sparse delta as a SHiRA adapter of peft: 12 bytes per entry, for tools that know only peft.

SHiRA has one rank for all modules and exactly r * (inputs + outputs) entries in each, so entries of
delta 0 are added until that fits. peft adds the delta to the weight as we do, so the weights come
out the same, which is checked by loading the adapter before it gets its name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, ShiraConfig, TaskType
from peft.tuners.shira import ShiraLayer
from torch import Tensor, nn

from selectune.adapters.add import quiet
from selectune.errors import CoverageError, TrainingError
from selectune.files import StagedDir, refuse_other_result, staged
from selectune.weights.base import bare_name, flat
from selectune.weights.delta import SparseDelta, add
from selectune.weights.merging import Delta, load_base, read

KIND = "SHiRA adapter"


@dataclass(frozen=True, slots=True)
class ShiraExport:
    """What was written.

    Args:
        folder: of the adapter.
        rank: SHiRA's one rank.
        n_entries: of the delta.
        n_stored: with those of delta 0 that SHiRA's form asks for.
    """

    folder: Path
    rank: int
    n_entries: int
    n_stored: int

    @property
    def growth(self) -> float:
        """How many entries are stored for each of the delta."""
        return self.n_stored / self.n_entries


def export_shira(delta: Delta, folder: str | Path, base: nn.Module | str | Path) -> ShiraExport:
    """Write a delta as a SHiRA adapter that `PeftModel.from_pretrained` loads.

    Args:
        delta: the delta, or its folder.
        folder: of the adapter; one that this function wrote is replaced at once.
        base: the model that the delta was made on, bare; it is as before afterwards.

    Raises:
        IncompatibleRunError: the base is another one.
        StorageError: the folder cannot be written.
        CoverageError: SHiRA cannot hold the delta: it knows matrices of nn.Linear only.
        TrainingError: peft makes other weights of it.
    """
    refuse_other_result(Path(folder), KIND)
    made = read(delta)
    model = load_base(base, made) if isinstance(base, str | Path) else base
    made.check(model, where="" if isinstance(delta, SparseDelta) else str(delta))
    if not made.n_entries:
        raise CoverageError("the delta changes no weight", do="there is nothing to export")
    names = _modules(made, model)
    rank = max(-(-len(made.indices[n]) // sum(made.shapes[n])) for n in names)
    dense = [n for n in names if rank * sum(made.shapes[n]) > made.shapes[n][0] * made.shapes[n][1]]
    if dense:
        raise CoverageError(
            "SHiRA cannot hold this delta",
            where=dense[0],
            why=f"its one rank would be {rank}, which is more entries than the {len(dense)} "
            "smallest modules have",
            do="export it to a plain model instead",
        )
    tensors: dict[str, Tensor] = {}
    for name, module in names.items():
        index, values = _padded(made, name, rank)
        key, width = f"base_model.model.{module}", made.shapes[name][1]
        rows = torch.stack([index // width, index % width])
        tensors |= {f"{key}.shira_weight": values, f"{key}.shira_indices": rows.to(torch.int32)}
    meta = {"base": made.base, "about": dict(made.about)}
    with staged(Path(folder), kind=KIND, meta=meta) as stage:
        config = ShiraConfig(
            r=rank,
            target_modules=list(names.values()),
            task_type=TaskType.CAUSAL_LM,
            inference_mode=True,
            base_model_name_or_path=str(base if isinstance(base, str | Path) else _origin(model)),
        )
        config.save_pretrained(str(stage.path))
        stage.write_tensors("adapter_model.safetensors", tensors)
        _compare(made, model, stage)
    return ShiraExport(
        Path(folder), rank, made.n_entries, sum(rank * sum(made.shapes[n]) for n in names)
    )


def _modules(delta: SparseDelta, model: nn.Module) -> dict[str, str]:
    """Return the modules that hold the changed parameters, by these."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {n: n.removesuffix(".weight") for n in delta.indices}
    odd = [n for n, module in names.items() if n == module or module not in linear]
    if odd:
        raise CoverageError(
            f"SHiRA cannot hold {odd[0]}",
            why="it knows the weights of nn.Linear only; "
            f"{len(odd)} of the {len(names)} changed tensors are others",
            do="export it to a plain model instead",
        )
    return names


def _padded(delta: SparseDelta, name: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return as many entries as SHiRA wants: the delta's, and the first others with delta 0."""
    index = delta.indices[name].long()
    shape = delta.shapes[name]
    wanted = rank * sum(shape)
    # The first `wanted` places hold enough that are free.
    is_free = torch.ones(wanted, dtype=torch.bool)
    is_free[index[index < wanted]] = False
    more = is_free.nonzero().flatten()[: wanted - len(index)]
    places, order = torch.cat([index, more]).sort()
    values = torch.cat([delta.deltas[name].float(), torch.zeros(len(more))])
    return places, values[order]


def _origin(model: nn.Module) -> str:
    return str(vars(model).get("name_or_path") or "")


@torch.no_grad()
def _compare(delta: SparseDelta, model: nn.Module, stage: StagedDir) -> None:
    """See that peft makes the same weights of the adapter as we do of the delta."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with quiet():
        adapted = PeftModel.from_pretrained(cast("Any", model), str(stage.path))
    try:
        layers = {
            f"{bare_name(name)}.weight": module
            for name, module in adapted.named_modules()
            if isinstance(module, ShiraLayer)
        }
        # torch 2.13 warns where nobody said whether sparse tensors are to be checked.
        with torch.sparse.check_sparse_tensor_invariants(enable=True):
            odd = [name for name in delta.indices if not _is_equal(delta, name, layers[name])]
    finally:
        adapted.unload()
        for name, p in model.named_parameters():
            p.requires_grad_(trains[name])
    if odd:
        raise TrainingError(
            f"peft makes other weights of {odd[0]}",
            why="its SHiRA layer adds up otherwise than the release this was written for",
            do="export it to a plain model instead, and report this",
        )


def _is_equal(delta: SparseDelta, name: str, layer: Any) -> bool:  # noqa: ANN401
    base: Tensor = layer.get_base_layer().weight
    theirs = base.detach().clone()
    theirs += layer.get_delta_weight("default")
    places = delta.indices[name].long().to(base.device)
    ours = flat(base).clone()
    ours[places] = add(ours[places], delta.deltas[name].to(base.device))
    return torch.equal(theirs.flatten(), ours)
