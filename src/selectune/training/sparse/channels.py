"""Whole input channels of a matrix, among entries that are given one by one."""

import torch
from jaxtyping import Int
from torch import Tensor


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return the shape of a weight of two axes."""
    n_rows, n_cols = weight.shape
    return n_rows, n_cols


def whole_channels(
    index: Int[Tensor, " k"], weight: Tensor, axis: int | None
) -> Int[Tensor, " c"] | None:
    """Return the input channels that are chosen whole, if these are all of the chosen entries."""
    if axis is None or index.numel() == 0 or index.numel() % weight.shape[1 - axis]:
        return None
    n_rows, n_cols = matrix_shape(weight)
    n_channels = index.numel() // weight.shape[1 - axis]
    channels = index[:n_channels] if axis == 1 else index[::n_cols] // n_cols
    if int(channels[-1]) >= weight.shape[axis]:
        return None
    rows = torch.arange(n_rows, device=index.device, dtype=index.dtype)
    cols = torch.arange(n_cols, device=index.device, dtype=index.dtype)
    grid = (rows[:, None], channels[None]) if axis == 1 else (channels[:, None], cols[None])
    return channels if torch.equal(index, (grid[0] * n_cols + grid[1]).flatten()) else None
