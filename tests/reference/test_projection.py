"""Random projections keep inner products, add up over parameters, and are drawn once a group."""

import numpy as np
import pytest
import torch
from torch import nn

from selectune.gradients import projection as projection_module
from selectune.gradients.kernels import DenseRows
from selectune.gradients.products import ProjectedProducts
from selectune.gradients.projection import Projection

KINDS = ("rademacher", "hadamard")


def matrix(how: Projection, name: str, d: int) -> torch.Tensor:
    """Return R of one parameter, [k, d]."""
    out = torch.zeros(d, how.dim)
    how.add(out, name, torch.eye(d))
    return out.mT


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_of_unit_vectors_are_kept_at_8192(kind: str) -> None:
    how = Projection(kind, 8192, 0)
    G = nn.functional.normalize(torch.randn(40, 3000), dim=1)
    G[20:] = nn.functional.normalize(G[:20] + 0.7 * G[20:], dim=1)  # some of them alike
    out = torch.zeros(40, 8192)
    for name, part in zip(("a", "b", "c"), G.split([700, 2200, 100], 1), strict=True):
        how.add(out, name, part)
    error = nn.functional.normalize(out, dim=1) @ nn.functional.normalize(out, dim=1).mT - G @ G.mT
    upper = error[np.triu_indices(40, 1)]
    assert float(upper.std()) <= 0.016
    assert abs(float(upper.mean())) <= 0.002


def test_signs_are_the_bits_of_a_raw_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_module, "_CACHED_BYTES", 5)
    words = [int(w) for w in np.random.PCG64(7).random_raw(3)]
    expected = [1.0 if word >> bit & 1 else -1.0 for word in words for bit in range(64)][:130]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = projection_module._signs(7, 130, torch.empty(0, dtype=dtype))
        assert found.dtype == dtype
        assert found.tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 128, 256, 1 << 15])
def test_the_transform_is_sylvesters(size: int) -> None:
    ones = sorted({0, size // 3, size - 1})
    found = projection_module._rotated(_units(ones, size))
    for i, row in zip(ones, found, strict=True):
        signs = [(-1) ** (i & j).bit_count() for j in range(size)]
        torch.testing.assert_close(row, torch.tensor(signs) / size**0.5, rtol=1e-5, atol=0)


def _units(places: list[int], size: int) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(places), size).float()


def test_in_bfloat16_the_signs_are_the_same_and_only_gradients_are_rounded() -> None:
    full, half = (Projection("rademacher", 64, 0, p) for p in ("float32", "bfloat16"))
    assert torch.equal(matrix(full, "w", 200), matrix(half, "w", 200))
    G = torch.randn(30, 2000)
    outs = [torch.zeros(30, 64) for _ in range(2)]
    for how, out in zip((full, half), outs, strict=True):
        how.add(out, "w", G)
    error = (outs[0] - outs[1]).norm(dim=1) / outs[0].norm(dim=1)
    assert 0 < float(error.max()) < 2**-7


def test_rademacher_entries_are_signs_of_every_block_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_module, "_PIECE_ELEMENTS", 16 * 64)
    R = matrix(Projection("rademacher", 64, 0), "w", 200) * 8
    assert set(R.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(R.mean())) < 0.03
    blocks = R.split(16, dim=1)
    assert len(blocks) == 13
    assert not any(torch.equal(blocks[0], b) for b in blocks[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_name_decide_the_draw(kind: str) -> None:
    first = matrix(Projection(kind, 32, 0), "w", 20)
    assert torch.equal(first, matrix(Projection(kind, 32, 0), "w", 20))
    assert not torch.equal(first, matrix(Projection(kind, 32, 1), "w", 20))
    assert not torch.equal(first, matrix(Projection(kind, 32, 0), "x", 20))


def test_a_small_parameter_is_only_rotated_by_hadamard() -> None:
    R = matrix(Projection("hadamard", 32, 0), "w", 16)
    torch.testing.assert_close(R.mT @ R, torch.eye(16))


@pytest.mark.parametrize(
    ("kind", "waiting_bytes", "n_draws"),
    [("rademacher", 1 << 20, 1), ("rademacher", 1, 4), ("hadamard", 1 << 20, 4)],
)
def test_a_dear_matrix_is_drawn_once_for_all_gradients_that_wait(
    monkeypatch: pytest.MonkeyPatch, kind: str, waiting_bytes: int, n_draws: int
) -> None:
    drawn: list[str] = []
    plain = Projection.add

    def counted(self: Projection, out: torch.Tensor, name: str, G: torch.Tensor) -> None:
        drawn.append(name)
        plain(self, out, name, G)

    monkeypatch.setattr(Projection, "add", counted)
    how = Projection(kind, 8, 0)
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))}
    F = torch.randn(2, 8)
    products = ProjectedProducts(F, how, parameters, None, waiting_bytes=waiting_bytes)
    expected: list[torch.Tensor] = []
    for _ in range(4):
        A, B = torch.randn(5, 3), torch.randn(5, 2, 2)
        products.take("b", DenseRows(B))
        products.take("a", DenseRows(A))
        norm2 = products.close_batch(5)
        torch.testing.assert_close(norm2.float(), A.square().sum(1) + B.square().sum((1, 2)))
        out = torch.zeros(5, 8)
        plain(how, out, "a", A)
        plain(how, out, "b", B.flatten(1))
        expected.append(out)
    dots, norms = products.results()
    assert sorted(drawn) == ["a"] * n_draws + ["b"] * n_draws
    torch.testing.assert_close(dots, torch.cat(expected) @ F.mT)
    torch.testing.assert_close(norms.float(), torch.cat(expected).norm(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_some_batches_do_not_use_stays_with_its_examples(kind: str) -> None:
    how = Projection(kind, 8, 0)
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2))}
    products = ProjectedProducts(torch.eye(8), how, parameters, None)
    A, B = torch.randn(4, 3), torch.randn(2, 2)
    products.take("a", DenseRows(A[:2]))
    products.close_batch(2)
    products.take("a", DenseRows(A[2:]))
    products.take("b", DenseRows(B))
    products.close_batch(2)
    expected, late = torch.zeros(4, 8), torch.zeros(2, 8)
    how.add(expected, "a", A)
    how.add(late, "b", B)
    expected[2:] += late
    torch.testing.assert_close(products.results()[0], expected)
