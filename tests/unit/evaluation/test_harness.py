"""The bridge to lm-eval: its numbers are ours where both measure the same."""

import importlib.util
import json
import random
import warnings
from pathlib import Path

import pytest
from evaluation_case import question, tiny_lm, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from selectune.errors import ConfigError, DataError
from selectune.evaluation import evaluate
from selectune.evaluation.harness import run_lm_eval

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="needs the extra `eval`")


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_without_the_extra_the_error_names_it() -> None:
    with pytest.raises(ConfigError, match=r"selectune\[eval\]"):
        run_lm_eval(tiny_lm("llama"), tiny_tokenizer(), ["piqa"], max_length=64)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # lm-eval 0.4.13 and what it imports warn at many places
def test_a_local_task_gives_the_accuracies_of_our_own_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    asked = [question(k, rng, n_options=3) for k in range(30)]
    rows = [
        {
            "prompt": example.content["prompt"],
            "choices": [option.removeprefix(" ") for option in example.options],
            "answer": example.answer,
        }
        for example in asked
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = tmp_path / "made.yaml"
    lines = [
        "task: made",
        "dataset_path: json",
        "dataset_kwargs:",
        "  data_files:",
        f"    test: {data}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{prompt}}"',
        'doc_to_choice: "{{choices}}"',
        'doc_to_target: "{{answer}}"',
        "metric_list:",
        "  - metric: acc",
        "  - metric: acc_norm",
    ]
    task.write_text("\n".join(lines), encoding="utf-8")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, tokenizer = get_peft_model(tiny_lm("llama"), config).train(), tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run_lm_eval(model, tokenizer, [str(task)], max_length=128, batch_size=7)
    assert model.training
    ours = evaluate(model, asked, tokenizer, max_length=128, pad_id=0)
    assert found["made"]["acc"] == pytest.approx(ours.accuracy_raw)
    assert found["made"]["acc_norm"] == pytest.approx(ours.accuracy)
    assert ours.accuracy != ours.accuracy_raw


@needs_lm_eval
@pytest.mark.slow  # lm-eval indexes the thousands of tasks that it ships
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="no-such-task"):
        run_lm_eval(tiny_lm("llama"), tiny_tokenizer(), ["no-such-task"], max_length=64)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content", ["task: t\ndoc_to_text: !function evil.run\n", "[1, 2]", "a: [", None]
)
def test_a_task_file_that_is_broken_or_runs_code_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "t.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"task file"):
        run_lm_eval(tiny_lm("llama"), tiny_tokenizer(), [str(path)], max_length=64)
