"""An emulator is its original with some numbers left out, and with nothing else changed."""

import copy

import pytest
import torch
from slow_emulator import FAMILIES, MIDDLES, N_LAYERS, case, compressed, ids, masked_twin, plans
from tiny import tiny_trainable
from torch import nn
from torch.testing import assert_close

from selectune.errors import ConfigError, SelectionError
from selectune.models import blocks, fingerprint
from selectune.offsite.arrangement import Arrangement
from selectune.offsite.emulator import build_emulator, own_tensors
from selectune.offsite.layout import Layout
from selectune.offsite.modules import FusedLowRank, LowRankLinear, put_pieces
from selectune.offsite.pieces import Absent, CompressedLayer, LowRank, Narrow, SameAs


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_middle_gives_the_original_bit_for_bit(family: str) -> None:
    model, layout = case(family)
    emulator = build_emulator(model, layout, MIDDLES["untouched"](model, layout))
    assert type(emulator) is type(model)
    assert fingerprint(emulator.state_dict()) == fingerprint(model.state_dict())
    assert torch.equal(emulator(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_components_and_channels_give_the_original_to_rounding(family: str) -> None:
    model, layout = case(family)
    model = model.double()
    middle = compressed(model, layout, share=1.0)
    assert all(middle[j].pieces for j in layout.middle)
    emulator = build_emulator(model, layout, middle)
    assert_close(emulator(ids()).logits, model(ids()).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emulator_equals_the_original_with_the_rest_set_to_zero(family: str) -> None:
    model, layout = case(family)
    model = model.double()
    found = plans(model, layout, 0.4)
    emulator = build_emulator(model, layout, compressed(model, layout, 0.4))
    twin = masked_twin(model, found)
    assert_close(emulator(ids()).logits, twin(ids()).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(emulator(ids()).logits, model(ids()).logits, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_physically_absent(family: str) -> None:
    model, layout = case(family)
    emulator = build_emulator(model, layout, compressed(model, layout, 0.4))
    for j in layout.middle:
        old, new = (sum(p.numel() for p in blocks(m)[j].parameters()) for m in (model, emulator))
        assert new < old
        held = {tuple(row) for p in blocks(emulator)[j].parameters() for row in _rows(p)}
        mlp = [m for n, m in blocks(model)[j].named_modules() if n.endswith(("up_proj", "fc1"))]
        for module in mlp:
            gone = set(range(24)) - set(plans(model, layout, 0.4)[j].channels or ())
            assert gone
            assert not any(tuple(module.weight[c].tolist()) in held for c in gone)


def _rows(p: torch.Tensor) -> list[list[float]]:
    return p.detach().tolist() if p.dim() == 2 else []


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_are_gone_and_the_others_counted_anew(family: str) -> None:
    model, layout = case(family)
    emulator = build_emulator(model, layout, MIDDLES["dropped"](model, layout))
    by_hand = copy.deepcopy(model)
    every = next(m for m in by_hand.modules() if isinstance(m, nn.ModuleList) and len(m) == 5)
    del every[3], every[1]
    by_hand.config.num_hidden_layers = 3
    if getattr(by_hand.config, "layer_types", None):
        by_hand.config.layer_types = by_hand.config.layer_types[:3]
    assert emulator.config.num_hidden_layers == 3 == len(blocks(emulator))
    assert torch.equal(emulator(ids()).logits, by_hand(ids(), use_cache=False).logits)
    found = [m.layer_idx for m in emulator.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(found)) == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_layers_run_one_set_of_weights(family: str) -> None:
    model, layout = case(family)
    emulator = build_emulator(model, layout, MIDDLES["shared"](model, layout))
    by_hand = copy.deepcopy(model)
    for j in (1, 3):
        blocks(by_hand)[j].load_state_dict(blocks(by_hand)[2].state_dict())
    assert torch.equal(emulator(ids()).logits, by_hand(ids()).logits)
    first, second, third = (list(blocks(emulator)[j].parameters()) for j in (1, 2, 3))
    assert all(a is b is c for a, b, c in zip(first, second, third, strict=True))
    assert sum(p.numel() for p in emulator.parameters()) < sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(family: str, middle: str) -> None:
    model, layout = case(family)
    emulator = build_emulator(model, layout, MIDDLES[middle](model, layout))
    found = [
        emulator.generate(ids(), max_new_tokens=6, do_sample=False, use_cache=cached,
                          pad_token_id=0, eos_token_id=None)
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_building_leaves_the_original_alone(family: str) -> None:
    model, layout = case(family)
    before = fingerprint(model.state_dict())
    middle = MIDDLES["everything"](model, layout)
    emulator = build_emulator(model, layout, middle)
    with torch.no_grad():
        for p in emulator.parameters():
            p.fill_(7.0)
    assert fingerprint(model.state_dict()) == before
    assert model.config.num_hidden_layers == N_LAYERS
    for layer in middle.values():
        for piece in layer.pieces.values() if isinstance(layer, CompressedLayer) else ():
            pair = piece.weight if isinstance(piece, Narrow) else None
            assert pair is None or not bool((pair == 7.0).any())


def test_attention_that_differs_by_layer_follows_the_weights() -> None:
    model, layout = case("qwen2")
    config = copy.deepcopy(model.config)
    config.use_sliding_window, config.sliding_window = True, 3
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"] + [
        "sliding_attention"
    ] * 2
    mixed = type(model)(config).eval()
    mixed.load_state_dict(model.state_dict())
    middle = {1: CompressedLayer(1, {}), 2: Absent(), 3: SameAs(1)}
    emulator = build_emulator(mixed, layout, middle)
    assert emulator.config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    untouched = {j: CompressedLayer(j, {}) for j in layout.middle}
    whole = build_emulator(mixed, layout, untouched)
    assert torch.equal(whole(ids()).logits, mixed(ids()).logits)


def test_tied_embeddings_stay_tied() -> None:
    model, layout = case("gemma")
    emulator = build_emulator(model, layout, compressed(model, layout))
    assert emulator.get_output_embeddings().weight is emulator.get_input_embeddings().weight
    assert "lm_head.weight" not in own_tensors(emulator)


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        ({1: Absent(), 2: Absent()}, "exactly its layers"),
        ({j: Absent() for j in range(5)}, "exactly its layers"),
        ({1: CompressedLayer(2, {}), 2: Absent(), 3: Absent()}, "made of layer 2"),
        ({1: SameAs(0), 2: Absent(), 3: Absent()}, "no middle layer that is kept"),
        ({1: SameAs(2), 2: Absent(), 3: Absent()}, "no middle layer that is kept"),
        ({1: SameAs(3), 2: Absent(), 3: SameAs(1)}, "no middle layer that is kept"),
    ],
)
def test_a_middle_that_cannot_be_is_refused(middle: dict[int, object], why: str) -> None:
    with pytest.raises(SelectionError, match=why):
        Arrangement.of(Layout.of(5, [0, 4]), middle)


def test_an_arrangement_counts_in_both_numbers() -> None:
    plan = Arrangement.of(
        Layout.of(6, [0, 3, 5]), {1: Absent(), 2: CompressedLayer(2, {}), 4: SameAs(2)}
    )
    assert plan.positions == (0, 2, 3, 4, 5)
    assert plan.sources == (0, 2, 3, 2, 5)
    assert plan.adapters == (0, 2, 4)
    assert plan.shared == {3: 1}
    assert plan.places == {0: 0, 2: 1, 3: 2, 4: 3, 5: 4}


def test_layers_that_compute_by_their_number_are_not_renumbered() -> None:
    model, layout = case("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ConfigError, match="cannot be left out"):
        build_emulator(model, layout, MIDDLES["dropped"](model, layout))


def test_a_model_with_an_adapter_around_it_is_refused() -> None:
    model = tiny_trainable("llama", "lora")
    with pytest.raises(ConfigError, match="without an adapter around it"):
        build_emulator(model, Layout(2, (0,)), {1: CompressedLayer(1, {})})


def test_a_layout_of_another_depth_is_refused() -> None:
    model, _ = case()
    with pytest.raises(SelectionError, match="the model has 5"):
        build_emulator(model, Layout(3, (0,)), {1: Absent(), 2: Absent()})


@pytest.mark.parametrize("shape", [(3, 15, 16), (3, 16, 15)])
def test_factors_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    model, _ = case()
    rank, n_in, n_out = shape
    piece = LowRank(torch.zeros(rank, n_in), torch.zeros(n_out, rank), None)
    before = fingerprint(model.state_dict())
    with pytest.raises(SelectionError, match="does not fit there"):
        put_pieces(blocks(model)[1], {"self_attn.q_proj": piece})
    with pytest.raises(SelectionError, match=r"its linear modules are self_attn\.q_proj"):
        put_pieces(blocks(model)[1], {"self_attn.query": piece})
    assert fingerprint(model.state_dict()) == before


@pytest.mark.parametrize("bias", [None, torch.zeros(4)])
def test_a_narrowed_matrix_has_a_bias_where_the_whole_one_has(bias: torch.Tensor | None) -> None:
    model, _ = case("opt" if bias is None else "llama")
    name = "fc1" if bias is None else "mlp.up_proj"
    with pytest.raises(SelectionError, match="does not fit there"):
        put_pieces(blocks(model)[1], {name: Narrow(torch.zeros(4, 16), bias)})


def test_low_rank_modules_are_made_of_plain_linears() -> None:
    model, layout = case("gpt2")
    emulator = build_emulator(model, layout, compressed(model, layout))
    attention = blocks(emulator)[1].attn
    assert isinstance(attention.c_attn, FusedLowRank)
    assert isinstance(attention.c_proj, LowRankLinear)
    assert type(attention.c_attn.parts["0"].first) is nn.Linear
    assert len(blocks(emulator)) == N_LAYERS
