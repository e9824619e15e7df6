"""Two processes under DDP against one with the joint batch.

The file is its own child: `python test_ddp.py FOLDER RANK N` trains one of the two processes.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import loop_gradients
from safetensors.torch import load_file, save_file
from slow_gast import batch_loss, parts, slow_layers, slow_mean, slow_target, slow_weights
from tiny import tiny_tokens, tiny_trainable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ranks import be_rank, run_ranks
from selectune import GAST, GREATS
from selectune.data import Tokens, collate
from selectune.errors import ConfigError
from selectune.training.sources import TokenSource

# transformers 5.24 renamed it to `activation_checkpointing_enable`; 5.23 has the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

WORLD = 2
POOL = tiny_tokens(12, seed=4)
# The examples of each process, unequally many; two micro-batches.
SHARES = [[tiny_tokens(5, seed=1), tiny_tokens(3, seed=2)], [tiny_tokens(4, seed=5)] * 2]


@dataclass
class Case:
    method: GAST
    weighting: str = "token"
    n_micro: int = 1
    checkpoints: bool = False


CASES = {
    "global": Case(GAST(pick_scope="global")),
    "global, cosine": Case(GAST(pick_scope="global", score="cosine", pick="topk")),
    "global, every module": Case(GAST(pick_scope="global", granularity="module")),
    "global, two passes": Case(GAST(pick_scope="global", form="two_pass")),
    "global, unbiased": Case(GAST(pick_scope="global", aggregate="unbiased")),
    "global, example": Case(GAST(pick_scope="global"), "example"),
    "global, two micro-batches": Case(GAST(pick_scope="global"), n_micro=2),
    "global, checkpointing": Case(GAST(pick_scope="global"), checkpoints=True),
    "local": Case(GAST()),
    "local, two micro-batches": Case(GAST(), n_micro=2),
    "all": Case(GAST(pick="all"), n_micro=2),
    "few targets": Case(GAST(target=POOL[:1])),
    "greats": Case(GREATS()),
}
GLOBAL = [name for name in CASES if name.startswith("global")]


def take_gradients(
    case: Case, shares: list[list[list[Tokens]]], rank: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return gradients, target gradients and facts of one step.

    The loss is divided by what all processes hold, as transformers does.
    """
    model = tiny_trainable("llama", "lora").train()
    if case.checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    source = TokenSource(POOL, pad_id=0)
    with case.method.attach(model, optimizer, pool=source, seed=3) as session:
        for micro in range(case.n_micro):
            mine = [t for k, share in enumerate(shares) if rank in (None, k) for t in share[micro]]
            every = [t for share in shares for t in share[micro]]
            whole, own = (sum(slow_weights(x, case.weighting)) for x in (every, mine))
            batch = collate(mine, pad_id=0)
            session.expect(batch.labels, batch.ids)
            is_last = micro == case.n_micro - 1
            with nullcontext() if rank is None or is_last else wrapped.no_sync():
                loss = batch_loss(wrapped, batch, case.weighting) * own / whole / case.n_micro
                (loss if rank is None else loss * WORLD).backward()
        facts = session.end_step()
        target = {n: t.clone() for n, t in session.target.gradients.items()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, target, facts


def refusals() -> list[str]:
    """Return what one of several processes refuses."""
    model = tiny_trainable("llama", "lora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found: list[str] = []
    for method in (GAST(target_batch=3), GREATS(pick_scope="global")):
        try:
            with method.attach(model, optimizer, pool=TokenSource(POOL, pad_id=0)):
                pass
        except ConfigError as error:
            found.append(str(error))
    return found


def child(folder: Path, rank: int, n: int) -> None:
    facts: dict[str, Any] = {"refusals": refusals()}
    for name, case in CASES.items():
        gradients, target, facts[name] = take_gradients(case, SHARES, rank)
        save_file(gradients, folder / f"{name} gradients {rank}")
        save_file(target, folder / f"{name} target {rank}")
    (folder / f"facts {rank}").write_text(json.dumps(facts), encoding="utf-8")


@dataclass
class Found:
    """What the processes left behind, by rank."""

    folder: Path
    facts: list[dict[str, Any]]

    def tensors(self, name: str, what: str) -> list[dict[str, Tensor]]:
        return [load_file(self.folder / f"{name} {what} {rank}") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks(Path(__file__), folder)
    facts = [json.loads((folder / f"facts {rank}").read_text()) for rank in range(WORLD)]
    return Found(folder, facts)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(want.norm()) for want in expected.values())
    for name, want in expected.items():
        error = float((found[name] - want).norm())
        assert error <= 1e-5 * float(want.norm()) + 1e-7 * largest, (name, error)


def reference() -> nn.Module:
    return tiny_trainable("llama", "lora")


@pytest.mark.parametrize("name", GLOBAL)
def test_picks_from_all_examples_give_the_gradient_of_one_process(name: str, found: Found) -> None:
    case = CASES[name]
    gradients, target, facts = take_gradients(case, SHARES, None)
    for rank in range(WORLD):
        assert_close(found.tensors(name, "gradients")[rank], gradients)
        assert_close(found.tensors(name, "target")[rank], target)
    sizes = [[len(share[micro]) for share in SHARES] for micro in range(case.n_micro)]
    for layer, line in facts["picks"].items():
        joint = ""
        starts = [0, 0]
        for micro in sizes:
            for rank, size in enumerate(micro):
                own = found.facts[rank][name]["picks"][layer]
                joint += own[starts[rank] : starts[rank] + size]
                starts[rank] += size
        assert joint == line


@pytest.mark.parametrize("name", ["local", "local, two micro-batches", "greats"])
def test_picks_from_ones_own_examples_are_averaged(name: str, found: Found) -> None:
    case = CASES[name]
    expected: dict[str, Tensor] = {}
    model = reference()
    for layer, names in enumerate(slow_layers(model)):
        starts = [0, 0]
        for micro in range(case.n_micro):
            weights = [sum(slow_weights(share[micro], "token")) for share in SHARES]
            for rank, share in enumerate(SHARES):
                items = share[micro]
                line = found.facts[rank][name]["picks"][str(layer)][starts[rank] :][: len(items)]
                starts[rank] += len(items)
                assert line.count("1") == 2  # half of 5, 4 and 3
                rows = loop_gradients(model, items)
                own = slow_weights(items, "token")
                mean = slow_mean(rows, own, parts(line), names)
                part = weights[rank] / sum(weights) / case.n_micro
                for key, gradient in mean.items():
                    expected[key] = expected.get(key, 0) + part * gradient
    for gradients in found.tensors(name, "gradients"):
        assert_close(gradients, {n: g.float() for n, g in expected.items()})


def test_both_processes_draw_by_themselves(found: Found) -> None:
    lines = [f["local, two micro-batches"]["picks"]["0"][-4:] for f in found.facts]
    alone = take_gradients(CASES["local"], [SHARES[1]], None)[2]["picks"]
    assert found.facts[1]["local"]["picks"] != alone
    assert all(len(line) == 4 for line in lines)


def test_everything_picked_is_plain_training(found: Found) -> None:
    model = reference()
    expected: dict[str, Tensor] = {}
    for micro in range(2):
        items = [t for share in SHARES for t in share[micro]]
        rows = loop_gradients(model, items)
        mean = slow_mean(rows, slow_weights(items, "token"), range(len(items)), list(rows))
        expected = {n: expected.get(n, 0) + g.float() / 2 for n, g in mean.items()}
    for gradients in found.tensors("all", "gradients"):
        assert_close(gradients, expected)


@pytest.mark.parametrize("name", ["local", "greats"])
def test_target_gradients_are_those_of_one_process(name: str, found: Found) -> None:
    _, target, _ = take_gradients(CASES[name], SHARES, None)
    for theirs in found.tensors(name, "target"):
        assert_close(theirs, target)


def test_fewer_targets_than_processes(found: Found) -> None:
    expected = slow_target(reference(), POOL[:1])
    for theirs in found.tensors("few targets", "target"):
        assert_close(theirs, {n: g.float() for n, g in expected.items()})


def test_what_cannot_be_split_is_refused(found: Found) -> None:
    for facts in found.facts:
        split, joint = facts["refusals"]
        assert "3 target examples cannot be split over 2 processes" in split
        assert "cannot pick from the examples of all processes" in joint


if __name__ == "__main__":
    be_rank(child)
