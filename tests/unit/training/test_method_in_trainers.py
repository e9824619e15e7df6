"""GAST and GREATS in transformers.Trainer and trl.SFTTrainer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from selectune import GAST, GREATS
from selectune.errors import ConfigError
from selectune.training.method import Method
from selectune.training.method_callback import MethodCallback
from user_training import (
    N_LAYERS,
    TOKENIZER,
    TRAINERS,
    Run,
    assert_same_bits,
    bare,
    count_hooks,
    lora,
    rows,
    tokenised,
)
from workspace import byte_tokenizer

# transformers 5.24 renamed `gradient_checkpointing`, which 5.23 and trl 1.16 know alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_picking_all_equals_training_without_a_method(
    tmp_path: Path, kind: str, passes: int, checkpointing: bool
) -> None:
    options = {"gradient_accumulation_steps": passes, "gradient_checkpointing": checkpointing}
    options["max_steps"] = 3
    plain = Run(tmp_path / "plain", kind, **options).train()
    method = GAST(pick="all", keep=1.0)
    picked = Run(tmp_path / "picked", kind, method, **options).train()
    assert_close(picked.losses, plain.losses, rtol=1e-6, atol=1e-6)
    assert_close(picked.weights, plain.weights, rtol=0, atol=1e-6)
    assert any((p != lora().state_dict()[n]).any() for n, p in plain.weights.items())


@pytest.mark.parametrize("kind", TRAINERS)
def test_reentrant_checkpointing_changes_nothing(tmp_path: Path, kind: str) -> None:
    def run(name: str, **options: object) -> Run:
        model = lora(dropout=0.0)
        return Run(tmp_path / name, kind, GAST(), model=model, max_steps=3, **options).train()

    reentrant = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    stored = run("stored", gradient_checkpointing=False)
    recomputed = run("recomputed", **reentrant)
    assert_close(recomputed.losses, stored.losses, rtol=1e-6, atol=1e-6)
    assert_close(recomputed.weights, stored.weights, rtol=0, atol=1e-6)
    assert [f["picks"] for _, f in recomputed.records] == [f["picks"] for _, f in stored.records]


def test_noise_on_embeddings_leaves_the_random_stream_alone(tmp_path: Path) -> None:
    options = {"neftune_noise_alpha": 5.0, "max_steps": 3, "gradient_checkpointing": False}
    plain = Run(tmp_path / "plain", "transformers", **options).train()
    picked = Run(tmp_path / "picked", "transformers", GAST(pick="all", keep=1.0), **options).train()
    assert_close(picked.losses, plain.losses, rtol=1e-6, atol=1e-6)
    assert_close(picked.weights, plain.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("method", [GAST(), GREATS()], ids=["gast", "greats"])
def test_every_step_has_its_facts_and_the_model_comes_back(
    tmp_path: Path, kind: str, method: Method
) -> None:
    run = Run(tmp_path, kind, method, gradient_checkpointing=False)
    before = {n: p.clone() for n, p in run.weights.items()}
    seen: list[str | None] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            assert isinstance(run.callback, MethodCallback)
            seen.append(run.callback.session._weighting)

    run.trainer.add_callback(Look())
    run.train()
    assert seen[-1] == "token"
    assert [step for step, _ in run.records] == list(range(1, 5))
    for _, facts in run.records:
        assert facts["active"] == list(range(N_LAYERS))
        assert all(len(picks) == 4 and picks.count("1") == 2 for picks in facts["picks"].values())
        for key in ("alignment_mean", "alignment_std", "max_z", "tokens"):
            assert len(facts[key]) == N_LAYERS
            assert all(np.isfinite(value) for value in facts[key])
        assert all(n > 0 for n in facts["tokens"])
    together = [len(set(facts["picks"].values())) for _, facts in run.records]
    assert (
        max(together) > 1
        if isinstance(method, GAST) and not isinstance(method, GREATS)
        else (set(together) == {1})
    )
    assert all((run.weights[n] != p).any() for n, p in before.items())
    assert run.callback.session is None
    assert count_hooks(run.model) == run.hooks
    assert all(p.requires_grad == (n in before) for n, p in run.model.named_parameters())
    data = run.trainer.train_dataset
    run.trainer.args.prediction_loss_only = True
    assert np.isfinite(run.trainer.predict(data).metrics["test_loss"])


@pytest.mark.parametrize("kind", TRAINERS)
def test_target_examples_may_come_in_any_form(tmp_path: Path, kind: str) -> None:
    def run(name: str, **options: object) -> Run:
        given = {} if kind == "trl" else {"processing_class": TOKENIZER}
        return Run(tmp_path / name, kind, GAST(**options), max_steps=2, given=given).train()

    pool = run("pool")
    forms = {"rows": Dataset.from_list(rows()), "tokens": tokenised()}
    if kind == "transformers":
        forms |= {"list": rows(), "named": {"colours": rows()}}
        forms |= {"Dataset of tokens": Dataset.from_list(tokenised())}
    for name, target in forms.items():
        # The very rows of the training set: the same draws, hence the same training.
        assert_same_bits(run(name, target=target), pool)
    other = run("other", target=rows(6, seed=5))
    assert [f["alignment_mean"] for _, f in other.records] != [
        f["alignment_mean"] for _, f in pool.records
    ]


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_in_mid_training_changes_nothing(tmp_path: Path, kind: str) -> None:
    def run(name: str, method: Method | None, **more: object) -> Run:
        held_out = Dataset.from_list(rows(5, seed=9)) if kind == "trl" else tokenised(5, seed=9)
        given = {"eval_dataset": held_out}
        # Any evaluation draws a random number for its order, so dropout would tell it.
        return Run(tmp_path / name, kind, method, model=lora(0.0), given=given, **more).train()

    often = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 2}
    quiet, looked = run("quiet", GAST(), max_steps=2), run("looked", GAST(), **often)
    assert_same_bits(quiet, looked)
    # Nothing is picked in an evaluation: with the same weights it gives the plain loss.
    plain, all_picked = (run(n, m, **often) for n, m in (("p", None), ("a", GAST(pick="all"))))

    def found(run: Run) -> list[float]:
        return [row["eval_loss"] for row in run.trainer.state.log_history if "eval_loss" in row]

    assert len(found(plain)) == 3
    assert found(looked)[0] == found(plain)[0]
    assert_close(found(all_picked), found(plain), rtol=1e-6, atol=1e-6)


def test_micro_batches_keep_the_ratio(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 3, "max_steps": 2}
    # 11 examples: micro-batches of 4, 4 and 3.
    run = Run(tmp_path, "transformers", GAST(), data=tokenised(11), **options).train()
    for _, facts in run.records:
        for picks in facts["picks"].values():
            assert [picks[k : k + 4].count("1") for k in (0, 4, 8)] == [2, 2, 2]
            assert len(picks) == 11


def test_a_step_of_half_precision_picks_much_the_same(tmp_path: Path) -> None:
    def picks(name: str, **options: object) -> str:
        run = Run(tmp_path / name, "transformers", GAST(), model=lora(0.0), **options).train()
        return "".join("".join(f["picks"].values()) for _, f in run.records)

    exact, half = picks("exact"), picks("half", bf16=True)
    assert len(exact) == len(half) == 4 * 4 * N_LAYERS
    assert sum(a == b for a, b in zip(exact, half, strict=True)) >= 0.9 * len(exact)


def test_all_weights_may_train(tmp_path: Path) -> None:
    options = {"max_steps": 4, "learning_rate": 1e-3}
    plain = Run(tmp_path / "plain", "transformers", model=bare(), **options).train()
    method = GAST(pick="all", keep=1.0)
    picked = Run(tmp_path / "picked", "transformers", method, model=bare(), **options).train()
    assert_close(picked.losses, plain.losses, rtol=1e-6, atol=1e-6)
    assert_close(picked.weights, plain.weights, rtol=0, atol=2e-6)


def test_trl_may_make_the_adapter(tmp_path: Path) -> None:
    given = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    run = Run(tmp_path, "trl", GAST(), model=bare(), given=given, max_steps=2).train()
    assert [step for step, _ in run.records] == [1, 2]


def test_examples_without_an_answer_ask_for_nothing(tmp_path: Path) -> None:
    data = tokenised()
    for k in (0, 1, 2, 3, 5, 8, 12):  # one whole micro-batch among them
        data[k]["labels"] = [-100] * len(data[k]["labels"])

    def run(name: str, method: Method | None) -> Run:
        options = {"data": data, "max_steps": 4, "gradient_accumulation_steps": 2}
        run = Run(tmp_path / name, "transformers", method, model=lora(0.0), **options)
        run.trainer._get_train_sampler = lambda *_: SequentialSampler(data)
        return run.train()

    plain, picked = run("plain", None), run("all", GAST(pick="all", keep=1.0))
    assert_close(picked.losses, plain.losses, rtol=1e-6, atol=1e-6)
    assert_close(picked.weights, plain.weights, rtol=0, atol=1e-6)
    for method in (GAST(), GREATS(), GAST(target=data[:8])):
        half = run("half", method)
        assert all(torch.isfinite(p).all() for p in half.weights.values())
        for step, facts in half.records:
            start = 8 * (step - 1) % 16
            for marks in facts["picks"].values():
                picked_rows = [start + k for k, mark in enumerate(marks) if mark == "1"]
                assert not {0, 1, 2, 3, 5, 8, 12} & set(picked_rows)


def test_left_padding_with_dropout_needs_the_weighting_said(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"

    def run(name: str, method: Method | None) -> Run:
        found = Run(tmp_path / name, "transformers", method, max_steps=3)
        found.trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
        return found.train()

    with pytest.raises(ConfigError, match='loss_weighting="token"'):
        run("auto", GAST())
    plain = run("plain", None)
    picked = run("said", GAST(pick="all", keep=1.0, loss_weighting="token"))
    assert_close(picked.weights, plain.weights, rtol=0, atol=1e-6)


def test_another_loss_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weighs its examples in an unknown way"):
        Run(tmp_path, "trl", GAST(), model=lora(0.0), loss_type="dft").train()


def test_what_a_broken_training_leaves_does_not_act_in_the_next(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    broken = Run(tmp_path / "broken", "transformers", GAST(), more=[Stop()], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert count_hooks(broken.model) != broken.hooks
    fresh = Run(tmp_path / "fresh", "transformers", GAST(), **options).train()
    again = Run(tmp_path / "again", "transformers", GAST(), model=broken.model, **options)
    again.train()
    assert count_hooks(broken.model) == broken.hooks
    assert_same_bits(again, fresh)
    assert_same_bits(again.train(), again)
