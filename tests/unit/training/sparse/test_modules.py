"""Modules with chosen entries: read, moved, copied, loaded, refused and given back."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slow_gast import batch_loss
from slow_sparse import bits, dense_gradients, is_matrix, mask_of
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM, PreTrainedModel

from selectune.errors import CoverageError, IncompatibleRunError, SelectionError, TrainingError
from selectune.training.sparse import SparseModel, restore, sparsify
from selectune.training.sparse.modules import SparseModule
from selectune.weights.base import base_fingerprint, base_weights
from selectune.weights.mask import WeightMask

BATCH = tiny_batch()


def trained(dtype: torch.dtype = torch.float32) -> SparseModel:
    model = tiny_model("llama").to(dtype)
    sparsify(model, mask_of(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        batch_loss(model, BATCH, "token").backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def test_the_model_is_still_what_it_was() -> None:
    model = tiny_model("llama")
    names = [n for n, _ in model.named_modules()]
    before = batch_loss(model, BATCH, "token").detach()
    assert sparsify(model, mask_of(model)) is model
    assert isinstance(model, SparseModel | LlamaForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert [n for n, _ in model.named_modules()] == names
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert torch.equal(batch_loss(model, BATCH, "token").detach(), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}_values" for n in model.sparse.mask.indices}
    assert base_fingerprint(model) == model.sparse.base
    assert "1,176 of" in repr(model.sparse)
    assert "0 moved" in repr(model.sparse)


def test_evaluation_is_bit_for_bit_that_of_the_weights_alone() -> None:
    model = trained()
    plain = tiny_model("llama")
    with torch.no_grad():
        for name, p in base_weights(model).items():
            base_weights(plain)[name].copy_(p)
        assert torch.equal(batch_loss(model, BATCH, "token"), batch_loss(plain, BATCH, "token"))
        ids = BATCH.input_ids[:1, :4]
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_weight_that_others_read_hangs_on_its_values() -> None:
    """Fused heads read `lm_head.weight` and never call the module."""
    model = tiny_model("llama")
    sparsify(model, mask_of(model))
    head = model.lm_head
    x = torch.randn(3, 16)
    (x @ head.weight.T).square().sum().backward()
    entries = model.sparse.entries["lm_head.weight"]
    plain = tiny_model("llama").lm_head.weight
    (x @ plain.T).square().sum().backward()
    assert_close(entries.values.grad, plain.grad.flatten()[entries.index])
    with torch.no_grad():
        assert head.weight is entries.weight
        entries.values.zero_()
        assert not head.weight.flatten()[entries.index].any()
    assert model.get_parameter("lm_head.weight") is entries.weight
    assert head.get_parameter("weight") is entries.weight


def test_an_expert_bank_in_three_axes_trains() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.experts[0]).sum() + (x @ self.experts[2]).square().sum()

    torch.manual_seed(0)
    bank, x = Bank(), torch.randn(2, 4)
    twin = copy.deepcopy(bank)
    twin(x).backward()
    index = torch.tensor([0, 21, 22, 59])
    sparsify(bank, WeightMask({"experts": index}, {"experts": (3, 4, 5)}))
    bank(x).backward()
    assert bank.sparse.route.n_dense == 1  # read twice, attached once
    assert_close(bank.experts_values.grad, twin.experts.grad.flatten()[index])


def test_moving_and_casting_keep_the_masters_exact() -> None:
    model = trained()
    values = [p.detach().clone() for p in model.sparse.parameters()]
    batch_loss(model, BATCH, "token").backward()
    model.to(torch.bfloat16).to("cpu")
    assert base_weights(model)["lm_head.weight"].dtype == torch.bfloat16
    for entries, before in zip(model.sparse.entries.values(), values, strict=True):
        assert entries.values.dtype == entries.values.grad.dtype == torch.float32
        assert torch.equal(entries.values.detach(), before)
        held = entries.weight.detach().flatten()[entries.index]
        assert torch.equal(held, before.bfloat16())
        assert entries.base.dtype == torch.bfloat16
    batch_loss(model, BATCH, "token").backward()


def test_a_copy_trains_by_itself() -> None:
    model = trained()
    before = bits(model)
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    assert other.sparse.entries["lm_head.weight"].values is other.lm_head.weight_values
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    batch_loss(other, BATCH, "token").backward()
    optimizer.step()
    for name, entries in other.sparse.entries.items():
        held = base_weights(other)[name].detach().flatten()[entries.index]
        assert torch.equal(held, entries.values.detach())
        assert not torch.equal(held, before[name].flatten()[entries.index])
    assert_close(bits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_everything_back(assign: bool) -> None:
    model = trained(torch.bfloat16)
    fresh = tiny_model("llama").bfloat16()
    sparsify(fresh, model.sparse.mask)
    result = fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_close(bits(fresh), bits(model), rtol=0, atol=0)
    assert_close(fresh.sparse.parameters(), model.sparse.parameters(), rtol=0, atol=0)
    batch_loss(fresh, BATCH, "token").backward()
    assert all(p.grad is not None for p in fresh.sparse.parameters())


def test_values_of_other_entries_are_refused() -> None:
    model = trained()
    fresh = tiny_model("llama")
    sparsify(fresh, mask_of(fresh, seed=1))
    before = bits(fresh)
    with pytest.raises(IncompatibleRunError, match="belong to another mask"):
        fresh.load_state_dict(model.state_dict(), strict=False)
    assert_close(bits(fresh), before, rtol=0, atol=0)
    delta = tiny_model("llama")
    sparsify(delta, model.sparse.mask, decay_to="base")
    with pytest.raises(IncompatibleRunError, match="belong to another decay_to"):
        delta.load_state_dict(model.state_dict())


def test_what_values_add_can_be_turned_down() -> None:
    model, base = trained(), bits(tiny_model("llama"))
    live = bits(model)
    tables = [m.sparse_strengths for m in model.modules() if isinstance(m, SparseModule)]
    for factor, expected in ((0.0, base), (1.0, live)):
        for table in tables:
            for key in table:
                table[key] = factor
        with torch.no_grad():
            batch_loss(model, BATCH, "token")
        assert_close(bits(model), expected, rtol=0, atol=0)


def test_values_that_stand_still_cost_nothing() -> None:
    model = tiny_model("llama")
    sparsify(model, mask_of(model, only=is_matrix), route="gather")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name and name.endswith("_values"))
    batch_loss(model, BATCH, "token").backward()
    assert model.sparse.route.n_dense == 7
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}


def test_lora_beside_sparse_entries() -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(tiny_model("llama"), config)

    model, plain = adapted(), adapted()
    bare = tiny_model("llama")
    mask = mask_of(bare, only=is_matrix)
    assert base_fingerprint(model) == mask.base
    sparsify(model, mask)
    for name, p in plain.named_parameters():
        p.requires_grad_("lora" in name or is_matrix(name.replace(".base_layer", "")))
    for each in (model, plain):
        batch_loss(each, BATCH, "token").backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if "lora" in n}
    found = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
    assert len(found) == 8
    assert_close(found, grads, rtol=1e-5, atol=1e-7)
    for name, entries in model.sparse.entries.items():
        dense = base_weights(plain)[name].grad.flatten()[entries.index]
        assert_close(entries.values.grad, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to_base", [False, True])
def test_a_model_is_given_back(to_base: bool) -> None:
    base = tiny_model("llama")
    base.lm_head.requires_grad_(False)
    before, flags = bits(base), {n: p.requires_grad for n, p in base.named_parameters()}
    model = copy.deepcopy(base)
    sparsify(model, mask_of(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch_loss(model, BATCH, "token").backward()
    optimizer.step()
    live = bits(model)
    assert restore(model, to_base=to_base) is model
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert type(model) is LlamaForCausalLM
    assert type(model.lm_head) is nn.Linear
    assert not hasattr(model, "sparse")
    assert model.state_dict().keys() == before.keys()
    assert vars(model).keys() == vars(base).keys()
    assert_close(bits(model), before if to_base else live, rtol=0, atol=0)
    sparsify(model, mask_of(model, seed=1))
    with pytest.raises(SelectionError, match="no chosen entries"):
        restore(base)


def refused(model: nn.Module, mask: WeightMask, kind: type[Exception], match: str) -> None:
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(kind, match=match):
        sparsify(model, mask)
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()}.keys() == before.keys()
    assert [type(m) for m in model.modules()] == classes
    assert not hasattr(model, "sparse")
    assert all(p.requires_grad == flag for p, flag in before.values())


def test_masks_that_do_not_fit_are_refused() -> None:
    model, mask = tiny_model("llama"), mask_of(tiny_model("llama"))
    refused(tiny_model("gpt2"), mask, IncompatibleRunError, "has no weight lm_head|no weight model")
    refused(tiny_model("llama", seed=3), mask, IncompatibleRunError, "fingerprint")
    refused(model.bfloat16(), mask, IncompatibleRunError, "fingerprint")
    refused(model, WeightMask({}, {}), SelectionError, "no entry")
    name = "model.norm.weight"
    other = WeightMask({name: torch.tensor([0])}, {name: (17,)})
    refused(model, other, IncompatibleRunError, r"\(17,\)")
    sparsify(model, mask_of(model))
    with pytest.raises(SelectionError, match="chosen entries already"):
        sparsify(model, mask_of(tiny_model("llama")))


def one(shape: tuple[int, ...]) -> WeightMask:
    return WeightMask({"weight": torch.tensor([0])}, {"weight": shape})


def test_weights_that_cannot_be_trained_in_place_are_refused() -> None:
    linear = nn.Linear(4, 3)
    linear.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    refused(linear, one((3, 4)), CoverageError, "weight cannot be trained in place(.|\n)*int8")
    packed = nn.Linear(4, 3)
    packed.weight = nn.Parameter(torch.ones(6, 1, dtype=torch.uint8), requires_grad=False)
    refused(packed, one((3, 4)), CoverageError, "uint8")
    turned = nn.Linear(4, 3)
    turned.weight = nn.Parameter(torch.ones(4, 3).T)
    refused(turned, one((3, 4)), CoverageError, "one after another")
    refused(nn.Linear(4, 3, device="meta"), one((3, 4)), CoverageError, "meta")
    named = WeightMask({"0.weight": torch.tensor([0])}, {"0.weight": (4, 3)})
    refused(nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), named, CoverageError, "max_norm")
    with pytest.raises(CoverageError, match="of its own"):
        sparsify(nn.Embedding(4, 3), one((4, 3)))
    lstm = WeightMask({"weight_ih_l0": torch.tensor([0])}, {"weight_ih_l0": (12, 4)})
    refused(nn.LSTM(4, 3), lstm, CoverageError, "list of its own")


def test_a_weight_that_was_replaced_is_noticed() -> None:
    model = trained()
    model.lm_head.register_parameter("weight", nn.Parameter(torch.zeros(61, 16)))
    with pytest.raises(TrainingError, match="another tensor than when its entries were chosen"):
        batch_loss(model, BATCH, "token")


def test_gradients_are_those_of_the_live_weights() -> None:
    model = trained()
    plain = tiny_model("llama")
    with torch.no_grad():
        for name, p in base_weights(model).items():
            base_weights(plain)[name].copy_(p)
    batch_loss(model, BATCH, "token").backward()
    expected = dense_gradients(plain, [BATCH])
    for name, entries in model.sparse.entries.items():
        dense = expected[name].flatten()[entries.index]
        assert_close(entries.values.grad, dense, rtol=1e-5, atol=1e-6)
