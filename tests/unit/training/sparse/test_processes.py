"""Chosen entries in two processes, under DDP and FSDP2, against one with the joint batch.

The file is its own child: `python test_processes.py FOLDER RANK N` is one of the two processes.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from slow_gast import batch_loss
from slow_sparse import bits, chosen, is_matrix, mask_of, matrices
from tiny import tiny_model, tiny_tokens
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ranks import be_rank, run_ranks
from selectune.data import collate
from selectune.errors import CoverageError, TrainingError
from selectune.models import blocks
from selectune.training.sparse import SparseModel, restore, sparsify
from selectune.weights.base import bare_name
from selectune.weights.delta import SparseDelta

WORLD = 2
# Two micro-batches of each process.
SHARES = [[tiny_tokens(3, seed=s), tiny_tokens(3, seed=s + 9)] for s in (1, 2)]
ROUTES = ("gather", "sampled")
SHARDED = ("llama", "gpt2", "llama bfloat16", "llama lora")


def composed(case: str) -> SparseModel:
    """Return a model with entries beside its matrices, where asked for with a LoRA beside them."""
    family, _, more = case.partition(" ")
    model = tiny_model(family).eval()
    if more == "bfloat16":
        model = model.bfloat16()
    mask = mask_of(model, only=matrices(model))
    if more == "lora":
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return sparsify(model, mask, form="compose", route="sampled")


def sharded(case: str) -> SparseModel:
    model = composed(case)
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def steps(model: nn.Module, rank: int | None) -> None:
    """Train three steps of two micro-batches, every process on its share of each."""
    options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    for _ in range(3):
        for micro in range(2):
            mine = [t for k, share in enumerate(SHARES) if rank in (None, k) for t in share[micro]]
            every = [t for share in SHARES for t in share[micro]]
            loss = batch_loss(model, collate(mine, pad_id=0), "token")
            loss = loss * n_targets(mine) / n_targets(every) / 2
            (loss if rank is None else loss * WORLD).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def train_sharded(case: str, rank: int, folder: Path) -> None:
    model = sharded(case)
    steps(model, rank)
    n_own = sum(p.to_local().numel() for p in model.sparse.parameters())
    assert n_own < 0.6 * model.sparse.n_chosen
    assert "sharded" in repr(model.sparse)
    model.save_pretrained(folder / case)  # every process calls it, the first one writes
    model.save_pretrained(folder / case / "checkpoint-3")
    again = sharded(case)
    again.sparse.load(model.sparse.delta())
    assert again.sparse.delta() == model.sparse.delta()
    with pytest.raises(CoverageError, match="sharded over processes"):
        restore(model)


def n_targets(share: list[object]) -> float:
    return float(sum(t.is_target[1:].sum() for t in share))


def train(route: str, rank: int | None) -> tuple[SparseModel, int]:
    """Train three steps of two micro-batches; return the model and how many floats travelled."""
    model = tiny_model("gemma").train()  # its head and embedding are one tensor
    sparsify(model, mask_of(model), route=route)
    wrapped = model if rank is None else DistributedDataParallel(model)
    n_sent = 0
    if rank is not None:

        def send(_: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal n_sent
            n_sent += bucket.buffer().numel()
            work = distributed.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        wrapped.register_comm_hook(None, send)
    steps(wrapped, rank)
    return model, n_sent


def refusals() -> list[str]:
    """Return what is said of weights that are sharded, before and after."""
    said = []
    model = tiny_model("llama")
    mask = mask_of(model)
    matrices_alone = mask_of(model, only=is_matrix)
    fully_shard(model)
    for form, asked in (("in_place", mask), ("compose", matrices_alone)):
        try:
            sparsify(model, asked, form=form)
        except CoverageError as error:
            said.append(str(error))
    later = sparsify(tiny_model("llama"), mask)
    fully_shard(later)
    try:
        batch_loss(later, collate(SHARES[0][0], pad_id=0), "token")
    except TrainingError as error:
        said.append(str(error))
    return said


def child(folder: Path, rank: int, n: int) -> None:
    facts: dict[str, object] = {}
    for route in ROUTES:
        model, facts[route] = train(route, rank)
        save_file(bits(model), folder / f"{route} {rank}")
    facts["refusals"] = refusals()
    for case in SHARDED:
        train_sharded(case, rank, folder)
    (folder / f"facts {rank}").write_text(json.dumps(facts), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks(Path(__file__), folder, timeout=600)
    return folder


@pytest.mark.parametrize("route", ROUTES)
def test_two_processes_train_what_one_would(route: str, folder: Path) -> None:
    model, _ = train(route, None)
    first, second = (load_file(folder / f"{route} {rank}") for rank in range(WORLD))
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, bits(model), rtol=1e-4, atol=1e-5)
    before = bits(tiny_model("gemma"))
    for name, weight in first.items():
        outside = ~chosen(model.sparse.mask, name, weight.shape)
        assert torch.equal(weight[outside], before[name][outside])


@pytest.mark.parametrize("route", ROUTES)
def test_only_chosen_entries_travel(route: str, folder: Path) -> None:
    n_chosen = mask_of(tiny_model("gemma")).n_chosen
    for rank in range(WORLD):
        facts = json.loads((folder / f"facts {rank}").read_text())
        assert facts[route] == 3 * 2 * n_chosen  # steps, micro-batches


def test_sharded_weights_are_refused(folder: Path) -> None:
    before, composed_late, after = json.loads((folder / "facts 0").read_text())["refusals"]
    for told in (before, composed_late):
        assert "it is sharded over processes" in told
        assert 'sparsify(model, mask, form="compose") first, then fully_shard' in told
    assert "another tensor than when its entries were chosen" in after
    assert 'form="compose"' in after


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_processes_train_and_save_what_one_would(
    case: str, folder: Path, tmp_path: Path
) -> None:
    model = composed(case)
    steps(model, None)
    model.save_pretrained(tmp_path)
    one, both = (SparseDelta.load(path) for path in (tmp_path, folder / case))
    assert both.base == one.base
    assert both.mask() == one.mask()
    assert both.about["n_moved"] == one.about["n_moved"]
    close = {"rtol": 0.1, "atol": 2e-3} if "bfloat16" in case else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(dict(both.deltas), dict(one.deltas), **close)
    resumed = load_file(folder / case / "checkpoint-3" / "model.safetensors")
    values = {n.removesuffix("_values"): t for n, t in resumed.items() if n.endswith("_values")}
    assert {bare_name(n) for n in values} == one.deltas.keys()
    if case.endswith("lora"):
        adapters = [load_file(p / "adapter_model.safetensors") for p in (folder / case, tmp_path)]
        assert_close(*adapters, rtol=1e-4, atol=1e-5)
    fresh = composed(case)
    fresh.load_state_dict(resumed, strict=False)
    assert_close(dict(fresh.sparse.delta().deltas), dict(both.deltas), rtol=0, atol=0)


if __name__ == "__main__":
    be_rank(child)
