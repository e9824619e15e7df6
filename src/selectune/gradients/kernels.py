"""What each example of a batch asks of one parameter, without a loop over examples.

A kernel turns the rows of one module (inputs `X [n, t, i]`, output gradients `D [n, t, o]` of the
*sum* of the example losses) into `Rows`, a small value with five questions:

    dense()      [n, *shape]   every example's gradient
    combine(w)   [*shape]      sum_n w_n g_n
    dot(G)       [n]           <g_n, G>
    norm2()      [n]           <g_n, g_n>
    project(P)   [n, k]        <g_n, P_j> for the rows of P [k, d]

Half-precision rows are summed in fp32; fp32 and fp64 stay as they are. To cover a new module type,
add one function under `@gradient_kernel(Type)`; the coverage check compares it with autograd on
the first batch of every pass, so a wrong kernel is never used.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# The most elements that `project` forms at once where a batch of dense gradients would be large.
_CHUNK_ELEMENTS = 1 << 25


@runtime_checkable
class Rows(Protocol):
    """What each of n examples asks of one parameter."""

    @property
    def n(self) -> int:
        """Examples."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        ...

    def dense(self) -> Float[Tensor, "n ..."]:
        """Every example's gradient."""
        ...

    def combine(self, w: Float[Tensor, " n"]) -> Float[Tensor, "..."]:
        """Weighted sum over examples."""
        ...

    def dot(self, G: Float[Tensor, "..."]) -> Float[Tensor, " n"]:
        """Inner product of every example's gradient with G."""
        ...

    def norm2(self) -> Float[Tensor, " n"]:
        """Squared norm of every example's gradient."""
        ...

    def project(self, P: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Inner products with k directions."""
        ...


def exact(x: Tensor) -> Tensor:
    """Return `x` in a type that sums without losing digits: fp32, or fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, slots=True)
