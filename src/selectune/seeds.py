"""Random numbers that depend on a seed and a purpose, and on nothing that was drawn before."""

import hashlib

import torch


def seeded(seed: int, *words: str) -> torch.Generator:
    """Return a source of random numbers for one purpose, the same on every machine."""
    digest = hashlib.sha256(":".join((str(seed), *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
