"""Which weights may be chosen from."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, tiny_model, tiny_trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from selectune.errors import CoverageError, SelectionError
from selectune.weights.base import base_weights
from selectune.weights.eligible import eligible_weights, fits


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_means_matrices_of_linear_maps_inside_them(family: str) -> None:
    model = tiny_model(family)
    found = eligible_weights(model, "layers")
    modules = dict(model.named_modules())
    expected = [
        name
        for name, p in model.named_parameters()
        if name.endswith(".weight")
        and p.ndim == 2
        and any(f".{k}." in name for k in range(2))
        and isinstance(modules[name.removesuffix(".weight")], nn.Linear | Conv1D)
    ]
    assert list(found) == expected
    assert {w.layer for w in found.values()} == {0, 1}
    assert all(w.is_linear for w in found.values())
    assert {w.is_input_first for w in found.values()} == {family == "gpt2"}
    assert all(w.parameter is dict(model.named_parameters())[name] for name, w in found.items())


def test_all_means_every_weight_once() -> None:
    model = tiny_model("gpt2")  # its head is its embedding
    found = eligible_weights(model, "all")
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in found
    assert found["transformer.wte.weight"].layer is None
    assert not found["transformer.h.0.ln_1.weight"].is_linear


@pytest.mark.parametrize("kind", ["lora", "dora", "series", "parallel", "prefix"])
@pytest.mark.parametrize("rule", ["layers", "all"])
def test_names_under_an_adapter_are_those_of_the_base(kind: str, rule: str) -> None:
    bare, adapted = tiny_model("llama"), tiny_trainable("llama", kind)
    assert list(eligible_weights(adapted, rule)) == list(eligible_weights(bare, rule))


def test_a_copy_that_trains_beside_a_module_is_not_the_base() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    bare = tiny_model("llama")
    names = [name for name, _ in bare.named_parameters()]
    assert list(base_weights(get_peft_model(bare, config))) == names


@pytest.mark.parametrize(
    ("pattern", "name", "is_fit"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("q_proj.weight", "model.layers.0.self_attn.q_proj.weight", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.*", "model.layers.0.self_attn.q_proj.weight", True),
        ("*_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers.[01].*.q_proj", "model.layers.1.self_attn.q_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight", True),
        ("q_proj", "model.layers.0.self_attn.q_proj.bias", False),
        ("proj", "model.layers.0.self_attn.q_proj.weight", False),
        ("self_attn", "model.layers.0.self_attn.q_proj.weight", False),
        ("model.layers.1.*", "model.layers.10.mlp.up_proj.weight", False),
        ("experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
    ],
)
def test_a_pattern_fits_a_name_or_what_follows_a_dot(pattern: str, name: str, is_fit: bool) -> None:
    assert fits(pattern, name) == is_fit


def test_patterns_add_up_in_the_order_of_the_model() -> None:
    found = eligible_weights(tiny_model("llama"), ["layers.1.*.down_proj", "q_proj", "*.q_proj"])
    assert list(found) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest() -> None:
    model = tiny_model("llama")
    with pytest.raises(SelectionError, match='"q_prj" fits none of the 21') as caught:
        eligible_weights(model, ["k_proj", "q_prj"])
    assert caught.value.where == "eligible[1]"
    assert caught.value.do == 'did you mean "q_proj"?'
    with pytest.raises(SelectionError) as caught:
        eligible_weights(model, ["model.layers.1.mlp.up_prj"])
    assert 'did you mean "model.layers.' in caught.value.do
    with pytest.raises(SelectionError) as caught:
        eligible_weights(model, ["zzz"])
    assert "q_proj" in caught.value.do
    assert "layers.0" not in caught.value.do


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(SelectionError, match="no weight of the model") as caught:
        eligible_weights(tiny_model("llama"), [])
    assert "no name or pattern" in caught.value.why
    with pytest.raises(SelectionError, match="no weight of the model") as caught:
        eligible_weights(nn.Sequential(nn.Linear(2, 2)), "layers")
    assert "Linear or Conv1D" in caught.value.why


def test_weights_outside_of_layers_can_be_named() -> None:
    found = eligible_weights(nn.Sequential(nn.Linear(2, 2)), ["0"])
    assert found["0.weight"].layer is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rule", ["layers", ["up_proj"]], ids=str)
def test_quantised_weights_are_refused_by_name(dtype: torch.dtype, rule: str | list[str]) -> None:
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(torch.zeros(24, 16).to(dtype), requires_grad=False)
    with pytest.raises(CoverageError, match=r"layers.1.mlp.up_proj.weight is stored as"):
        eligible_weights(model, rule)
    assert eligible_weights(model, ["q_proj"])