class DenseRows:
    """Gradients that are small enough to hold, or that the one-example loop gave."""

    G: Float[Tensor, "n ..."]

    @property
    def n(self) -> int:
        """Examples."""
        return self.G.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.G.shape[1:])

    def dense(self) -> Float[Tensor, "n ..."]:
        """Every example's gradient."""
        return self.G

    def combine(self, w: Float[Tensor, " n"]) -> Float[Tensor, "..."]:
        """Weighted sum over examples."""
        return torch.einsum("n,n...->...", w, self.G)

    def dot(self, G: Float[Tensor, "..."]) -> Float[Tensor, " n"]:
        """Inner product of every example's gradient with G."""
        return self.G.flatten(1) @ G.flatten()

    def norm2(self) -> Float[Tensor, " n"]:
        """Squared norm of every example's gradient."""
        return self.G.flatten(1).square().sum(1)

    def project(self, P: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Inner products with k directions."""
        return self.G.flatten(1) @ P.mT


@dataclass(frozen=True, slots=True)
class LinearRows:
    """What each example asks of one matrix: D_n^T X_n, formed only by `dense`.

    Rows in half precision stay so until they are used. For weights stored the other way round
    (transformers' Conv1D) X and D change places.
    """

    X: Float[Tensor, "n t i"]
    D: Float[Tensor, "n t o"]

    @property
    def n(self) -> int:
        """Examples."""
        return self.X.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, [o, i]."""
        return (self.D.shape[2], self.X.shape[2])

    def widened(self) -> "LinearRows":
        """Return the rows in a type that sums without losing digits."""
        return LinearRows(exact(self.X), exact(self.D))

    def dense(self) -> Float[Tensor, "n o i"]:
        """Every example's gradient."""
        return exact(self.D).mT @ exact(self.X)

    def combine(self, w: Float[Tensor, " n"]) -> Float[Tensor, "o i"]:
        """Weighted sum over examples: one product, no gradient per example."""
        D = exact(self.D) * w[:, None, None]
        return D.flatten(0, 1).mT @ exact(self.X).flatten(0, 1)

    def dot(self, G: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
        """Inner product with G, through the smaller side."""
        return self._terms(G).sum((1, 2))

    def by_position(self, G: Float[Tensor, "o i"]) -> Float[Tensor, "n t"]:
        """Inner product with G, split by the positions at which the module ran."""
        return self._terms(G).sum(2)

    def _terms(self, G: Float[Tensor, "o i"]) -> Float[Tensor, "n t _"]:
        X, D = exact(self.X), exact(self.D)
        if self.shape[0] <= self.shape[1]:
            return (D @ G) * X
        return (X @ G.mT) * D

    def norm2(self) -> Float[Tensor, " n"]:
        """Squared norm: <D^T X, D^T X> = <D D^T, X X^T>, the cheaper form while t * t < o * i."""
        t, (o, i) = self.X.shape[1], self.shape
        if t * t < o * i:
            X, D = exact(self.X), exact(self.D)
            return ((D @ D.mT) * (X @ X.mT)).sum((1, 2))
        return self.dense().square().sum((1, 2))

    def project(self, P: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Inner products with k directions, a few examples' dense gradients at a time."""
        X, D = exact(self.X), exact(self.D)
        step = max(1, _CHUNK_ELEMENTS // (self.shape[0] * self.shape[1]))
        parts = [
            (D[a : a + step].mT @ X[a : a + step]).flatten(1) @ P.mT for a in range(0, self.n, step)
        ]
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """What each example asks of a table of vectors: D added up at the rows that were looked up."""

    T: Int[Tensor, "n t"]
    D: Float[Tensor, "n t h"]  # 0 where the table's padding row was looked up
    n_rows: int

    @property
    def n(self) -> int:
        """Examples."""
        return self.T.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table, [rows, h]."""
        return (self.n_rows, self.D.shape[2])

    def dense(self) -> Float[Tensor, "n v h"]:
        """Every example's gradient; large, so prefer the other four."""
        out = self.D.new_zeros(self.n, *self.shape)
        index = self.T[..., None].expand_as(self.D)
        return out.scatter_add_(1, index, self.D)

    def combine(self, w: Float[Tensor, " n"]) -> Float[Tensor, "v h"]:
        """Weighted sum over examples."""
        weighted = (self.D * w[:, None, None]).flatten(0, 1)
        return self.D.new_zeros(self.shape).index_add_(0, self.T.flatten(), weighted)

    def dot(self, G: Float[Tensor, "v h"]) -> Float[Tensor, " n"]:
        """Inner product with G, read only at the rows looked up."""
        return (self.D * G[self.T]).sum((1, 2))

    def by_position(self, G: Float[Tensor, "v h"]) -> Float[Tensor, "n t"]:
        """Inner product with G, split by the positions that looked a row up."""
        return (self.D * G[self.T]).sum(2)

    def norm2(self) -> Float[Tensor, " n"]:
        """Squared norm: pairs of positions count where they looked up the same row."""
        same = self.T[:, :, None] == self.T[:, None, :]
        return ((self.D @ self.D.mT) * same).sum((1, 2))

    def project(self, P: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Inner products with k directions, one direction at a time."""
        return torch.stack([self.dot(p.view(self.shape)) for p in P], dim=1)


@dataclass(frozen=True, slots=True)
class JointRows:
    """The sum of several uses of one parameter: tied weights, or a module called twice."""

    parts: Sequence[Rows]

    @property
    def n(self) -> int:
        """Examples."""
        return self.parts[0].n

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.parts[0].shape

    def dense(self) -> Float[Tensor, "n ..."]:
        """Every example's gradient."""
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def combine(self, w: Float[Tensor, " n"]) -> Float[Tensor, "..."]:
        """Weighted sum over examples."""
        return torch.stack([part.combine(w) for part in self.parts]).sum(0)

    def dot(self, G: Float[Tensor, "..."]) -> Float[Tensor, " n"]:
        """Inner product with G."""
        return torch.stack([part.dot(G) for part in self.parts]).sum(0)

    def norm2(self) -> Float[Tensor, " n"]:
        """Squared norm; the uses interfere, so it is taken of the sum, an example at a time."""
        return torch.stack([_only(self, k).dense().square().sum() for k in range(self.n)])

    def project(self, P: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Inner products with k directions."""
        return torch.stack([part.project(P) for part in self.parts]).sum(0)


@cache
def _hear_of_beta() -> None:
    # torch 2.13 says once in a process that compressed rows are in beta.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        at = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int32), at[:0], size=(1, 1), values=torch.zeros(0),
            check_invariants=False,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where chosen entries of a matrix lie, as compressed rows: what sparse products read."""

    crow: Int[Tensor, " _"]
    col: Int[Tensor, " k"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, index: Int[Tensor, " k"], shape: tuple[int, int]) -> "Pattern":
        """Compress flat, ascending indices of a matrix of this shape."""
        _hear_of_beta()
        n_rows, n_cols = shape
        ends = torch.arange(n_rows + 1, device=index.device, dtype=torch.int64) * n_cols
        crow = torch.searchsorted(index, ends.to(index.dtype)).to(index.dtype)
        return cls(crow, index % n_cols, shape)

    def filled(self, values: Float[Tensor, " k"]) -> Tensor:
        """Return the sparse matrix with these values at the chosen entries."""
        return torch.sparse_csr_tensor(
            self.crow, self.col, values, size=self.shape, check_invariants=False
        )

    def sampled(
        self, left: Float[Tensor, "t r"], right: Float[Tensor, "t c"]
    ) -> Float[Tensor, " k"]:
        """Return the chosen entries of left^T right, without the others ever being formed.

        In fp32 or fp64: the CPU kernel of torch 2.13 refuses half precision.
        """
        left, right = exact(left), exact(right)
        # beta = 0 would turn a NaN that stood here into one in the product, so: zeros.
        empty = self.filled(right.new_zeros(self.col.numel()))
        return torch.sparse.sampled_addmm(empty, left.mT, right, beta=0.0).values()


@dataclass(frozen=True, slots=True)
class SparseRows:
    """What each example asks of chosen entries of one parameter.

    Of a matrix, only `dense`, `norm2` and `project` form gradients of the whole, a few examples'
    at a time.
    """

    whole: Rows
    index: Int[Tensor, " k"]  # flat, ascending
    pattern: Pattern | None = None  # of a matrix

    @property
    def n(self) -> int:
        """Examples."""
        return self.whole.n

    @property
    def shape(self) -> tuple[int, ...]:
        """How many entries are chosen."""
        return (self.index.numel(),)

    def dense(self) -> Float[Tensor, "n k"]:
        """Every example's gradient at the chosen entries."""
        if isinstance(self.whole, DenseRows):
            return self.whole.G.flatten(1)[:, self.index]
        step = max(1, _CHUNK_ELEMENTS // max(1, prod(self.whole.shape)))
        parts = [
            some.dense().flatten(1)[:, self.index]
            for start in range(0, self.n, step)
            for some in [_some(self.whole, start, start + step)]
        ]
        return torch.cat(parts)

    def combine(self, w: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
        """Weighted sum over examples; of a matrix by a product of the chosen entries alone."""
        if isinstance(self.whole, LinearRows) and self.pattern is not None:
            D = exact(self.whole.D) * w[:, None, None]
            return self.pattern.sampled(D.flatten(0, 1), self.whole.X.flatten(0, 1))
        return self.whole.combine(w).flatten()[self.index]

    def dot(self, G: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        """Inner product with G."""
        if isinstance(self.whole, LinearRows) and self.pattern is not None:
            X, D = exact(self.whole.X), exact(self.whole.D)
            product = self.pattern.filled(G.to(X.dtype)) @ X.flatten(0, 1).mT
            return (product.mT.view_as(D) * D).sum((1, 2))
        full = G.new_zeros(prod(self.whole.shape))
        full[self.index] = G
        return self.whole.dot(full.view(self.whole.shape))

    def norm2(self) -> Float[Tensor, " n"]:
        """Squared norm of every example's gradient."""
        return self.dense().square().sum(1)

    def project(self, P: Float[Tensor, "d k"]) -> Float[Tensor, "n d"]:
        """Inner products with d directions."""
        return self.dense() @ P.mT


def _only(rows: Rows, k: int) -> Rows:
    """Return the rows of example k alone, so that a dense form holds one gradient, not n."""
    return _some(rows, k, k + 1)


def _some(rows: Rows, start: int, end: int) -> Rows:
    """Return the rows of a few examples that follow one another."""
    match rows:
        case JointRows():
            return JointRows([_some(part, start, end) for part in rows.parts])
        case LinearRows():
            return LinearRows(rows.X[start:end], rows.D[start:end])
        case EmbeddingRows():
            return EmbeddingRows(rows.T[start:end], rows.D[start:end], rows.n_rows)
        case SparseRows():
            return SparseRows(_some(rows.whole, start, end), rows.index, rows.pattern)
        case _:
            return DenseRows(rows.dense()[start:end])


def by_position(rows: Rows, G: Float[Tensor, "..."], t: int) -> Float[Tensor, "n t"] | None:
    """Return <g_n, G> split by position; None where the rows are not one per token.

    Args:
        rows: of one parameter.
        G: of the parameter's shape.
        t: tokens in a row of the batch, padding included.
    """
    match rows:
        case LinearRows() | EmbeddingRows():
            return rows.by_position(G) if rows.D.shape[1] == t else None
        case JointRows():
            parts = [by_position(part, G, t) for part in rows.parts]
            found = [part for part in parts if part is not None]
            return torch.stack(found).sum(0) if len(found) == len(parts) else None
        case _:
            return None  # summed over positions already


def dense_parts(rows: Rows) -> Iterator[Float[Tensor, "n ..."]]:
    """Yield every example's gradient, in parts that are formed from a few examples each."""
    step = max(1, _CHUNK_ELEMENTS // max(1, prod(rows.shape)))
    for start in range(0, rows.n, step):
        yield (rows if rows.n <= step else _some(rows, start, start + step)).dense()


def project_with_norm(
    rows: Rows, P: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
    """Return `project(P)` and `norm2()` from one dense gradient where that is the cheaper way."""
    if isinstance(rows, LinearRows) and rows.n * rows.shape[0] * rows.shape[1] <= _CHUNK_ELEMENTS:
        rows = DenseRows(rows.dense())
    if isinstance(rows, SparseRows):
        rows = DenseRows(rows.dense())
    return rows.project(P), rows.norm2()


def ones(rows: Rows) -> Float[Tensor, " n"]:
    """Return a weight of 1 for every example, of the type and on the device of the rows."""
    match rows:
        case LinearRows() | EmbeddingRows():
            return exact(rows.D.new_ones(rows.n))
        case JointRows():
            return ones(rows.parts[0])
        case SparseRows():
            return ones(rows.whole)
        case _:
            return rows.dense().new_ones(rows.n)


def thin(rows: Rows) -> Rows:
    """Return rows in the smaller of their two forms; for low-rank factors that is the dense one.

    The product runs in the precision of the rows, as autograd's own weight gradient does, and each
    example's gradient is rounded once.
    """
    if not isinstance(rows, LinearRows):
        return rows
    o, i = rows.shape
    if o * i > rows.X.shape[1] * (o + i):
        return rows
    return DenseRows(exact(rows.D.mT @ rows.X) if _is_even(rows) else rows.dense())


def total(rows: Rows) -> Float[Tensor, "..."]:
    """Return the sum over examples, in one product of the precision of the rows."""
    if isinstance(rows, LinearRows) and _is_even(rows):
        return exact(rows.D.flatten(0, 1).mT @ rows.X.flatten(0, 1))
    return rows.combine(ones(rows))


def _is_even(rows: LinearRows) -> bool:
    return rows.X.dtype == rows.D.dtype


def gram(rows: Rows) -> Float[Tensor, "n n"]:
    """Return the inner products <g_n, g_m> of every two examples, from their dense gradients."""
    G = rows.dense().flatten(1)
    return G @ G.mT


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module, as its kernel sees it in the backward pass."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    D: Float[Tensor, "n ..."]  # gradient of the summed example losses at the output
    half: torch.dtype | None = None  # of the autocast that the call stood in

    @property
    def input(self) -> Any:  # noqa: ANN401
        """The first argument, however it was passed."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


def is_flat(output: Tensor, n: int, t: int) -> bool:
    """Tell whether a module was called on all tokens of a batch without a batch axis."""
    return output.ndim == 2 and output.shape[0] == n * t and output.shape[0] != n


def folded(call: Call, n: int, t: int) -> Call:
    """Return a call on [n * t, .] rows, as OPT's MLPs make it, with the batch axis back in place.

    Nothing in the shape tells in which order the tokens stand: whoever folds has to check the
    outcome against an example by itself.
    """

    def fold(value: Any) -> Any:  # noqa: ANN401
        is_row = isinstance(value, Tensor) and is_flat(value, n, t)
        return value.view(n, t, value.shape[1]) if is_row else value

    args = tuple(fold(value) for value in call.args)
    kwargs = {key: fold(value) for key, value in call.kwargs.items()}
    return Call(call.module, args, kwargs, call.D.reshape(n, t, call.D.shape[1]), call.half)


class Swapped(nn.Module):
    """A module whose class was swapped for one that adds to it; kernels ask what it was."""

    swapped_from: ClassVar[type[nn.Module]]


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    kind = module.swapped_from if isinstance(module, Swapped) else type(module)
    return kind.forward


Kernel = Callable[[Call, str], Rows | None]
_kernels: dict[type, Kernel] = {}
_kernels_by_name: dict[str, Kernel] = {}


def gradient_kernel(*types: type, named: str = "") -> Callable[[Kernel], Kernel]:
    """Register a function (call, parameter name in the module) -> Rows, or None to decline.

    Args:
        types: the module types it serves, subclasses included.
        named: the end of a class name that it serves beside them; every model family brings an
            RMSNorm class of its own, and the coverage check proves each on the first batch.

    Raises:
        ValueError: a type or a name is served already.
    """

    def add(kernel: Kernel) -> Kernel:
        for key in types:
            if key in _kernels:
                raise ValueError(f"{key.__name__} has a gradient kernel already")
            _kernels[key] = kernel
        if named:
            if named in _kernels_by_name:
                raise ValueError(f"*{named} has a gradient kernel already")
            _kernels_by_name[named] = kernel
        return kernel

    return add


def gradient_kernels() -> dict[str, Kernel]:
    """Return every registered kernel by the name of what it serves."""
    by_type = {key.__name__: kernel for key, kernel in _kernels.items()}
    return by_type | {f"*{name}": kernel for name, kernel in _kernels_by_name.items()}


def kernel_for(module: nn.Module) -> Kernel | None:
    """Return the kernel of a module's nearest type, else of its class name, else None."""
    return kernel_of(type(module))


def kernel_of(kind: type[nn.Module]) -> Kernel | None:
    """Return the kernel of modules of a type."""
    for base in kind.__mro__:
        for name, kernel in _kernels_by_name.items():
            # A swapped class bears the name of what it was, and has a kernel by type.
            is_named = base.__name__.endswith(name) and not issubclass(base, Swapped)
            if is_named and base not in _kernels:
                return kernel
        if base in _kernels:
            return _kernels[base]
    return None


@gradient_kernel(nn.Linear)
def linear(call: Call, name: str) -> Rows | None:
    """Rows of nn.Linear: y = x W^T + b."""
    X, D = call.input, call.D
    if _forward_of(call.module) is not nn.Linear.forward or X.ndim != 3:
        return None
    if name == "bias":
        return DenseRows(exact(D).sum(1))
    return LinearRows(X, D) if name == "weight" else None


@gradient_kernel(Conv1D)
def conv1d(call: Call, name: str) -> Rows | None:
    """Rows of transformers' Conv1D (GPT-2): y = x W + b, so X and D change places."""
    X, D = call.input, call.D
    if X.ndim != 3:
        return None
    if name == "bias":
        return DenseRows(exact(D).sum(1))
    return LinearRows(D, X) if name == "weight" else None


@gradient_kernel(nn.Embedding)
def embedding(call: Call, name: str) -> Rows | None:
    """Rows of nn.Embedding; a class that looks up something else than its input is declined."""
    if _forward_of(call.module) is not nn.Embedding.forward:
        return None
    return _looked_up(call, name)


def _looked_up(call: Call, name: str) -> Rows | None:
    """Read rows off a lookup. `max_norm` and `scale_grad_by_freq` rewrite gradients: declined."""
    module, T = call.module, call.input
    if not isinstance(module, nn.Embedding) or module.max_norm or module.scale_grad_by_freq:
        return None
    if name != "weight" or T.ndim != 2:
        return None
    is_learnt = (-1 if module.padding_idx is None else module.padding_idx) != T
    return EmbeddingRows(T, exact(call.D) * is_learnt[..., None], module.num_embeddings)


@gradient_kernel(named="ScaledWordEmbedding")
def scaled_embedding(call: Call, name: str) -> Rows | None:
    """Rows of Gemma's embedding, which multiplies what it looked up by `embed_scale`."""
    scaled = exact(call.D) * exact(torch.as_tensor(call.module.embed_scale))
    return _looked_up(Call(call.module, call.args, call.kwargs, scaled), name)


@gradient_kernel(nn.LayerNorm, nn.RMSNorm, named="RMSNorm")
@gradient_kernel(named="LayerNorm")
@gradient_kernel(named="DoraLinearLayer")
def scale_and_shift(call: Call, name: str) -> Rows | None:
    """Rows of vectors that scale or shift the output's last axis elementwise: y = c + p * b.

    b = y(p = 1) - y(p = 0) with everything else as it was, so Llama's `w * x`, Gemma's
    `(1 + w) * x`, a bias, Qwen3's norm of each head and DoRA's magnitude are one case.
    """
    parameter = call.module.get_parameter(name)
    if call.D.ndim < 3 or parameter.shape != call.D.shape[-1:]:
        return None
    # DoRA's magnitude multiplies matrices on the way, of dtypes that fit under autocast only.
    with torch.autocast(call.D.device.type, call.half, enabled=call.half is not None):
        ends = [
            torch.func.functional_call(
                call.module, {name: torch.full_like(parameter, v)}, call.args, dict(call.kwargs)
            )
            for v in (1.0, 0.0)
        ]
    product = exact(call.D) * (exact(ends[0]) - exact(ends[1]))
    return DenseRows(product.flatten(1, -2).sum(1))
