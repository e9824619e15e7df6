"""One of two processes that train with a layer sampler under DDP; a test starts both."""

import json
from pathlib import Path

import torch
from deep import deep_trainable
from tiny import tiny_tokens
from torch.nn.parallel import DistributedDataParallel

from ranks import be_rank
from selectune.methods.layers.ist import IST
from selectune.methods.layers.ows import OWS
from selectune.training.method import Method
from selectune.training.sources import TokenSource


def main(folder: Path, rank: int, n: int) -> None:
    """Train a few steps, each process on its share of the batch, and write down what happened."""
    pool = TokenSource(tiny_tokens(20, seed=4), pad_id=0)
    methods: dict[str, Method] = {
        "ist": IST(interval=2, layers=2, probe_batch=5, reward="neg_loss"),
        "ows": OWS(layers=2, interval=2, examples=9),
    }
    found = {}
    for name, method in methods.items():
        model = deep_trainable("lora", 4)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True) if n > 1 else model
        active = []
        with method.attach(wrapped, optimizer, pool=pool, seed=3) as session:
            for step in range(8):
                active.append(session.active)
                # Rows of one length, so that a mean of means is the mean.
                ids = torch.arange(2, 34).view(4, 8).roll(step, 1)[rank::n]
                optimizer.zero_grad()
                wrapped(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            tensors = session.state()[1]
        found[name] = {
            "active": active,
            "tensors": {key: t.tolist() for key, t in tensors.items()},
            "weights": [float(p.double().sum()) for p in trained],
        }
    (folder / f"{n}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    be_rank(main)
