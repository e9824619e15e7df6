"""Deltas in and out of a model: the formula, every bit, any order."""

import copy
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slow_deltas import merged_weights
from torch import Tensor, nn

from selectune.adapters.add import quiet
from selectune.errors import (
    ConfigError,
    CorruptFileError,
    CoverageError,
    IncompatibleRunError,
    SelectionError,
    StorageError,
)
from selectune.weights.base import base_fingerprint, base_weights
from selectune.weights.delta import SparseDelta
from selectune.weights.merged import merged, n_moved
from selectune.weights.merged_files import OVERWRITTEN, save_merged
from selectune.weights.merging import identity, merge, switch, unmerge
from unit.weights.deltas import assert_same_bits, bits, tiny_delta, tiny_model

HALF = torch.bfloat16
DTYPES = [torch.float32, HALF, torch.float16]


def three(model: nn.Module) -> list[SparseDelta]:
    """Return deltas that overlap in some tensors and entries, and not in others."""
    return [
        tiny_delta(model, 1, 0.3),
        tiny_delta(model, 2, 0.4, "proj", HALF),
        tiny_delta(model, 3, 0.5, "layers.1"),
    ]


def in_order(parts: Sequence[tuple[SparseDelta, float]]) -> list[tuple[SparseDelta, float]]:
    return sorted(parts, key=lambda part: identity(part[0]))


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, p in base_weights(model).items():
        assert torch.equal(p.detach(), expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.7, 3])
