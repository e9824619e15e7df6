"""Sums over the rows of the linear maps of a layer, from which their statistics are made."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectune.gradients.kernels import exact
from selectune.offsite.anatomy import anatomy_of, bias_of


class Site:
    """One linear map of a layer, and the sums over its rows.

    Args:
        layer: its index.
        name: of the module inside the block.
        module: the linear map.
        input_of: the first module that reads the same input, itself perhaps; A is added up there.
    """

    def __init__(self, layer: int, name: str, module: nn.Module, input_of: str) -> None:
        self.layer, self.name, self.module, self.input_of = layer, name, module, input_of
        self.has_bias = bias_of(module) is not None
        self.parts: dict[str, slice] = {}
        self.n_seen = 0
        # "A" and "x" of the inputs, "s" of the output gradients, "S key" and "G key" per matrix.
        self._sums: dict[str, Tensor] = {}

    @property
    def reads_first(self) -> bool:
        """Whether A is added up here."""
        return self.name == self.input_of

    def add(
        self, x: Float[Tensor, "p i"], s: Float[Tensor, "p o"] | None, sums: str = "ASG"
    ) -> None:
        """Add the rows of some positions, none of them padding.

        Args:
            x: inputs.
            s: gradients of the outputs; None without a backward pass.
            sums: which of A, S and G they are added to.
        """
        x = exact(x)
        if "A" in sums:
            self.n_seen += len(x)
            if self.reads_first:
                self._add("A", x, x)
                self._add("x", x, x.new_ones(len(x), 1))
        if s is None:
            return
        s = exact(s)
        if "G" in sums:
            self._add("s", s, s.new_ones(len(s), 1))
        for key, rows in self.parts.items():
            if "S" in sums:
                self._add(f"S {key}", s[:, rows], s[:, rows])
            if "G" in sums:
                self._add(f"G {key}", s[:, rows], x)

    def inputs(self, *, has_constant: bool) -> Float[Tensor, "i i"]:
        """Hand over A, on request with the constant 1 that a bias reads."""
        A, x = self._mean("A"), self._mean("x")
        if not has_constant:
            return A
        return torch.cat([torch.cat([A, x], 1), torch.cat([x, x.new_ones(1, 1)]).mT])

    def gradients(self, key: str) -> tuple[Float[Tensor, "o o"], Float[Tensor, "o i"]]:
        """Hand over S and G of one matrix."""
        S, G = self._mean(f"S {key}"), self._mean(f"G {key}")
        if self.has_bias:
            G = torch.cat([G, self._sums["s"][self.parts[key]] / self.n_seen], 1)
        return S, G

    def _mean(self, key: str) -> Tensor:
        return self._sums.pop(key).div_(self.n_seen)

    def _add(self, key: str, left: Tensor, right: Tensor) -> None:
        if key not in self._sums:
            self._sums[key] = left.new_zeros(left.shape[1], right.shape[1])
        self._sums[key].addmm_(left.mT, right)


def sites_of(layer: int, block: nn.Module) -> list[Site]:
    """Return the linear maps of a layer that a compressor may cut.

    Raises:
        SelectionError: the block is written in no known way.
    """
    anatomy = anatomy_of(block)
    first = next(m.name for m in anatomy.matrices if m.role == "q")
    sites: dict[str, Site] = {}

    def site(name: str, input_of: str) -> Site:
        if name not in sites:
            sites[name] = Site(layer, name, block.get_submodule(name), input_of)
        return sites[name]

    for matrix in anatomy.matrices:
        found = site(matrix.name, matrix.name if matrix.role == "o" else first)
        found.parts[matrix.key] = matrix.rows
    for name in anatomy.mlp.names:
        first = anatomy.mlp.down if name == anatomy.mlp.down else anatomy.mlp.up
        site(name, first).parts[name] = slice(None)
    return list(sites.values())


def any_bias(sites: Iterable[Site], input_of: str) -> bool:
    """Tell whether one of the modules that read the same has a bias."""
    return any(site.has_bias for site in sites if site.input_of == input_of)
