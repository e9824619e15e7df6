"""A bridge to lm-eval (extra: `eval`), for the tasks it defines.

Our own evaluation ranks a user's options in one fast pass; lm-eval brings hundreds of published
tasks, their prompts and their metrics. The model is handed over loaded, adapter and all.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from selectune.errors import ConfigError, DataError


def need_lm_eval() -> None:
    """Refuse what `run_lm_eval` would, before anything is trained.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    _import_lm_eval()


def run_lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 16,
    limit: int | None = None,
    n_shots: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval on a loaded model.

    Args:
        model: a causal LM, bare or wrapped by peft, on its device; dropout is off meanwhile.
        tokenizer: the model's.
        tasks: names that lm-eval knows, or paths of its YAML task files ending in `.yaml` or
            `.yml`. Files are read as plain YAML: a `!function` tag, which would run Python, is
            refused. Paths inside one are relative to the working directory, as in lm-eval.
        max_length: tokens of prompt and answer together.
        batch_size: sequences in one batch.
        limit: questions per task; None takes all.
        n_shots: worked examples before each question; None takes the task's own number.
        seed: of the choice of worked examples.

    Returns:
        task -> metric -> value, by lm-eval's own names ("acc", "acc_norm", "acc_norm_stderr").

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
        DataError: a task file cannot be read.
    """
    lm_eval, huggingface, manager = _import_lm_eval()
    files = {task: _read_task(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    # Indexing the thousands of tasks that lm-eval ships takes many seconds: only for a name.
    known = manager.TaskManager(include_defaults=len(files) < len(tasks))
    for task in tasks:
        if task not in files and task not in known.all_tasks:
            raise ConfigError(
                f'lm-eval knows no task "{task}"',
                where="evaluate.lm_eval",
                do="`lm-eval ls tasks` lists them; a task of your own is a path ending in .yaml",
            )
    wanted = [files.get(task, task) for task in tasks]
    noisy = [module for module in model.modules() if module.training]
    model.eval()
    try:
        results = lm_eval.simple_evaluate(
            model=huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
            ),
            tasks=wanted,
            num_fewshot=n_shots,
            limit=limit,
            task_manager=known,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        for module in noisy:
            module.training = True
    return {task: _metrics(values) for task, values in results["results"].items()}


def _import_lm_eval() -> tuple[Any, Any, Any]:
    try:
        names = ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
        package, huggingface, tasks = (importlib.import_module(name) for name in names)
    except ImportError as error:
        raise ConfigError(
            "lm-eval is not installed",
            where="evaluate.lm_eval",
            why=str(error),
            do="pip install lm-eval",
        ) from error
    return package, huggingface, tasks


def _read_task(task: str) -> dict[str, Any]:
    try:
        content: Any = yaml.safe_load(Path(task).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(
            "a task file of lm-eval cannot be read", where=task, why=" ".join(str(error).split())
        ) from error
    if not isinstance(content, dict) or "task" not in content:
        raise DataError(
            "this is no task file of lm-eval",
            where=task,
            why='it has no key "task"',
            do="see lm-eval's guide to new tasks",
        )
    return content  # pyright: ignore[reportUnknownVariableType]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    # lm-eval names a metric "acc_norm,none": the part after the comma is a filter of answers.
    found: dict[str, float] = {}
    for name, value in values.items():
        metric, _, chain = name.partition(",")
        if isinstance(value, int | float) and chain:
            found[metric if chain == "none" else name] = float(value)
    return found