def test_merged_weights_are_the_formula(dtype: torch.dtype, scale: float | int) -> None:
    model = tiny_model(dtype)
    delta = tiny_delta(model)
    expected = merged_weights(base_weights(model), [(delta, float(scale))])
    assert merge(model, delta, scale=scale) is model
    assert_weights(model, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_deltas_are_summed_in_an_order_of_their_own(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    a, b, c = three(model)
    parts = [(a, 1.0), (b, 0.5), (c, -2.0)]
    expected = merged_weights(base_weights(model), in_order(parts))
    together = merge(copy.deepcopy(model), [a, b, c], scale=[1.0, 0.5, -2.0])
    assert_weights(together, expected)
    for order in permutations(parts):
        one_by_one = copy.deepcopy(model)
        for delta, scale in order:
            merge(one_by_one, delta, scale=scale)
        assert_same_bits(one_by_one, bits(together))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_removal_is_exact(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    before, deltas = bits(model), three(model)
    alone = [bits(merge(copy.deepcopy(model), delta)) for delta in deltas]
    for order in permutations(range(3)):
        merge(model, deltas)
        unmerge(model, deltas[order[0]])
        unmerge(model, deltas[order[1]])
        assert_same_bits(model, alone[order[2]])
        unmerge(model, deltas[order[2]])
        assert_same_bits(model, before)
        assert merged(model) is None
    merge(model, deltas)
    assert_same_bits(unmerge(model), before)


def test_bits_that_arithmetic_would_lose_are_restored() -> None:
    model = tiny_model(HALF)
    delta = tiny_delta(model)
    with torch.no_grad():  # the sum with a delta is not minus zero
        for p in base_weights(model).values():
            p.view(-1)[::3] = -0.0
    delta = tiny_delta(model)
    before = bits(model)
    assert_same_bits(unmerge(merge(model, delta)), before)


def test_nothing_but_chosen_entries_is_touched() -> None:
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in base_weights(model).items()}
    delta = tiny_delta(model)
    merge(model, delta)
    for name, p in base_weights(model).items():
        moved = (p.detach() != before[name]).flatten().nonzero().flatten()
        assert set(moved.tolist()) <= set(delta.indices[name].tolist())
    assert n_moved(model) == sum(
        int((p.detach() != before[n]).sum()) for n, p in base_weights(model).items()
    )
    assert n_moved(unmerge(model)) == 0


def test_moved_counts_stored_bits() -> None:
    model = tiny_model(HALF)
    delta = tiny_delta(model, names="proj")
    tiny = SparseDelta(
        delta.indices,
        {name: 1e-9 * held for name, held in delta.deltas.items()},
        delta.shapes,
        delta.dtypes,
        delta.base,
    )
    assert n_moved(merge(model, tiny)) == 0
    assert n_moved(merge(unmerge(model), tiny, scale=1e8)) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_switching_equals_a_fresh_merge(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    before = bits(model)
    a, b, c = three(model)
    alone = bits(merge(copy.deepcopy(model), b, scale=0.5))
    pair = bits(merge(copy.deepcopy(model), [b, c]))
    assert_same_bits(switch(merge(model, a), a, b, scale=0.5), alone)
    assert_same_bits(unmerge(model), before)
    assert_same_bits(switch(merge(model, [a, c]), a, b), pair)
    assert_same_bits(unmerge(model), before)


def test_switching_touches_only_the_tensors_of_the_two() -> None:
    model = tiny_model()
    a, b = tiny_delta(model, 1, names="q_proj"), tiny_delta(model, 2, names="v_proj")
    merge(model, [a, tiny_delta(model, 3, names="norm")])
    versions = {n: p._version for n, p in base_weights(model).items()}
    switch(model, a, b)
    touched = {n for n, p in base_weights(model).items() if p._version != versions[n]}
    assert touched == {*a.indices, *b.indices}


def test_deltas_are_found_again_by_what_they_hold(tmp_path: Path) -> None:
    model = tiny_model()
    before, delta = bits(model), tiny_delta(model)
    delta.save(tmp_path / "plain")
    delta.save(tmp_path / "gaps", indices="gaps")
    merge(model, tmp_path / "plain")
    assert_same_bits(unmerge(model, str(tmp_path / "gaps")), before)


def test_what_is_saved_merges_as_what_is_live(tmp_path: Path) -> None:
    model = tiny_model(HALF)
    delta = tiny_delta(model)
    live = bits(merge(copy.deepcopy(model), delta))
    assert_same_bits(merge(model, delta.save(tmp_path / "delta")), live)


def test_a_copy_of_a_model_takes_its_originals_along() -> None:
    model = tiny_model()
    before, delta = bits(model), tiny_delta(model)
    clone = copy.deepcopy(merge(model, delta))
    assert_same_bits(unmerge(clone), before)
    assert merged(model) is not None
    assert_same_bits(unmerge(model, delta), before)


def test_tied_weights_change_once() -> None:
    model = tiny_model()
    delta = tiny_delta(model, names="embed")
    assert list(delta.indices) == ["model.embed_tokens.weight"]
    merge(model, delta)
    head = model.get_parameter("lm_head.weight")
    assert head is model.get_parameter("model.embed_tokens.weight")
    assert n_moved(model) == delta.n_entries


def test_gradients_and_training_flags_are_left_alone() -> None:
    model = tiny_model()
    frozen = model.get_parameter("model.norm.weight").requires_grad_(False)
    merge(model, tiny_delta(model))
    assert not frozen.requires_grad
    assert all(p.is_leaf for p in model.parameters())


# --- what is refused, and leaves everything as it was ---


def test_another_base_is_refused() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    delta = tiny_delta(model)
    before = bits(other)
    with pytest.raises(IncompatibleRunError, match="expects the fingerprint"):
        merge(other, delta)
    assert_same_bits(other, before)
    with pytest.raises(IncompatibleRunError, match=r"dtype=torch\.float32"):
        merge(tiny_model(HALF), delta)


def test_a_second_delta_of_another_base_is_refused_below_a_merge() -> None:
    model = tiny_model()
    mine, other = tiny_delta(model), tiny_delta(tiny_model(seed=1))
    merge(model, mine)
    before = bits(model)
    for act in (lambda: merge(model, other), lambda: switch(model, mine, other)):
        with pytest.raises(IncompatibleRunError, match="below the deltas"):
            act()
    assert_same_bits(model, before)


def test_weights_trained_after_an_unmerge_are_another_base() -> None:
    model = tiny_model()
    delta = tiny_delta(model)
    unmerge(merge(model, delta))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    with pytest.raises(IncompatibleRunError):
        merge(model, delta)


def test_what_is_not_merged_cannot_be_taken_out() -> None:
    model = tiny_model()
    a, b = tiny_delta(model, 1), tiny_delta(model, 2)
    for act in (lambda: unmerge(model), lambda: switch(model, a, b)):
        with pytest.raises(SelectionError, match="no delta is merged"):
            act()
    merge(model, a)
    for act in (lambda: unmerge(model, b), lambda: switch(model, b, a)):
        with pytest.raises(SelectionError, match="is not merged into this model"):
            act()
    with pytest.raises(SelectionError, match="merged already"):
        merge(model, a)
    with pytest.raises(SelectionError, match="merged already"):
        merge(model, [b, b])
    merge(model, b)
    with pytest.raises(SelectionError, match="merged already"):
        switch(model, a, b)


@pytest.mark.parametrize(("n", "scales"), [(0, 1.0), (2, [1.0]), (1, [1.0, 2.0])])
def test_scales_and_deltas_have_to_pair_up(n: int, scales: float | list[float]) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="scales for"):
        merge(model, [tiny_delta(model, seed) for seed in range(n)], scale=scales)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e30])
