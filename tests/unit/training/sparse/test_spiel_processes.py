"""SpIEL in two processes under DDP: -MA grows what one process would, -AG is refused.

The file is its own child: `python test_spiel_processes.py RANK FOLDER` is one of the processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from slow_gast import batch_loss
from slow_sparse import bits, is_matrix, mask_of
from tiny import tiny_model, tiny_tokens
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

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


def child(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    model = train(rank)
    save_file(bits(model), folder / f"weights {rank}")
    save_file(dict(model.sparse.mask.indices), folder / f"entries {rank}")
    (folder / f"facts {rank}").write_text(json.dumps(refusal()), encoding="utf-8")
    distributed.destroy_process_group()


def test_two_processes_grow_what_one_would(tmp_path: Path) -> None:
    tests = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests / "reference"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",  # tests of one process see to them
        "GLOO_SOCKET_IFNAME": "lo",
    }
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in children]
    finally:
        for process in children:
            process.kill()
            process.wait()
    assert [process.returncode for process in children] == [0, 0], "\n".join(outputs)
    model = train(None)
    assert model.sparse.about["n_exchanged"] > 0.8 * model.sparse.n_chosen
    for rank in range(WORLD):
        entries = load_file(tmp_path / f"entries {rank}")
        assert_close(entries, dict(model.sparse.mask.indices), rtol=0, atol=0)
        assert_close(load_file(tmp_path / f"weights {rank}"), bits(model), rtol=1e-4, atol=1e-5)
        said = json.loads((tmp_path / f"facts {rank}").read_text())
        assert "runs in one process, and there are 2" in said


if __name__ == "__main__":
    child(int(sys.argv[1]), Path(sys.argv[2]))
