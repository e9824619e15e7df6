"""What a training method refuses before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from torch import nn

from selectune import GAST, GREATS
from selectune.errors import ConfigError, DataError, SelectionError
from selectune.training.trainer_arguments import refuse_arguments
from user_training import Run, bare, rows, tokenised

# transformers 5.24 renamed `gradient_checkpointing`, which 5.23 and trl 1.16 know alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Path], Run]]] = {
    "packing": (
        ConfigError,
        "packing=True",
        lambda path: Run(path, "trl", GAST(), packing=True, padding_free=False),
    ),
    "wrapped packing": (
        ConfigError,
        "packing=True",
        lambda path: Run(path, "trl", GAST(), packing=True, packing_strategy="wrapped"),
    ),
    "padding free": (
        ConfigError,
        "padding_free=True",
        lambda path: Run(path, "trl", GAST(), padding_free=True, max_length=None),
    ),
    "label smoothing": (
        ConfigError,
        "label_smoothing_factor=0.1",
        lambda path: Run(path, "transformers", GAST(), label_smoothing_factor=0.1),
    ),
    "own loss": (
        DataError,
        "without labels",
        lambda path: Run(
            path, "transformers", GAST(), given={"compute_loss_func": lambda *_, **__: None}
        ),
    ),
    "frozen": (
        SelectionError,
        "no layer of the model has a trainable parameter",
        lambda path: Run(path, "transformers", GAST(), model=bare().requires_grad_(False)),
    ),
    "head only": (
        SelectionError,
        "no layer of the model has a trainable parameter",
        lambda path: Run(path, "trl", GAST(), model=only_the_head()),
    ),
    "batch of one": (
        ConfigError,
        "nothing to choose from in a batch of one",
        lambda path: Run(path, "trl", GAST(), per_device_train_batch_size=1),
    ),
    "target text without answers": (
        DataError,
        '"completion" is empty',
        lambda path: Run(path, "trl", GAST(target=[{"prompt": "a", "completion": ""}])),
    ),
    "target tokens without answers": (
        DataError,
        "no target example has an answer",
        lambda path: Run(path, "transformers", GAST(target=without_answers())),
    ),
    "no target rows": (
        DataError,
        "no rows",
        lambda path: Run(path, "trl", GAST(target=[])),
    ),
    "text without tokenizer": (
        ConfigError,
        "need a tokenizer",
        lambda path: Run(path, "transformers", GAST(target=rows())),
    ),
    "endless target": (
        ConfigError,
        "drawn at random, by index",
        lambda path: Run(path, "trl", GAST(target=endless())),
    ),
    "endless pool": (
        ConfigError,
        "no training set with rows by index",
        lambda path: Run(path, "trl", GAST(), data=endless()),
    ),
    "no target at hand": (
        ConfigError,
        'target="target" is not at hand',
        lambda path: Run(path, "trl", GAST(target="target")),
    ),
    "two methods": (
        ConfigError,
        "two training methods on one model",
        lambda path: Run(path, "transformers", GAST(), more=[GREATS().callback()]),
    ),
}


def only_the_head() -> nn.Module:
    model = bare().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def without_answers() -> list[dict[str, list[int]]]:
    return [{**row, "labels": [-100] * len(row["labels"])} for row in tokenised(5)]


def endless() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows()))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    error, words, make = REFUSED[case]
    run = make(tmp_path)
    before = {n: p.clone() for n, p in run.weights.items()}
    with pytest.raises(error, match=words):
        run.train()
    assert run.trainer.state.global_step == 0
    assert all(torch.equal(run.weights[n], p) for n, p in before.items())


@pytest.mark.parametrize("key", ["deepspeed", "fsdp"])
def test_sharded_models_are_refused(tmp_path: Path, key: str) -> None:
    run = Run(tmp_path, "transformers", GAST())
    setattr(run.trainer.args, key, {"zero_optimization": {}})  # neither runs on a CPU
    with pytest.raises(ConfigError, match="plain DDP only"):
        run.train()


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, "transformers", GAST())
    run.trainer.args.torch_compile = True
    with pytest.raises(ConfigError, match="torch_compile=True"):
        refuse_arguments(run.trainer.args)


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, "transformers", GAST())
    run.trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="in one process on 2 devices"):
        refuse_arguments(run.trainer.args)


def test_an_endless_pool_is_fine_beside_a_target(tmp_path: Path) -> None:
    run = Run(tmp_path, "trl", GAST(target=rows(6, seed=5)), data=endless(), max_steps=2).train()
    assert [step for step, _ in run.records] == [1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, '"keep" of gast cannot be 0'),
        ({"keep": 1.5}, "less than or equal to 1"),
        ({"keep": "half"}, '"keep" of gast'),
        ({"score": "distance"}, "'dot' or 'cosine'"),
        ({"momentum": 1.0}, "less than 1"),
        ({"refresh_every": 0}, "greater than or equal to 1"),
        ({"target_batch": 2.5}, "integer"),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        GAST(**options)
    with pytest.raises(ConfigError, match=words.replace("gast", "greats")):
        GREATS(**options)


def test_targets_in_the_batch_are_refused_in_a_trainer() -> None:
    with pytest.raises(ConfigError, match="form=concat cannot be used in a trainer"):
        GAST(form="concat").callback()
