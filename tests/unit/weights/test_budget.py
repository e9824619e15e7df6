"""Budgets in all forms, and the papers' numbers."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_trainable
from transformers import LlamaConfig, LlamaForCausalLM

from selectune.errors import ConfigError, SelectionError
from selectune.weights.budget import FORMS, Sizes, count_of, every_form, exact, sizes_of
from selectune.weights.eligible import eligible_weights

SIX = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
SMOL = Sizes(eligible=106_168_320, model=134_515_008, per_rank=305_280)


def empty(**shape: int | bool) -> LlamaForCausalLM:
    """Return a model that has shapes and no weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape))


def test_smollm2_and_llama3_measure_as_published() -> None:
    smol = empty(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    eligible = eligible_weights(smol, "layers")
    assert sizes_of(smol, eligible) == SMOL
    assert sizes_of(smol, eligible, SIX).per_rank == 270_720
    llama = empty(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    eligible = eligible_weights(llama, "layers")
    sizes = sizes_of(llama, eligible, SIX)
    assert (sizes.eligible, sizes.per_rank) == (6_979_321_856, 2_359_296)
    assert sizes_of(llama, eligible).per_rank == 2_621_440
    # The paper prints 0.24, 0.47, 0.93 and 1.85 % for ranks 8 to 64.
    printed = [
        every_form(count_of({"lora_rank": rank}, sizes), sizes)["percent_of_model"]
        for rank in (8, 16, 32, 64)
    ]
    assert printed == pytest.approx([0.24, 0.47, 0.93, 1.85], abs=0.006)


@given(st.integers(1, SMOL.eligible - 1))
def test_every_form_of_a_count_is_that_count(count: int) -> None:
    forms = every_form(count, SMOL)
    assert count_of({"count": forms["count"]}, SMOL) == count
    # Rounded down from a float, which may lie a hair below.
    assert count_of({"density": forms["density"] * (1 + 1e-12)}, SMOL) == count
    assert forms["lora_rank"] * SMOL.per_rank == pytest.approx(count)
    share = forms["percent_of_model"] / 100
    assert share * (SMOL.model + count) == pytest.approx(count)


def test_shares_are_the_decimals_that_were_written() -> None:
    sizes = Sizes(100, 200, 0)
    assert count_of({"density": 0.29}, sizes) == 29  # 0.29 * 100 is 28.999999999999996
    assert exact(0.1) == Fraction(1, 10)
    assert exact(1) == 1
    assert count_of({"density": 1.0}, sizes) == 100
    assert every_form(50, sizes)["lora_rank"] is None


@pytest.mark.parametrize("budget", [{}, {"density": 0.1, "count": 3}], ids=["none", "two"])
def test_there_is_exactly_one_budget(budget: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="budgets were given") as caught:
        count_of(budget, SMOL)
    assert all(form in caught.value.why for form in FORMS)


@pytest.mark.parametrize(
    "budget", [{"density": 1e-12}, {"count": SMOL.eligible + 1}, {"lora_rank": 400}], ids=str
)
def test_a_budget_is_at_least_one_weight_and_at_most_all(budget: dict[str, float]) -> None:
    with pytest.raises(SelectionError, match="asks for") as caught:
        count_of(budget, SMOL)
    assert "106,168,320 weights are eligible" in caught.value.why


def test_a_rank_needs_projections() -> None:
    model = tiny_model("llama")
    with pytest.raises(SelectionError, match='"embed" fits no linear map'):
        sizes_of(model, eligible_weights(model, "all"), ["embed"])
    norms = eligible_weights(model, ["*norm"])
    with pytest.raises(SelectionError, match="asks for 0 weights") as caught:
        count_of({"lora_rank": 8}, sizes_of(model, norms))
    assert "no linear map" in caught.value.why


def test_an_adapter_is_no_part_of_the_base() -> None:
    bare, adapted = tiny_model("llama"), tiny_trainable("llama", "lora")
    one, other = (sizes_of(m, eligible_weights(m, "layers")) for m in (bare, adapted))
    assert one == other
