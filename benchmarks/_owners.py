"""One form of training, and who holds which bytes while it runs."""

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from _arms import lora, shira, tokens
from torch import Tensor, nn

from selectune import sparsify
from selectune.data import Batch
from selectune.gradients.engine import precision_of
from selectune.gradients.kernels import Pattern
from selectune.gradients.loss import target_nll
from selectune.training.sources import TokenSource
from selectune.training.sparse import SparseModel
from selectune.weights import WeightMask

Form: TypeAlias = Literal["full", "full fp32", "lora", "shira", "gather", "sampled", "auto"]
FORMS: tuple[Form, ...] = get_args(Form)


class Arm:
    """One model with one form of training."""

    def __init__(
        self, form: Form, model: nn.Module, mask: WeightMask, precision: str, n: int
    ) -> None:
        self.precision, self.n, self.number = precision, n, 0
        self.base = list(model.parameters())
        match form:
            case "full" | "full fp32":
                self.model = model.requires_grad_(True)
            case "lora" | "shira":
                make = lora if form == "lora" else shira
                self.model = cast("nn.Module", make(model, mask.n_chosen))
            case route:
                self.model = sparsify(model, mask, route=route)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        device = self.base[0].device
        self.source = TokenSource([tokens(k) for k in range(256)], pad_id=0, device=device)

    @property
    def n_trained(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.trained)

    def step(self) -> None:
        """Run one optimizer step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """Return the mean loss over the target tokens of the next batch."""
        batch = self.source.draw([(self.number * self.n + k) % 256 for k in range(self.n)])
        self.number += 1
        nats, n_tokens = forward(self.model, batch, self.precision)
        return nats.sum() / n_tokens.sum()

    def owners(self) -> dict[str, int]:
        """Return the bytes that each owner holds after a backward pass; at least one step is done.

        `dense_gradient` is gone by then: gradients of whole weights that are formed and freed, so
        many of the largest as were alive at once. Autograd forms SHiRA's, which only `peak` sees.
        """
        if isinstance(self.model, SparseModel):
            self.model.sparse.route.most_alive = 0  # measuring the routes formed some
        with saved_bytes(self.model) as saved:
            loss = self.loss()
        loss.backward()
        base = {id(p) for p in self.base}
        state = [t for held in self.optimizer.state.values() for t in held.values()]
        indices, copies, dense = self._beside()
        found = {
            "base": size(self.base),
            "values": size(p for p in self.trained if id(p) not in base),
            "gradients": size(p.grad for p in self.trained if p.grad is not None),
            "optimizer": size(t for t in state if isinstance(t, Tensor)),
            "indices": size(indices),
            "base_copies": size(copies),
            "dense_gradient": dense,
            "saved": sum(saved.values()),
        }
        self.optimizer.zero_grad(set_to_none=True)
        beyond = ("values", "gradients", "optimizer", "indices", "base_copies", "dense_gradient")
        return {**found, "beyond": sum(found[key] for key in beyond)}

    def _beside(self) -> tuple[list[Tensor], list[Tensor], int]:
        if not isinstance(self.model, SparseModel):
            held: list[dict[str, Tensor]] = [
                vars(m)["shira_indices"] for m in self.model.modules() if "shira_indices" in vars(m)
            ]
            return [t for table in held for t in table.values()], [], 0
        sparse = self.model.sparse
        indices: list[Tensor] = []
        copies: list[Tensor] = []
        for entries in sparse.entries.values():
            copies.append(entries.base)
            indices.append(entries.index)
            for held_by in vars(entries).values():  # a pattern is made when a product needs it
                if isinstance(held_by, Pattern):
                    indices += [held_by.crow, held_by.col]
        largest = max(e.weight.nbytes for e in sparse.entries.values())
        return indices, copies, sparse.route.most_alive * largest


@contextmanager
def saved_bytes(model: nn.Module) -> Generator[dict[int, int]]:
    """Count the bytes that autograd saves, by storage, without the model's own weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        kept = t.detach()  # a node that keeps its own output would never be freed
        for part in (kept._indices(), kept._values()) if kept.is_sparse else (kept,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
                held.append(part)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, those that share memory once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def forward(model: nn.Module, batch: Batch, precision: str) -> tuple[Tensor, Tensor]:
    """Return each example's loss, and its number of targets."""
    with precision_of(batch.input_ids.device, precision):
        return target_nll(model, batch)


def shared(model: nn.Module) -> nn.Module:
    """Return a copy that stands on the same memory, so that all forms fit beside each other."""
    mine = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast("dict[int, Any]", mine))