def test_weights_that_would_overflow_undo_the_whole_merge(scale: float) -> None:
    model = tiny_model(torch.float16)
    first, second = tiny_delta(model, 1), tiny_delta(model, 2)
    bare = bits(model)
    with pytest.raises(ConfigError, match="not be a finite number"):
        merge(model, [first, second], scale=[1.0, scale])
    assert_same_bits(model, bare)
    assert merged(model) is None
    merge(model, first)
    before = bits(model)
    with pytest.raises(ConfigError, match="use a smaller scale"):
        merge(model, second, scale=scale)
    assert_same_bits(model, before)
    assert_same_bits(unmerge(model), bare)


def test_weights_that_do_not_lie_in_one_piece_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight.data = torch.randn(3, 4).T
    delta = tiny_delta(model, names="0.weight")
    with pytest.raises(CoverageError, match=r"0\.weight cannot be changed in place"):
        merge(model, delta)


def test_a_model_that_trains_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    delta = tiny_delta(model)
    model[0].register_parameter("weight_values", nn.Parameter(torch.zeros(2)))
    with pytest.raises(SelectionError, match="trained in place"):
        merge(model, delta)


# --- folders ---


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    return folder / "base"


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_base_is_loaded_in_the_type_of_its_delta(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tiny_model(), tmp_path)  # on disk in fp32
    model = tiny_model().to(dtype)
    delta = tiny_delta(model)
    assert_same_bits(merge(str(path), delta), bits(merge(model, delta)))


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'the base "nowhere/at-all" cannot be loaded'):
        merge("nowhere/at-all", tiny_delta(tiny_model()))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_saved_merge_is_a_plain_model_and_can_be_undone(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(dtype)
    before = bits(model)
    merge(model, three(model))
    path = save_merged(model, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(str(path), dtype="auto")
    assert_same_bits(plain, bits(model))
    assert_same_bits(unmerge(path), before)
    save_merged(model, path)  # replaced at once
    with pytest.raises(SelectionError, match="one delta alone"):
        unmerge(path, three(tiny_model(dtype))[0])


def test_a_damaged_merge_is_not_undone(tmp_path: Path) -> None:
    model = tiny_model()
    path = save_merged(merge(model, tiny_delta(model)), tmp_path / "merged")
    file = path / OVERWRITTEN
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(CorruptFileError, match="damaged"):
        unmerge(path)
    with pytest.raises(CorruptFileError):
        unmerge(tmp_path / "nowhere")


def test_only_merged_models_of_transformers_are_saved(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="no delta is merged"):
        save_merged(tiny_model(), tmp_path / "merged")
    with pytest.raises(ConfigError, match="Sequential cannot be saved"):
        save_merged(nn.Sequential(), tmp_path / "merged")


def test_a_merge_does_not_replace_another_result(tmp_path: Path) -> None:
    model = tiny_model()
    delta = tiny_delta(model)
    delta.save(tmp_path / "delta")
    with pytest.raises(StorageError, match="something else"):
        save_merged(merge(model, delta), tmp_path / "delta")
    assert SparseDelta.load(tmp_path / "delta") == delta


def test_the_fingerprint_of_an_unmerged_base_is_its_own() -> None:
    model = tiny_model()
    expected = base_fingerprint(model)
    merge(model, tiny_delta(model))
    assert base_fingerprint(model) != expected
    assert base_fingerprint(unmerge(model)) == expected


def test_a_base_inside_an_adapter_is_merged_too() -> None:
    bare = tiny_model()
    delta = tiny_delta(bare)
    expected = bits(merge(bare, delta))
    with quiet():
        wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert_same_bits(merge(wrapped, delta), expected)
    assert_same_bits(unmerge(wrapped), bits(tiny_model()))
