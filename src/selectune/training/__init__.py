"""Training: `tune` runs transformers' or trl's trainer on exactly the given tokens."""

from selectune.training.tune import TuneResult, tune

__all__ = ["TuneResult", "tune"]
