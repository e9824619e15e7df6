"""Which examples: one file per scorer. Importing this package registers them all."""

from selectune.methods.data import gist, grad_cosine, length, perplexity, random

__all__ = ["gist", "grad_cosine", "length", "perplexity", "random"]
