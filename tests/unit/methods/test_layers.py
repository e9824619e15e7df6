"""The layer samplers as users meet them: names, defaults, odds, trainers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from deep import deep_trainable
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import tiny_tokens
from torch import nn
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from selectune import registry
from selectune.errors import ConfigError
from selectune.methods.layers.ist import IST
from selectune.methods.layers.lisa import LISA
from selectune.methods.layers.ows import OWS, outlier_ratios
from selectune.methods.layers.rst import RST
from selectune.models import blocks
from selectune.training.layer_sampling import active_layers, count_of, ready
from selectune.training.method import Method, Scene
from selectune.training.sources import TokenSource
from workspace import byte_tokenizer

# transformers 5.24 renamed it to `activation_checkpointing`; 5.23 and trl 1.16 know the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

NAMES = {"ist": IST, "rst": RST, "lisa": LISA, "ows": OWS}
ITEMS = tiny_tokens(20, seed=4)
POOL = TokenSource(ITEMS, pad_id=0)
TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_is_registered_and_described(name: str) -> None:
    entry = registry.get("training_method", name)
    assert entry.parse({}) == NAMES[name]()
    for text in (entry.summary, entry.paper, entry.cost, entry.fails):
        assert len(text) > 20
    with pytest.raises(ConfigError, match="is no option"):
        entry.parse({"layer": 2})


def test_a_share_or_a_number_of_layers() -> None:
    assert [count_of(0.25, n) for n in (2, 3, 4, 7, 8, 32)] == [1, 1, 1, 1, 2, 8]
    assert count_of(0.29, 100) == 29
    assert count_of(1.0, 5) == count_of(5, 5) == 5
    assert RST(layers=1).layers == 1
    assert isinstance(RST(layers=1).layers, int)
    assert isinstance(RST(layers=1.0).layers, float)


def drawn(method: Method, n_steps: int, n_layers: int = 6, seed: int = 0) -> list[list[int]]:
    model = deep_trainable("lora", n_layers)
    session = method.start(Scene(model, None, seed, pool=POOL))
    found = []
    for step in range(n_steps):
        session.begin_step(step)
        assert session.end_step()["active"] == active_layers(model)
        found.append(active_layers(model))
    return found


def test_lisa_keeps_a_draw_for_an_interval() -> None:
    found = drawn(LISA(interval=4), 40)
    assert all(len(active) == 2 for active in found)
    assert all(found[k] == found[k - k % 4] for k in range(40))
    assert len({tuple(active) for active in found}) > 3


@pytest.mark.parametrize("kind", ["lora", "full", "series"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outliers_are_counted_layer_by_layer(kind: str, family: str) -> None:
    model = deep_trainable(kind, 3, family)
    with torch.no_grad():
        for k, block in enumerate(blocks(model)):
            for name, p in block.named_parameters():
                if p.ndim == 2 and "lora" not in name and "bottleneck" not in name:
                    p.flatten()[:: 37 - 9 * k] *= 20  # outliers, and not equally many
    scene, layers = ready(Scene(model, None, 5))
    n = 11
    found = outlier_ratios(scene, layers, POOL, n, 5.0)
    # The twin: one example at a time, every weight by itself.
    order = np.random.default_rng([5, 0, 5]).permutation(20)[:n]
    squares: dict[nn.Module, torch.Tensor] = {}
    linears = [base_linears(block) for block in blocks(model)]
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: squares.__setitem__(
                module, squares.get(module, 0) + args[0][0].square().sum(0)
            )
        )
        for some in linears
        for module in some
    ]
    for k in order:
        with torch.no_grad():
            model(input_ids=torch.as_tensor(ITEMS[k].input_ids)[None])
    for handle in handles:
        handle.remove()
    for some, ratio in zip(linears, found, strict=True):
        sizes = []
        for module in some:
            weight = module.weight.detach()
            weight = weight if isinstance(module, nn.Linear) else weight.T
            sizes.append((weight.abs() * squares[module].sqrt()).flatten())
        every = torch.cat(sizes)
        assert ratio == pytest.approx(float((every > 5 * every.mean()).float().mean()), abs=2e-4)
        assert ratio > 0
    assert len(set(found)) == 3


def base_linears(block: nn.Module) -> list[nn.Module]:
    wrapped = [m for m in block.modules() if isinstance(m, BaseTunerLayer)]
    inside = {id(x) for m in wrapped for x in m.modules() if x is not m.get_base_layer()}
    return [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in inside]


def test_layers_with_outliers_train_more_often() -> None:
    model = deep_trainable("lora", 3)
    session = OWS(layers=1, interval=1).start(Scene(model, None, 0, pool=POOL))
    session.begin_step(0)
    assert len(session.end_step()["outlier_ratio"]) == 3
    session.guide.ratios = np.asarray([0.6, 0.3, 0.1])
    counts: Counter[int] = Counter()
    for step in range(1, 3001):
        session.begin_step(step)
        assert "outlier_ratio" not in session.end_step()
        counts.update(active_layers(model))
    np.testing.assert_allclose([counts[k] / 3000 for k in range(3)], [0.6, 0.3, 0.1], atol=0.03)


def rows(n: int) -> list[dict[str, list[int]]]:
    found = []
    for item in tiny_tokens(n, seed=8):
        labels = np.where(item.is_target, item.input_ids, -100).tolist()
        found.append({"input_ids": item.input_ids.tolist(), "labels": labels})
    return found


def texts(n: int) -> Dataset:
    rng = np.random.default_rng(0)
    words = ["0", "1", "2", "3", "4"]
    return Dataset.from_list(
        [
            {"prompt": " ".join(rng.choice(words, 3)), "completion": " ".join(rng.choice(words, 2))}
            for _ in range(n)
        ]
    )


def trainer(
    kind: str, folder: Path, method: Method | None, model: nn.Module, **arguments: object
) -> Trainer:
    usual = {
        "output_dir": str(folder), "per_device_train_batch_size": 3, "max_steps": 6, "seed": 3,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "report_to": "none", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    callbacks = [] if method is None else [method.callback()]
    if kind == "transformers":
        return Trainer(
            model, TrainingArguments(**usual), train_dataset=rows(18), eval_dataset=rows(4),
            data_collator=DataCollatorForSeq2Seq(TOKENIZER), callbacks=callbacks,
        )  # fmt: skip
    return SFTTrainer(
        model, SFTConfig(gradient_checkpointing=False, **usual), train_dataset=texts(18),
        eval_dataset=texts(4), processing_class=TOKENIZER, callbacks=callbacks,
    )  # fmt: skip


def model_for(kind: str, dropout: float = 0.2) -> nn.Module:
    """Return a model for tiny tokens, or one that knows every byte."""
    model = deep_trainable("lora", 4, dropout=dropout)
    if kind == "trl":
        with torch.random.fork_rng():
            model.resize_token_embeddings(258, mean_resizing=False)
    model.lm_head.weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def after(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def facts_of(trained: Trainer) -> list[tuple[int, dict[str, Any]]]:
    return next(c for c in trained.callback_handler.callbacks if hasattr(c, "records")).records


SAMPLERS = [
    IST(interval=2, layers=2, probe_batch=4),
    IST(interval=2, layers=2, hold=3, merge=True),
    LISA(interval=3, layers=1, retire="drop"),
    OWS(layers=2, interval=3),
]


@pytest.mark.parametrize("kind", ["transformers", "trl"])
@pytest.mark.parametrize("method", SAMPLERS, ids=["ist", "ist merged", "lisa", "ows"])
def test_in_a_trainer_resuming_equals_not_stopping(
    tmp_path: Path, kind: str, method: Method
) -> None:
    unbroken = model_for(kind)
    first = trainer(kind, tmp_path, method, unbroken)
    first.train()
    again = model_for(kind)
    second = trainer(kind, tmp_path, method, again)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_close(after(again), after(unbroken), rtol=0, atol=0)
    assert facts_of(second) == facts_of(first)
    found = facts_of(first)
    assert [step for step, _ in found] == list(range(1, 7))
    assert found[0][1]["layers"] == [0, 1, 2, 3]
    if isinstance(method, IST):
        assert [step for step, facts in found if "probe" in facts] == [3, 5]  # counted from 1
        assert [step for step, facts in found if "importance" in facts] == [1, 3, 5]
        saved = json.loads((tmp_path / "checkpoint-6" / "selectune_method.json").read_text())
        assert len(saved["facts"]["history"]) == 2
    assert all(p.requires_grad == ("lora" in n) for n, p in unbroken.named_parameters())


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_in_a_trainer_all_layers_active_is_plain_training(tmp_path: Path, kind: str) -> None:
    plain, sampled = model_for(kind), model_for(kind)
    trainer(kind, tmp_path / "plain", None, plain).train()
    trainer(kind, tmp_path / "all", IST(layers=1.0, interval=1), sampled).train()
    assert_close(after(sampled), after(plain), rtol=0, atol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_evaluation_in_mid_training_sees_the_adapters(tmp_path: Path, merge: bool) -> None:
    method = IST(layers=1, hold=6, interval=2, merge=merge)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    model = model_for("transformers", dropout=0.0)
    run = trainer("transformers", tmp_path, method, model, **options)
    run.train()
    told = {r["step"]: r["eval_loss"] for r in run.state.log_history if "eval_loss" in r}
    # What lies in the checkpoint of a step has the loss that was measured at that step.
    for step in (2, 4):
        fresh = model_for("transformers", dropout=0.0)
        fresh.load_adapter(str(tmp_path / f"checkpoint-{step}"), "default")
        other = trainer("transformers", tmp_path / "other", None, fresh)
        assert other.evaluate()["eval_loss"] == told[step]
