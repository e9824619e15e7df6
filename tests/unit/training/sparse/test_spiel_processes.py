"""SpIEL in two processes under DDP: -MA grows what one process would, -AG is refused.

The file is its own child: `python test_spiel_processes.py FOLDER RANK N` is one of the processes.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from slow_gast import batch_loss
from slow_sparse import bits, is_matrix, mask_of
from tiny import tiny_model, tiny_tokens
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ranks import be_rank, run_ranks
from selectune.data import collate
from selectune.errors import ConfigError
from selectune.methods.sparse.spiel_ag import SpielAG
from selectune.methods.sparse.spiel_ma import SpielMA
from selectune.training.sparse import SM3, SparseModel, SpielAdamW, sparsify

WORLD = 2
SHARES = [tiny_tokens(3, seed=s) for s in (1, 2)]


def n_targets(share: list[object]) -> float:
    return float(sum(t.is_target[1:].sum() for t in share))


def train(rank: int | None) -> SparseModel:
    model = sparsify(
        tiny_model("llama").train(),
        mask_of(tiny_model("llama"), 0.1, only=is_matrix),
        route="sampled",
        decay_to="base",
    )
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = SM3(model.sparse.parameters(), lr=1e-3, eps=1e-6)
    mine = [t for k, share in enumerate(SHARES) if rank in (None, k) for t in share]
    n_every = sum(n_targets(share) for share in SHARES)
    scale = n_targets(mine) / n_every * (1 if rank is None else WORLD)
    with SpielMA(every=3, accumulate=1, steps=8).attach(wrapped, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            (batch_loss(wrapped, collate(mine, pad_id=0), "token") * scale).backward()
            optimizer.step()
    return model


def refusal() -> str:
    model = sparsify(tiny_model("llama"), mask_of(tiny_model("llama"), only=is_matrix))
    try:
        with SpielAG(steps=4).attach(model, SpielAdamW(model.sparse.parameters())):
            return ""
    except ConfigError as error:
        return str(error)


def child(folder: Path, rank: int, n: int) -> None:
    model = train(rank)
    save_file(bits(model), folder / f"weights {rank}")
    save_file(dict(model.sparse.mask.indices), folder / f"entries {rank}")
    (folder / f"facts {rank}").write_text(json.dumps(refusal()), encoding="utf-8")


def test_two_processes_grow_what_one_would(tmp_path: Path) -> None:
    run_ranks(Path(__file__), tmp_path)
    model = train(None)
    assert model.sparse.about["n_exchanged"] > 0.8 * model.sparse.n_chosen
    for rank in range(WORLD):
        entries = load_file(tmp_path / f"entries {rank}")
        assert_close(entries, dict(model.sparse.mask.indices), rtol=0, atol=0)
        assert_close(load_file(tmp_path / f"weights {rank}"), bits(model), rtol=1e-4, atol=1e-5)
        said = json.loads((tmp_path / f"facts {rank}").read_text())
        assert "runs in one process, and there are 2" in said


if __name__ == "__main__":
    be_rank(child)
