"""The Python calls of the README, around loaded models and inside both trainers."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import selectune
from selectune.errors import ConfigError, SelectionError, SelectuneError
from workspace import make_workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("api"))


def adapted(folder: Path) -> Any:  # noqa: ANN401
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def rows(folder: Path, name: str) -> Dataset:
    return Dataset.from_json(str(folder / f"{name}.jsonl"), cache_dir=str(folder / "cache"))


def test_score_select_and_hand_over_a_dataset(folder: Path) -> None:
    pool = rows(folder, "pool")
    scores = selectune.score("gist", adapted(folder), pool, rows(folder, "target"), rank=3)
    assert len(scores) == len(pool)
    assert scores.about["rank"] == 3
    picks = selectune.select(scores, budget=0.1)
    chosen = picks.examples(pool)
    assert isinstance(chosen, Dataset)
    assert chosen.column_names == pool.column_names
    assert len(chosen) == len(picks) == 6
    assert [r["prompt"] for r in picks.examples(pool.to_list())] == chosen["prompt"][:]


def test_a_path_is_as_good_as_a_loaded_model(folder: Path) -> None:
    model, pool, target = (str(folder / n) for n in ("model", "pool.jsonl", "target.jsonl"))
    scores = selectune.score("grad_cosine", model, pool, target, precision="float32")
    again = selectune.score("grad_cosine", model, pool, target, precision="float32")
    assert scores.score.tolist() == again.score.tolist()


@pytest.mark.parametrize("method", ["random", "length", "perplexity"])
def test_scorers_without_targets_need_none(folder: Path, method: str) -> None:
    scores = selectune.score(method, adapted(folder), rows(folder, "pool"))
    assert len(selectune.select(scores, 5)) == 5


def test_what_is_missing_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="gist needs target examples"):
        selectune.score("gist", adapted(folder), rows(folder, "pool"))
    scores = selectune.score("random", adapted(folder), rows(folder, "pool"))
    with pytest.raises(SelectionError, match="lengths"):
        selectune.select(scores, "100 tokens")
    with pytest.raises(AttributeError, match="no attribute"):
        _ = selectune.nothing


def test_scoring_leaves_the_model_as_it_was(folder: Path) -> None:
    model = adapted(folder).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    selectune.score("gist", model, rows(folder, "pool"), rows(folder, "target"))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all((before[n] == p).all() for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_selection_trains_in_transformers_trainer(folder: Path, tmp_path: Path) -> None:
    model, pool = adapted(folder), rows(folder, "pool")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    scores = selectune.score("gist", model, pool, rows(folder, "target"), tokenizer=tokenizer)
    chosen = selectune.select(scores, 8).examples(pool)
    texts = [r["prompt"] + r["completion"] for r in chosen]
    data = [tokenizer(text) for text in texts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    assert trainer.train().global_step == 2


# trl 1.16 hands transformers 5.24 an argument under the name that it renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_the_selection_trains_in_trl(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, pool = adapted(folder), rows(folder, "pool")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    scores = selectune.score("gist", model, pool, rows(folder, "target"), tokenizer=tokenizer)
    chosen = selectune.select(scores, 8).examples(pool).select_columns(["prompt", "completion"])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, arguments, train_dataset=chosen, processing_class=tokenizer)
    assert trainer.train().global_step == 2


def test_less_reads_a_trainers_own_folder_and_puts_the_model_back(
    folder: Path, tmp_path: Path
) -> None:
    model, pool, target = adapted(folder), rows(folder, "pool").select(range(9)), "target.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="epoch", logging_steps=1,
        learning_rate=1e-2,
    )  # fmt: skip
    data = [tokenizer(r["prompt"] + r["completion"]) for r in pool.select(range(4))]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def scored(**options: Any) -> selectune.Scores:  # noqa: ANN401
        return selectune.score("less", model, pool, folder / target, tokenizer=tokenizer, **options)

    scores = scored(checkpoints=tmp_path)
    assert len(scores.about["learning_rates"]) == 2
    assert all((before[n] == p).all() for n, p in model.named_parameters())
    # The model stands at its last checkpoint, so that one by itself is the model as it is.
    last = max(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    plain, own = scored(adam="none"), scored(adam="none", checkpoints=last)
    assert own.score == pytest.approx(plain.score, rel=1e-5)
    assert own.score != pytest.approx(scores.score, rel=1e-2)
    with pytest.raises(ConfigError, match="moments of Adam are needed"):
        scored()
    with pytest.raises(ConfigError, match="3 checkpoints are asked for, 2 are there"):
        scored(checkpoints=tmp_path, epochs=3)
    with pytest.raises(ConfigError, match="checkpoints would not be used"):
        selectune.score("gist", model, pool, folder / target, checkpoints=tmp_path)


@pytest.mark.parametrize("method", ["rds", "embedding"])
def test_states_need_targets_and_no_adapter(folder: Path, method: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with pytest.raises(ConfigError, match=f"{method} needs target examples"):
        selectune.score(method, model, rows(folder, "pool"))
    scores = selectune.score(method, model, rows(folder, "pool"), rows(folder, "target"))
    assert len(selectune.select(scores, 5, rule="round_robin")) == 5


@pytest.mark.parametrize("method", ["gist", "perplexity"])
def test_each_module_keeps_its_mode_even_when_scoring_fails(folder: Path, method: str) -> None:
    model = adapted(folder).train()
    frozen = model.get_input_embeddings().eval()
    pool, target = rows(folder, "pool"), rows(folder, "target")
    selectune.score(method, model, pool, target)
    assert model.training
    assert not frozen.training
    frozen.weight.data.fill_(float("nan"))
    with pytest.raises(SelectuneError):
        selectune.score(method, model, pool, target)
    assert model.training
    assert not frozen.training


def test_examples_lost_to_the_cut_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = [*rows(folder, "pool").to_list(), {"prompt": "x" * 200, "completion": " y"}]
    scores = selectune.score("length", adapted(folder), pool, max_length=128)
    assert len(scores) == len(pool) - 1
    assert "1 kept no target token" in caplog.text
