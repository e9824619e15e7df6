"""Checkpoints of a stock Trainer: what fits is read by name, everything else is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock import Stock, stock_model, train_stock
from torch import nn

from selectune.adapters import checkpoints_fingerprint
from selectune.errors import ConfigError, CorruptFileError, IncompatibleRunError, SelectuneError
from selectune.training.trainer_folder import (
    checkpoint_folders,
    put_weights,
    read_moments,
    trainer_checkpoints,
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return train_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def copied(stock: Stock, tmp_path: Path) -> Path:
    """Return a checkpoint that a test may change."""
    shutil.copytree(stock.folder / "checkpoint-6", tmp_path / "checkpoint-6")
    return tmp_path / "checkpoint-6"


def test_the_optimizer_has_two_groups_and_numbers_for_names(stock: Stock) -> None:
    file = stock.folder / "checkpoint-3/optimizer.pt"
    state = torch.load(file, weights_only=True)  # noqa: TID251
    assert [len(group["params"]) for group in state["param_groups"]] == [8, 4]
    assert list(state["state"]) == list(range(12))


def test_moments_come_back_under_the_names_that_the_live_optimizer_had(stock: Stock) -> None:
    for checkpoint, seen in zip(trainer_checkpoints(stock.folder), stock.seen, strict=True):
        moments = read_moments(stock.model, checkpoint.path)
        assert moments.keys() == seen.m.keys()
        for name, found in moments.items():
            assert torch.equal(found.m, seen.m[name])
            assert torch.equal(found.v, seen.v[name])
            assert found.n_steps == seen.n_steps == checkpoint.step


def test_weights_come_back_too(stock: Stock) -> None:
    model = stock_model(seed=1)
    put_weights(model, stock.folder / "checkpoint-6")
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, stock.seen[1].weights[name])


def test_each_checkpoint_counts_by_the_rates_since_the_one_before(stock: Stock) -> None:
    state = json.loads((stock.folder / "checkpoint-9/trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "loss" in row]
    found = [c.learning_rate for c in trainer_checkpoints(stock.folder)]
    assert found == pytest.approx([sum(rates[k : k + 3]) / 3 for k in (0, 3, 6)])
    assert [c.step for c in trainer_checkpoints(stock.folder, 2)] == [3, 6]
    assert [c.step for c in trainer_checkpoints(stock.folder / "checkpoint-6")] == [6]


def test_checkpoints_are_ordered_by_number_not_by_letter(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [p.name for p in checkpoint_folders(tmp_path)] == [
        "checkpoint-9", "checkpoint-10", "checkpoint-100",
    ]  # fmt: skip


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(path / "optimizer.pt", weights_only=True)  # noqa: TID251
    change(state)
    torch.save(state, path / "optimizer.pt")


def swap_groups(state: dict[str, Any]) -> None:
    state["param_groups"].reverse()


def forget_one(state: dict[str, Any]) -> None:
    del state["state"][5]


def be_sgd(state: dict[str, Any]) -> None:
    for entry in state["state"].values():
        del entry["exp_avg"], entry["exp_avg_sq"]


def cut_one(state: dict[str, Any]) -> None:
    state["state"][2]["exp_avg"] = state["state"][2]["exp_avg"][:1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (swap_groups, IncompatibleRunError, "groups hold 4 and 8 parameters"),
        (forget_one, ConfigError, r"no moments of .*lora_B"),
        (be_sgd, ConfigError, r"here stands step"),
        (cut_one, IncompatibleRunError, "another shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    copied: Path,
    stock: Stock,
    change: Callable[[dict[str, Any]], None],
    error: type[SelectuneError],
    words: str,
) -> None:
    rewritten(copied, change)
    with pytest.raises(error, match=words):
        read_moments(stock.model, copied)


def test_absent_and_damaged_files_are_told_apart(copied: Path, stock: Stock) -> None:
    optimizer = copied / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-200])
    with pytest.raises(CorruptFileError, match="optimizer state cannot be read"):
        read_moments(stock.model, copied)
    optimizer.unlink()
    with pytest.raises(ConfigError, match=r"no optimizer\.pt in checkpoint-6"):
        read_moments(stock.model, copied)
    (copied / "trainer_state.json").write_text("{")
    with pytest.raises(CorruptFileError, match="Trainer's state"):
        trainer_checkpoints(copied)
    (copied / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint in"):
        trainer_checkpoints(copied)
    with pytest.raises(ConfigError, match=r"no trainer_state\.json"):
        trainer_checkpoints(copied.parent)


def test_a_pickle_that_would_run_code_is_not_run(copied: Path, stock: Stock) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (copied / "ran",)

    torch.save({"state": Evil(), "param_groups": []}, copied / "optimizer.pt")
    with pytest.raises(CorruptFileError, match="optimizer state cannot be read"):
        read_moments(stock.model, copied)
    assert not (copied / "ran").exists()


def test_another_model_is_refused(stock: Stock, tmp_path: Path) -> None:
    model = stock_model()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.requires_grad_(False)
    with pytest.raises(IncompatibleRunError, match="8 and 0 train"):
        read_moments(model, stock.folder / "checkpoint-3")
    from tiny import tiny_trainable

    with pytest.raises(IncompatibleRunError, match="made of another model"):
        put_weights(tiny_trainable("qwen2", "lora"), stock.folder / "checkpoint-3")
    with pytest.raises(ConfigError, match="no weights in"):
        put_weights(nn.Linear(2, 2), stock.folder / "checkpoint-3")


def test_a_way_without_a_logged_rate_is_refused(copied: Path) -> None:
    state = json.loads((copied / "trainer_state.json").read_text())
    state["log_history"] = [row for row in state["log_history"] if "loss" not in row]
    (copied / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="no learning rate was logged in the steps 1 to 6"):
        trainer_checkpoints(copied)
    with pytest.raises(ConfigError, match="4 checkpoints are asked for, 1 are there"):
        trainer_checkpoints(copied, 4)


def test_states_and_rates_belong_to_what_was_read(stock: Stock, copied: Path) -> None:
    shutil.copy(stock.folder / "checkpoint-9/adapter_config.json", copied.parent)
    seen = {checkpoints_fingerprint(copied)}
    for change in (
        lambda: set_rates(copied, 0.5),
        lambda: (copied / "optimizer.pt").write_bytes(b"other"),
        lambda: shutil.copytree(stock.folder / "checkpoint-9", copied.parent / "checkpoint-9"),
    ):
        change()
        seen.add(checkpoints_fingerprint(copied.parent))
    assert len(seen) == 4
    assert checkpoints_fingerprint(copied.parent, 1) in seen


def set_rates(checkpoint: Path, rate: float) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"] = [row | {"learning_rate": rate} for row in state["log_history"]]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def test_an_epoch_at_rate_0_counts_for_nothing_but_not_all_may(stock: Stock, copied: Path) -> None:
    last = shutil.copytree(stock.folder / "checkpoint-9", copied.parent / "checkpoint-9")
    set_rates(copied, 0.0)
    with pytest.raises(ConfigError, match="no learning rate above 0 was logged up to step 6"):
        trainer_checkpoints(copied)
    set_rates(last, 1e-4)
    found = [one.learning_rate for one in trainer_checkpoints(copied.parent)]
    assert found == [0.0, pytest.approx(1e-4)]


@pytest.mark.parametrize("kind", ["lora", "dora", "series", "parallel", "prefix"])
def test_every_kind_of_adapter_comes_back(kind: str, tmp_path: Path) -> None:
    from tiny import tiny_trainable

    from selectune.training.weights import save_weights

    model, other = tiny_trainable("llama", kind), tiny_trainable("llama", kind, seed=1)
    save_weights(model, tmp_path)
    put_weights(other, tmp_path)
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs if a.requires_grad)


def test_a_bare_model_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    from tiny import tiny_model

    model = tiny_model("gpt2")  # its head is tied to its embedding, and saved once
    model.save_pretrained(tmp_path)
    other = tiny_model("gpt2", seed=1)
    put_weights(other, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
