"""One of several processes that score weights together; a test starts them."""

from pathlib import Path

from tiny import tiny_model, tiny_tokens
from torch.nn.parallel import DistributedDataParallel

from ranks import be_rank
from selectune import weights


def main(folder: Path, rank: int, n: int) -> None:
    """Save the masks that this process finds, and the gradients behind them."""
    model = tiny_model("llama")
    wrapped = DistributedDataParallel(model) if n > 1 else model
    pool = tiny_tokens(11, seed=4)
    for name, scorer in {
        "gallop": weights.GaLLoP(density=0.05),
        "token": weights.SAFT(density=0.05, weighting="token"),
        "fisher": weights.Fisher(density=0.05, examples=7, micro_batch=2),
        "sift": weights.SIFT(density=0.05, micro_batch=1),  # fewer batches than processes
    }.items():
        scores = scorer.score(wrapped, pool, token_budget=30)
        scores.select().save(folder / f"{name}-{n}-{rank}")
        ((_, found),) = scores.statistics.values.items()
        (folder / f"{name}-{n}-{rank}.txt").write_text(
            repr([float(t.double().abs().sum()) for t in found.values()])
        )


if __name__ == "__main__":
    be_rank(main)
