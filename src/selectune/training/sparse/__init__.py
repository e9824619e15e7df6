"""Train chosen entries of a model's weights in place; everything else stays bit-identical."""

from selectune.training.sparse.optimizers import SM3, SpielAdamW
from selectune.training.sparse.saving import SparseModel
from selectune.training.sparse.sparsify import Sparse, restore, sparsify

__all__ = [
    "SM3",
    "Sparse",
    "SparseModel",
    "SpielAdamW",
    "restore",
    "sparsify",
]
