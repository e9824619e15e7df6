"""Series and parallel adapters compute the papers' formula, at the papers' places."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, tiny_trainable
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from selectune.adapters import BottleneckConfig, BottleneckLayer, add_adapter
from selectune.recipe import AdapterSection

IDS = torch.tensor([[5, 9, 14, 3, 8]])
PLACES = ("series", "parallel")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layers(model: nn.Module) -> dict[str, BottleneckLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BottleneckLayer)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt"])
@pytest.mark.parametrize("place", PLACES)
def test_a_fresh_adapter_changes_no_bit(place: str, family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    adapted = add_adapter(model, AdapterSection(kind=place, width=4), seed=0)
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("place", PLACES)
def test_the_output_is_the_formula_of_the_paper(place: str, family: str) -> None:
    model = tiny_trainable(family, place)
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, layer in layers(model).items():
        layer.base_layer.register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (args[0], y, y)})
        )
        layer.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (*seen[name][:2], out)})
        )
    logits(model)
    assert seen
    for name, (x, y, out) in seen.items():
        layer = layers(model)[name]
        down = layer.bottleneck_down["default"].weight
        up = layer.bottleneck_up["default"].weight
        source = y if place == "series" else x
        expected = y + torch.tanh(source @ down.T) @ up.T
        torch.testing.assert_close(out, expected)
        assert not torch.equal(out, y)


@pytest.mark.parametrize(
    ("family", "series", "parallel"),
    [
        ("llama", {"down_proj"}, {"up_proj", "down_proj"}),
        ("gemma", {"down_proj"}, {"up_proj", "down_proj"}),
        ("gpt2", {"mlp.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
        ("gptj", {"mlp.fc_out"}, {"mlp.fc_in", "mlp.fc_out"}),
        ("opt", {"fc2"}, {"fc1", "fc2"}),
    ],
)
def test_without_names_the_end_of_each_mlp_is_adapted(
    family: str, series: set[str], parallel: set[str]
) -> None:
    for place, names in (("series", series), ("parallel", parallel)):
        model = add_adapter(tiny_model(family), AdapterSection(kind=place, width=4), seed=0)
        found = layers(model)
        assert len(found) == 2 * len(names)
        assert all(any(path.endswith(name) for name in names) for path in found)


@pytest.mark.parametrize(("place", "percent"), [("series", "0.99"), ("parallel", "3.54")])
def test_the_default_has_the_parameters_of_the_papers_tables(place: str, percent: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # LLaMA-7B
        adapted = add_adapter(model, AdapterSection(kind=place), seed=0)
    sizes = [(p.numel(), p.requires_grad) for p in adapted.parameters()]
    share = sum(n for n, trains in sizes if trains) / sum(n for n, _ in sizes)
    assert f"{100 * share:.2f}" == percent


@pytest.mark.parametrize("place", PLACES)
def test_its_strength_can_be_turned_down_and_back(place: str) -> None:
    model = tiny_trainable("llama", place)
    full = logits(model)
    found = [layer.scaling for layer in layers(model).values()]
    assert found == [{"default": 1.0}] * len(layers(model))
    for scales in found:
        scales["default"] = 0.0
    with model.disable_adapter():
        bare = logits(model)
    assert torch.equal(logits(model), bare)
    assert not torch.equal(bare, full)
    for scales in found:
        scales["default"] = 1.0
    assert torch.equal(logits(model), full)


def test_a_bf16_base_keeps_its_type_and_the_adapter_is_fp32() -> None:
    section = AdapterSection(kind="series", width=4)
    adapted = add_adapter(tiny_model("llama").to(torch.bfloat16), section, seed=0)
    assert logits(adapted).dtype == torch.bfloat16
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_the_seed_alone_decides_the_first_values() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(7)
        model = add_adapter(tiny_model("llama"), AdapterSection(kind="series"), seed=seed)
        return next(iter(layers(model).values())).bottleneck_down["default"].weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("place", PLACES)
def test_dropout_acts_while_training_only(place: str) -> None:
    model = tiny_trainable("llama", place)
    for layer in layers(model).values():
        layer.bottleneck_dropout["default"] = nn.Dropout(0.5)
    assert torch.equal(logits(model.eval()), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


@pytest.mark.parametrize("place", PLACES)
def test_peft_saves_it_and_loads_it_whole(place: str, tmp_path: Path) -> None:
    section = AdapterSection(kind=place, width=4, activation="gelu")
    model: Any = add_adapter(tiny_model("llama"), section, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    config = loaded.peft_config["default"]
    assert isinstance(config, BottleneckConfig)
    assert (config.place, config.width, config.activation) == (place, 4, "gelu")


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tiny_trainable("llama", "series")
    twin = copy.deepcopy(model)
    before = logits(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(logits(model), before)


def test_a_place_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="places are series, parallel"):
        BottleneckConfig(place="before")
