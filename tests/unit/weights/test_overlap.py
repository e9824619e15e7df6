"""What two choices share, against sets of single entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_deltas import shared

from selectune.errors import SelectionError
from selectune.weights.delta import SparseDelta
from selectune.weights.mask import WeightMask
from selectune.weights.overlap import overlap

SHAPES = {
    "model.embed_tokens.weight": (4, 3),
    "model.layers.0.self_attn.q_proj.weight": (3, 3),
    "model.layers.1.self_attn.q_proj.weight": (3, 3),
    "model.layers.1.mlp.up_proj.weight": (2, 3),
}


NUMELS = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
# What two deltas hold, made into deltas by the test: beartype draws random numbers of its own.
PARTS = st.fixed_dictionaries(
    {n: st.dictionaries(st.integers(0, k - 1), st.sampled_from([-1.0, 0.0, 2.0]))
     for n, k in NUMELS.items()}
)  # fmt: skip


def made(parts: dict[str, dict[int, float]]) -> SparseDelta:
    ordered = {name: dict(sorted(held.items())) for name, held in parts.items()}
    indices = {n: torch.tensor(list(held), dtype=torch.int64) for n, held in ordered.items()}
    deltas = {n: torch.tensor(list(held.values())) for n, held in ordered.items()}
    return SparseDelta(indices, deltas, SHAPES, dict.fromkeys(SHAPES, "float32"), "f00d")


@given(PARTS, PARTS)
def test_counts_equal_those_of_sets(
    one: dict[str, dict[int, float]], other: dict[str, dict[int, float]]
) -> None:
    first, second = made(one), made(other)
    found = overlap(first, second).total
    n_first, n_second, n_both, n_alike = shared(first, second)
    assert (found.n_first, found.n_second, found.n_both) == (n_first, n_second, n_both)
    assert found.n_alike == n_alike
    either = n_first + n_second - n_both
    assert found.jaccard == (n_both / either if either else 1.0)
    assert found.sign_agreement == (n_alike / n_both if n_both else None)


@given(PARTS, PARTS)
def test_parts_add_up_and_order_does_not_matter(
    one: dict[str, dict[int, float]], other: dict[str, dict[int, float]]
) -> None:
    first, second = made(one), made(other)
    found, turned = overlap(first, second), overlap(second, first)
    for table in (found.layers, found.modules):
        assert sum(part.n_both for part in table.values()) == found.total.n_both
        assert sum(part.n_eligible for part in table.values()) == found.total.n_eligible
        assert sum(part.n_alike or 0 for part in table.values()) == found.total.n_alike
    assert turned.total.n_both == found.total.n_both
    assert turned.total.by_chance == found.total.by_chance


def masks() -> tuple[WeightMask, WeightMask]:
    q, up = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    first = WeightMask({q: torch.tensor([0, 1, 2]), up: torch.tensor([5])}, SHAPES, "f00d")
    second = WeightMask({q: torch.tensor([2, 8])}, SHAPES, "f00d")
    return first, second


def test_masks_have_no_signs_and_count_all_that_could_be_chosen() -> None:
    found = overlap(*masks())
    assert found.total.n_eligible == 36
    assert found.total.by_chance == pytest.approx(4 * 2 / 36)
    assert found.total.sign_agreement is None
    assert set(found.layers) == {"outside", "0", "1"}
    assert set(found.modules) == {"embed_tokens", "q_proj", "up_proj"}
    assert found.layers["1"].n_both == 1
    assert found.modules["q_proj"].jaccard == 1 / 4
    assert found.layers["outside"].jaccard == 1.0
    assert repr(found) == "Overlap(1 of 4 and 2, 0.2 by chance, Jaccard 0.200)"
    assert found.to_json()["modules"]["q_proj"]["n_eligible"] == 18


def test_a_mask_and_a_delta_compare() -> None:
    mask, _ = masks()
    name = "model.layers.1.mlp.up_proj.weight"
    delta = SparseDelta(
        {name: torch.tensor([5])}, {name: torch.ones(1)}, {name: (2, 3)}, {name: "float32"}, "f00d"
    )
    assert overlap(mask, delta).total.n_both == 1
    assert overlap(delta, mask).total.sign_agreement is None
    assert "100.0% of them alike" in repr(overlap(delta, delta))


def test_choices_of_two_bases_are_refused() -> None:
    first, _ = masks()
    with pytest.raises(SelectionError, match="different base models"):
        overlap(first, WeightMask({}, SHAPES, "beef"))
    with pytest.raises(SelectionError, match="shapes of"):
        overlap(first, WeightMask({}, {**SHAPES, "model.embed_tokens.weight": (4, 4)}, "f00d"))
