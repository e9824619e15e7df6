"""Layer samplers in transformers.Trainer and trl.SFTTrainer, by themselves and below GAST."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import TrainerCallback

from selectune import GAST, IST, LISA, OWS, RST
from selectune.errors import ConfigError, IncompatibleRunError
from selectune.training.method import Method
from user_training import (
    N_LAYERS,
    TRAINERS,
    Run,
    assert_same_bits,
    bare,
    count_hooks,
    lora,
    rows,
    tokenised,
)

# transformers 5.24 renamed `gradient_checkpointing`, which 5.23 and trl 1.16 know alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

PROBE: dict[str, Any] = {"layers": 1, "interval": 2, "probe_batch": 4}
ONE: dict[str, Method] = {
    "ist": IST(**PROBE),
    "merged": IST(**PROBE, hold=2, merge=True),
    "rst": RST(layers=1),
    "lisa": LISA(layers=1, interval=2),
    "dropping": LISA(layers=1, interval=2, retire="drop"),
    "offloading": LISA(layers=1, interval=2, retire="offload"),
    "ows": OWS(layers=1, interval=2, examples=8),
    "gast over ist": GAST(sampler="ist", sampler_options=PROBE),
    "kept gast over rst": GAST(sampler=RST(layers=1), refresh_every=3, momentum=0.5),
}
ALL: dict[str, Method] = {
    "ist": IST(layers=1.0, interval=2, probe_batch=4),
    "rst": RST(layers=1.0),
    "lisa": LISA(layers=N_LAYERS, interval=2, retire="drop"),
    "ows": OWS(layers=1.0, interval=2, examples=8),
}


class Watch(TrainerCallback):
    """Compares what stands still, weights and optimizer state, before and after every step."""

    def __init__(self) -> None:
        self.active: list[set[str]] = []
        self.still: dict[str, list[Tensor]] = {}

    def look(self, model: nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, list[Tensor]]:
        found = {}
        for name, p in model.named_parameters():
            state = optimizer.optimizer.state.get(p, {})
            values = [p, *(state[key] for key in sorted(state))]
            found[name] = [v.detach().clone() for v in values]
        return found

    def on_step_begin(
        self,
        *args: object,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        **kwargs: object,
    ) -> None:
        self.still = self.look(model, optimizer)

    def on_step_end(
        self,
        *args: object,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        **kwargs: object,
    ) -> None:
        now = self.look(model, optimizer)
        moved = set()
        for name, before in self.still.items():
            is_same = len(before) == len(now[name]) and all(map(torch.equal, before, now[name]))
            if not is_same:
                moved.add(name)
        self.active.append({name.split(".layers.")[1][0] for name in moved})


@pytest.mark.parametrize("name", ONE)
def test_what_is_off_stands_still_to_the_bit(tmp_path: Path, name: str) -> None:
    watch = Watch()
    options = {"gradient_checkpointing": False, "weight_decay": 0.1, "max_steps": 6}
    # The method acts before the one who watches it.
    run = Run(tmp_path, "transformers", ONE[name], **options)
    run.trainer.add_callback(watch)
    before = {n: p.clone() for n, p in run.weights.items()}
    run.train()
    assert watch.active == [{str(i) for i in facts["active"]} for _, facts in run.records]
    assert {len(active) for active in watch.active} == {1}
    assert len(set(map(frozenset, watch.active))) == N_LAYERS
    assert set(run.weights) == set(before)
    assert all((run.weights[n] != p).any() for n, p in before.items())
    assert count_hooks(run.model) == run.hooks
    if "ist" in name or name == "merged":
        assert "probe" in run.records[2][1]
    if "gast" in name:
        for _, facts in run.records:
            assert list(facts["picks"]) == [str(i) for i in facts["active"]]


@pytest.mark.parametrize("name", ONE)
def test_resuming_equals_not_stopping(tmp_path: Path, name: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    kind = "trl" if name in ("ist", "gast over ist") else "transformers"
    unbroken = Run(tmp_path, kind, ONE[name], **options).train()
    for step in (1, 3) if "ist" in name else (3,):
        again = Run(tmp_path, kind, ONE[name], **options).train(tmp_path / f"checkpoint-{step}")
        assert_same_bits(again, unbroken)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("transformers", name) for name in ALL), ("trl", "ist")]
)
def test_all_layers_on_equals_training_without_a_method(
    tmp_path: Path, kind: str, name: str
) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    plain = Run(tmp_path / "plain", kind, **options).train()
    method = ALL[name]
    sampled = Run(tmp_path / "sampled", kind, method, **options).train()
    assert sampled.losses == plain.losses
    assert_close(sampled.weights, plain.weights, rtol=0, atol=0)
    if name == "ist":  # and nothing between GAST and plain training either
        both = GAST(pick="all", keep=1.0, sampler=method)
        picked = Run(tmp_path / "both", kind, both, **options).train()
        assert_close(picked.weights, plain.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name"), [("transformers", "ist"), ("transformers", "lisa"), ("trl", "gast over ist")]
)
def test_evaluation_in_mid_training_changes_nothing(tmp_path: Path, kind: str, name: str) -> None:
    def run(folder: str, **more: object) -> Run:
        held_out = Dataset.from_list(rows(5, seed=9)) if kind == "trl" else tokenised(5, seed=9)
        given = {"eval_dataset": held_out}
        model = lora(0.0)  # any evaluation draws a random number, so dropout would tell it
        return Run(tmp_path / folder, kind, ONE[name], model=model, given=given, **more).train()

    often = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    assert_same_bits(run("looked", **often), run("quiet"))


@pytest.mark.parametrize("kind", TRAINERS)
def test_checkpointing_changes_no_draw(tmp_path: Path, kind: str) -> None:
    def run(folder: str, **more: object) -> Run:
        method = GAST(sampler=IST(**PROBE))
        return Run(tmp_path / folder, kind, method, model=lora(0.0), **more).train()

    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    stored = run("stored", gradient_checkpointing=False)
    for name, more in {"new": {}, "old": reentrant}.items():
        recomputed = run(name, gradient_checkpointing=True, **more)
        assert_close(recomputed.weights, stored.weights, rtol=0, atol=1e-6)
        assert [f["picks"] for _, f in recomputed.records] == [
            f["picks"] for _, f in stored.records
        ]


def test_whole_layers_may_train_by_turns(tmp_path: Path) -> None:
    model = bare()
    model.get_input_embeddings().requires_grad_(False)
    run = Run(tmp_path, "transformers", LISA(layers=1, interval=1), model=model)
    before = {n: p.clone() for n, p in run.weights.items()}
    run.train()
    active = {i for _, facts in run.records for i in facts["active"]}
    for name, p in run.weights.items():
        is_drawn = ".layers." not in name or int(name.split(".layers.")[1][0]) in active
        assert torch.equal(p, before[name]) != is_drawn, name


def test_a_model_left_half_frozen_by_a_broken_training_trains_in_the_next(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    broken = Run(tmp_path / "broken", "transformers", RST(layers=1), more=[Stop()])
    start = {n: p.clone() for n, p in broken.weights.items()}
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert len(broken.weights) == len(start) / N_LAYERS
    again = Run(tmp_path / "again", "transformers", RST(layers=1), model=broken.model).train()
    assert set(again.weights) == set(start)
    assert {i for _, facts in again.records for i in facts["active"]} == set(range(N_LAYERS))


def test_another_sampler_or_seed_does_not_resume(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    start = tmp_path / "checkpoint-1"
    Run(tmp_path, "transformers", GAST(sampler=RST(layers=1)), **options).train()
    with pytest.raises(IncompatibleRunError, match="other options"):
        Run(tmp_path, "transformers", GAST(sampler=RST(layers=2)), **options).train(start)
    with pytest.raises(IncompatibleRunError, match="other options"):
        Run(tmp_path, "transformers", GAST(), **options).train(start)
    method = GAST(sampler=RST(layers=1))
    with pytest.raises(IncompatibleRunError, match="seed"):
        Run(tmp_path, "transformers", method, **{**options, "seed": 4}).train(start)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (RST(layers=3), "3 layers cannot be drawn of 2"),
        (GAST(sampler=LISA(layers=5)), "5 layers cannot be drawn of 2"),
        (GAST(sampler="gast"), "chooses examples, not layers"),
        (GAST(sampler="isst"), 'did you mean "ist"'),
        (GAST(sampler="ist", sampler_options={"layer": 1}), 'did you mean "layers"'),
        (IST(probe_from="target"), 'probe_from="target" is not at hand'),
    ],
)
def test_refused_before_the_first_step(tmp_path: Path, method: Method, words: str) -> None:
    run = Run(tmp_path, "transformers", method)
    with pytest.raises(ConfigError, match=words):
        run.train()
    assert count_hooks(run.model) == run.hooks


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (IST, {"layers": 0}, '"layers" of ist cannot be 0'),
        (RST, {"layers": 1.5}, '"layers" of rst cannot be 1.5'),
        (LISA, {"retire": "burn"}, "'keep', 'drop' or 'offload'"),
        (OWS, {"examples": 0}, '"examples" of ows'),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(
    kind: type[Method], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**options)
