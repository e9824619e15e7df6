"""Every kind is trained by both trainers, saved, loaded strictly, evaluated, planned and run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from selectune.adapters import add_adapter, load_adapter, load_tuned
from selectune.data import Batch, Tokens, collate, tokenize
from selectune.data.examples import Example
from selectune.errors import ConfigError, IncompatibleRunError, SelectionError
from selectune.evaluation import evaluate
from selectune.gradients.engine import example_loss
from selectune.models import Base, trainable_fingerprint
from selectune.pipeline.run import Run
from selectune.recipe import AdapterSection, TuneSection, load_recipe
from selectune.training import TuneResult, tune
from small_run import small_recipe

SECTIONS: dict[str, AdapterSection] = {
    "lora": AdapterSection(rank=2),
    "dora": AdapterSection(kind="dora", rank=2),
    "series": AdapterSection(kind="series", width=4),
    "parallel": AdapterSection(kind="parallel", width=4),
    "prefix": AdapterSection(kind="prefix", virtual_tokens=3),
    "full": AdapterSection(kind="full", layers=[-1]),
}


def items(n: int = 6) -> list[Tokens]:
    rng = torch.Generator().manual_seed(0)
    found: list[Tokens] = []
    for k in range(n):
        ids = torch.randint(2, 250, (5 + k,), generator=rng)
        found.append(Tokens(f"e{k}", ids.numpy(), (torch.arange(5 + k) >= 3).numpy()))
    return found


def tuned(base: Base, model: nn.Module, output: Path, trainer: str) -> TuneResult:
    options = TuneSection(trainer=trainer, epochs=2, batch_size=2, learning_rate=1e-2, save_every=2)
    return tune(
        model,
        items(),
        options,
        output=output,
        seed=0,
        pad_id=base.pad_id,
        precision="float32",
        device="cpu",
        fingerprint="f",
        name="a",
        log=lambda _: None,
    )


def loss(model: nn.Module) -> torch.Tensor:
    batch: Batch = collate(items(), pad_id=0)
    with torch.no_grad():
        return example_loss(model.eval(), batch)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("kind", SECTIONS)
def test_what_is_trained_is_loaded_to_the_bit(
    kind: str, trainer: str, base: Base, tmp_path: Path
) -> None:
    fresh = [copy.deepcopy(base) for _ in range(3)]
    model = add_adapter(base.model, SECTIONS[kind], seed=0)
    before = loss(model)
    result = tuned(base, model, tmp_path / "out", trainer)
    after = loss(model)
    assert after.mean() < before.mean()
    assert torch.equal(loss(load_tuned(fresh[0], result.path)), after)
    # Finished already: the same call gives the trained weights back.
    again = add_adapter(fresh[1].model, SECTIONS[kind], seed=0)
    tuned(fresh[1], again, tmp_path / "out", trainer)
    assert trainable_fingerprint(again) == trainable_fingerprint(model)
    # The adapter is gone: the same call goes on from the last checkpoint.
    for file in result.path.iterdir():
        file.unlink()
    result.path.rmdir()
    resumed = add_adapter(fresh[2].model, SECTIONS[kind], seed=0)
    tuned(fresh[2], resumed, tmp_path / "out", trainer)
    assert trainable_fingerprint(resumed) == trainable_fingerprint(model)


@pytest.mark.parametrize("kind", ["series", "parallel", "prefix"])
def test_evaluation_sees_the_adapter(kind: str, base: Base) -> None:
    content = {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " 2"}
    example = Example("q", content, "s", "", (" 2", " 3"), 0, "q.jsonl:1", {})
    model = add_adapter(copy.deepcopy(base.model), SECTIONS[kind], seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    arguments: dict[str, Any] = {"max_length": 64, "pad_id": base.pad_id}
    found = evaluate(model, [example], base.tokenizer, **arguments)
    plain = evaluate(base.model, [example], base.tokenizer, **arguments)
    assert found.answer_loss != plain.answer_loss
    (tokens,) = tokenize([example], base.tokenizer, max_length=64, append_eos=False)
    with torch.no_grad():
        expected = example_loss(model, collate([tokens], pad_id=base.pad_id))
    assert found.answer_loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["series", "parallel", "prefix"])
def test_an_adapter_of_a_deeper_model_is_refused(kind: str, base: Base, tmp_path: Path) -> None:
    shallow = copy.deepcopy(base)
    shallow.model.model.layers = shallow.model.model.layers[:1]
    shallow.model.config.num_hidden_layers = 1
    model: Any = add_adapter(base.model, SECTIONS[kind], seed=0)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises((IncompatibleRunError, ConfigError)):
        load_adapter(shallow, tmp_path / "adapter")


def test_quantised_weights_take_an_adapter_but_are_not_trained_themselves(base: Base) -> None:
    base.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match=r"quantised, and kind full") as caught:
        add_adapter(base.model, SECTIONS["full"], seed=0)
    assert "kind lora" in str(caught.value)
    assert not any(p.requires_grad for p in base.model.parameters())
    add_adapter(base.model, SECTIONS["lora"], seed=0)


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        ("lora", "width=3"),
        ("lora", "virtual_tokens=3"),
        ("series", "rank=3"),
        ("parallel", "alpha=3.0"),
        ("series", "virtual_tokens=3"),
        ("prefix", "dropout=0.5"),
        ("prefix", "modules=[q_proj]"),
        ("prefix", "activation=relu"),
        ("full", "width=3"),
        ("parallel", "layers=[0]"),
    ],
)
def test_a_key_that_a_kind_does_not_read_is_refused(kind: str, unused: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {base: m}\ndata: {pool: p, target: t}\n")
    with pytest.raises(ConfigError, match=f"adapter.kind is {kind}, which has no"):
        load_recipe(path, [f"adapter.kind={kind}", f"adapter.{unused}"])


@pytest.mark.parametrize(
    ("overrides", "n_trained"),
    [
        # Llama with two blocks, hidden 32, MLP 48.
        (["adapter.kind=series", "adapter.width=4"], 2 * 4 * (32 + 32)),
        (["adapter.kind=parallel", "adapter.width=4"], 2 * 4 * (32 + 48 + 48 + 32)),
        (["adapter.kind=prefix", "adapter.virtual_tokens=3"], 2 * 3 * 2 * 32),
    ],
)
def test_a_recipe_is_planned_and_run(overrides: list[str], n_trained: int, tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    text = path.read_text().replace("{rank: 2, alpha: 4.0, modules: [q_proj, v_proj]}", "{}")
    path.write_text(text)
    run = Run(load_recipe(path, [*overrides, "tune.epochs=1"]), out=tmp_path / "run")
    assert run.plan().to_json()["trainable"]["parameters"] == n_trained
    run.all()
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("modules", [["q_proj"], "all-linear"])
def test_lora_stays_in_the_layers_that_are_named(modules: list[str] | str) -> None:
    model = tiny_model("llama")
    section = AdapterSection(kind="lora", rank=2, modules=modules, layers=[-1])
    adapted = add_adapter(model, section, seed=0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (1 if modules == ["q_proj"] else 7)
    assert all(".layers.1." in name for name in trained)


def test_lora_in_layers_without_its_modules_is_refused() -> None:
    section = AdapterSection(kind="lora", modules=["lm_head"], layers=[0])
    with pytest.raises(SelectionError, match="none of the modules that are named"):
        add_adapter(tiny_model("llama"), section, seed=0)
    with pytest.raises(SelectionError, match="there is no layer 2"):
        add_adapter(tiny_model("llama"), AdapterSection(kind="lora", layers=[2]), seed=0)
