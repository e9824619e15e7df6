"""What a model with chosen entries saves, and how a trainer's checkpoint brings it back.

model.save_pretrained("delta")     the delta, sealed; beside it the adapter, if there is one
checkpoint-N of a Trainer          the same unsealed, and `model.safetensors` with the values as
                                   they are: a resumed run goes on bit by bit
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from selectune.errors import CorruptFileError, IncompatibleRunError
from selectune.files import write_file
from selectune.files.tensors import tensors_to_bytes
from selectune.training.sparse.handle import Sparse
from selectune.training.sparse.modules import Copied, SparseModule
from selectune.weights.base import base_weights
from selectune.weights.delta import Indices, Stored
from selectune.weights.mask import WeightMask

_log = logging.getLogger(__name__)
_EXTRA = "_extra_state"  # where torch keeps what `get_extra_state` returns
_CHECKPOINT = re.compile(r"checkpoint-\d+")
RESUMED = "model.safetensors"  # the name that Trainer looks for


class SparseModel(Copied):
    """A model of which chosen entries train."""

    sparse: Sparse

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        push_to_hub: bool = False,
        dtype: Stored = "float32",
        indices: Indices = "plain",
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Save what training changed, and the adapter beside it if there is one.

        The live weights are sealed: they change by a last bit here and there, so that the base with
        the delta is what they are. A folder called `checkpoint-N` is a trainer's: nothing changes
        in the model, and all is kept that a resumed run needs. Where values are sharded over
        processes, all of these call this, and the first one writes.

        Args:
            save_directory: the folder.
            is_main_process: others save nothing.
            state_dict: the parameters, where a trainer has collected them.
            push_to_hub: upload it too; `repo_id` names the repository, else the folder does.
            dtype: of the deltas: float32, or bfloat16, which rounds them.
            indices: plain takes 4 bytes per entry, gaps about 1.
            options: for the adapter of a peft model, and for the upload.

        Raises:
            StorageError: the folder cannot be written.
            TrainingError: a value is not a finite number.
        """
        is_sharded = self.sparse.is_sharded
        writes = is_main_process and (not is_sharded or distributed.get_rank() == 0)
        if not writes and not is_sharded:
            return
        folder = Path(save_directory)
        upload = {key: options.pop(key) for key in _UPLOAD if key in options}
        resumed: dict[str, Tensor] | None = None
        if _CHECKPOINT.fullmatch(folder.name):
            delta = self.sparse.delta()
            resumed = self._resumed(state_dict)
        else:
            delta, n_changed, largest = self.sparse.seal(dtype)
            if n_changed:
                _log.info(
                    "%d of %d chosen weights changed by a rounding, at most by %.2g, so that the "
                    "saved delta gives exactly what is live",
                    n_changed, len(delta), largest,
                )  # fmt: skip
        is_adapted = issubclass(self.swapped_from, PeftModel)
        if is_adapted and is_sharded:
            options["state_dict"] = self._trained()
        if not writes:
            return
        if resumed is not None:
            write_file(folder / RESUMED, tensors_to_bytes(resumed, RESUMED))
        if is_adapted:
            cast("Any", super()).save_pretrained(str(folder), **options)
        delta.save(folder, dtype=dtype, indices=indices)
        if push_to_hub:
            repo_id = upload.pop("repo_id", folder.name)
            cast("Any", self).push_to_hub(repo_id, **upload)

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
    ) -> Any:  # noqa: ANN401
        """Load values, and write them into the weights they belong to.

        Raises:
            IncompatibleRunError: the values belong to other entries, or to another base.
        """
        if _EXTRA in state_dict:  # torch would find out when half of it is loaded
            _refuse_other(_decoded(state_dict[_EXTRA]), self.sparse.identity())
        result = super().load_state_dict(state_dict, strict, assign)
        for module in self.modules():
            if isinstance(module, SparseModule):
                module.follow()
        held = {id(e.values) for e in self.sparse.entries.values()}
        values = {name for name, p in self.named_parameters() if id(p) in held}
        if not strict and values <= state_dict.keys():
            frozen = {id(p) for p in base_weights(self).values() if not p.requires_grad}
            named = self.named_parameters(remove_duplicate=False)
            expected = {name for name, p in named if id(p) in frozen or id(p) in held}
            result.missing_keys[:] = [n for n in result.missing_keys if n not in expected]
        return result

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter, not what hangs on it."""
        with torch.no_grad():
            return super().get_parameter(target)

    def get_extra_state(self) -> Tensor:
        """Return what values are worthless without, and the routes that were measured."""
        sparse = self.sparse
        facts = {**sparse.identity(), "routes": sparse.routes, "about": sparse.about}
        written = bytearray(json.dumps(facts).encode())
        if sparse.is_exchanged:  # the entries themselves, behind a line of JSON
            written += b"\n"
            for _, index in sparse.mask:
                content: Any = index.numpy()
                written += content.tobytes()
        return torch.frombuffer(written, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the routes of an earlier run, and its entries where training exchanged some.

        Raises:
            IncompatibleRunError: its values belong to other entries, or to another base.
            CorruptFileError: it is shorter than it was.
        """
        facts, sparse = _decoded(state), self.sparse
        _refuse_other(facts, sparse.identity())
        sparse.routes.update(facts["routes"])
        about = facts.get("about", {})
        if "started_from" in about:
            sparse.choose(_entries_in(state, sparse.start), about)
        elif sparse.is_exchanged:
            sparse.choose(sparse.start.indices, about)

    def _resumed(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {**self._trained(state_dict), _EXTRA: self.get_extra_state()}

    def _trained(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return all that trains, whether or not it does at this step."""
        entries = self.sparse.entries.values()
        still = {id(p) for p in base_weights(self).values() if not p.requires_grad}
        own = {name: p for name, p in self.named_parameters() if id(p) not in still}
        assert {id(e.values) for e in entries} <= {id(p) for p in own.values()}
        given = state_dict or {}
        return {name: _whole(given.get(name, p)).contiguous() for name, p in own.items()}


_UPLOAD = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr",
    "max_shard_size", "tags",
)  # fmt: skip


def _whole(tensor: Tensor) -> Tensor:
    held = tensor.detach()
    return held.full_tensor() if isinstance(held, DTensor) else held


def _bytes(state: Tensor) -> bytes:
    content: Any = state.cpu().numpy()
    return content.tobytes()


def _decoded(state: Tensor) -> dict[str, Any]:
    return json.loads(_bytes(state).partition(b"\n")[0])


def _entries_in(state: Tensor, start: WeightMask) -> dict[str, Tensor]:
    """Return the entries that follow the line of JSON, as many of each weight as at the start."""
    content = _bytes(state).partition(b"\n")[2]
    expected = sum(index.numel() * index.element_size() for _, index in start)
    if len(content) != expected:
        raise CorruptFileError(
            "the saved entries are incomplete",
            where="load_state_dict",
            why=f"they take {expected} bytes, and {len(content)} are there",
            do="resume an earlier checkpoint",
        )
    found: dict[str, Tensor] = {}
    end = 0
    for name, index in start:
        begin, end = end, end + index.numel() * index.element_size()
        found[name] = torch.frombuffer(bytearray(content[begin:end]), dtype=index.dtype)
    return found


def _refuse_other(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for key, value in own.items():
        if found.get(key) != value:
            raise IncompatibleRunError(
                f"the saved values belong to another {key}",
                where="load_state_dict",
                why=f"theirs is {found.get(key)}, this model's is {value}",
                do="sparsify the same base with the same mask and options, then resume",
            )
