import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from selectune.data.tokens import Tokens
from selectune.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    IncompatibleRunError,
    TrainingError,
)
from selectune.methods.data_layer.gast import GAST
from selectune.methods.layers.ist import IST
from selectune.training import TuneResult
from selectune.training.method import Method
from selectune.training.tune import find_tuned

Run = Callable[..., TuneResult]


def digests(model: nn.Module, *, of_trained: bool) -> dict[str, str]:
    return {
        name: hashlib.sha256(p.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, p in model.named_parameters()
        if p.requires_grad is of_trained
    }


def last_block_only(tiny: ModuleType) -> nn.Module:
    model = tiny.tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1." in name)
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("kind", ["adapter", "block"])
def test_frozen_weights_stay_bit_identical_and_the_others_move(
    run: Run, tiny: ModuleType, precision: str, trainer: str, kind: str
) -> None:
    model = tiny.tiny_lora() if kind == "adapter" else last_block_only(tiny)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    before = digests(model, of_trained=False)
    started = digests(model.float(), of_trained=True) if precision == "float32" else {}
    options = tiny.section(trainer=trainer, weight_decay=0.1)
    result = run(model=model, options=options, precision=precision)
    assert digests(model, of_trained=False) == before
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    assert result.n_moved > 0.9 * result.n_trainable
    after = digests(model, of_trained=True)
    assert all(after[name] != digest for name, digest in started.items())


def test_same_inputs_give_the_same_bytes_and_another_seed_does_not(
    run: Run, tiny: ModuleType
) -> None:
    one, two = run("one"), run("two")
    other = run("other", seed=4)
    assert one.losses == two.losses != other.losses
    assert tiny.weights(one.path) == tiny.weights(two.path) != tiny.weights(other.path)
    config = (one.path / "adapter_config.json").read_text()
    assert config == (two.path / "adapter_config.json").read_text()
    assert json.loads(config)["target_modules"] == sorted(tiny.MODULES)


def test_global_random_numbers_do_not_matter(run: Run, tiny: ModuleType) -> None:
    one = run("one")
    model = tiny.tiny_lora()
    torch.rand(7)
    np.random.rand(3)
    assert tiny.weights(run("two", model).path) == tiny.weights(one.path)


def test_every_step_is_logged_and_nothing_else_is_said(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = []
    result = run(log=rows.append)
    assert rows[0] == {"arm": "gist", "start": 0, "n_steps": 6}
    assert [(row["step"], row["loss"]) for row in rows[1:]] == result.losses
    assert all(
        row.keys() == {"arm", "step", "loss", "learning_rate", "grad_norm"} for row in rows[1:]
    )
    assert [step for step, _ in result.losses] == [1, 2, 3, 4, 5, 6]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["adapter", "block"])
def test_a_finished_run_is_reused_and_the_model_holds_its_weights(
    run: Run, tiny: ModuleType, kind: str
) -> None:
    def model() -> nn.Module:
        return tiny.tiny_lora() if kind == "adapter" else last_block_only(tiny)

    first, second, rows = model(), model(), []
    result = run(model=first)
    assert run(model=second, log=rows.append) == result
    assert rows == []
    assert digests(first, of_trained=True) == digests(second, of_trained=True)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_the_saved_adapter_gives_the_logits_of_the_trained_model(
    run: Run, tiny: ModuleType, trainer: str
) -> None:
    model, ids = tiny.tiny_lora(), torch.arange(1, 9)[None]
    model.eval()
    result = run(model=model, options=tiny.section(trainer=trainer))
    with tiny.quiet_peft():
        loaded = PeftModel.from_pretrained(tiny.tiny_llama(), str(result.path)).eval()
    assert not model.training
    assert "forward" not in model.__dict__
    assert "forward" not in model.get_base_model().__dict__
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("fingerprint", {"fingerprint": "another base"}),
        ("seed", {"seed": 4}),
        ("pad_id", {"pad_id": 5}),
        ("examples", {"items": "fewer"}),
        ("tune.learning_rate", {"options": {"learning_rate": 2e-2}}),
        ("tune.epochs", {"options": {"epochs": 3}}),
    ],
)
def test_another_run_does_not_take_over_what_it_did_not_make(
    run: Run, tiny: ModuleType, state: str, key: str, change: dict[str, Any]
) -> None:
    def stop(row: dict[str, Any]) -> None:
        if state == "stopped" and row.get("step") == 3:
            raise ZeroDivisionError

    try:
        run(log=stop)
    except ZeroDivisionError:
        assert state == "stopped"
    if "items" in change:
        change = {"items": tiny.tiny_items(10)}
    if "options" in change:
        change = {"options": tiny.section(**change["options"])}
    with pytest.raises(IncompatibleRunError, match=rf"\b{key} differ"):
        run(**change)


@pytest.mark.parametrize("method", [None, GAST(), GAST(target="target")])
def test_what_is_finished_is_found_without_a_model(
    run: Run, tiny: ModuleType, tmp_path: Path, method: Method | None
) -> None:
    given: dict[str, Any] = {
        "items": tiny.tiny_items(),
        "options": tiny.section(),
        "seed": 3,
        "pad_id": 0,
        "precision": "float32",
        "device": "cpu",
        "fingerprint": "base",
        "method": method,
        "target": tiny.tiny_items(4),
    }
    output = tmp_path / "run"
    assert find_tuned(output=output, **given) is None
    result = run(method=method, target=given["target"])
    assert find_tuned(output=output, **given) == result
    changes: dict[str, Any] = {
        "items": tiny.tiny_items(10),
        "options": tiny.section(learning_rate=2e-2),
        "seed": 4,
        "pad_id": 5,
        "precision": "bfloat16",
        "device": "cuda",
        "fingerprint": "another base",
        "method": GAST(keep=0.25),
    }
    for key, value in changes.items():
        assert find_tuned(output=output, **{**given, key: value}) is None, key
    reads_target = method is not None and method.reads_target
    found = find_tuned(output=output, **{**given, "target": tiny.tiny_items(5)})
    assert (found is None) == reads_target
    (result.path / "losses.json").write_text("[]")
    with pytest.raises(CorruptFileError, match="losses"):
        find_tuned(output=output, **given)


def test_how_often_to_save_may_change(run: Run, tiny: ModuleType) -> None:
    result = run()
    assert run(options=tiny.section(save_every=None, keep_checkpoints=5)) == result


def test_only_the_newest_checkpoints_stay(run: Run, tiny: ModuleType) -> None:
    result = run(options=tiny.section(save_every=1, keep_checkpoints=2))
    names = sorted(path.name for path in result.path.parent.iterdir())
    assert names == ["adapter", "checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_loss_that_is_no_number_names_the_example(
    run: Run, tiny: ModuleType, trainer: str
) -> None:
    model = tiny.tiny_lora()
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = float("nan")  # no other example has this token
    bad = Tokens("broken-example", np.array([63, 2, 3]), np.array([False, False, True]))
    with pytest.raises(TrainingError, match=r"where: example broken-example\n"):
        run(model=model, items=[*tiny.tiny_items(), bad], options=tiny.section(trainer=trainer))


def test_weights_that_do_not_move_are_an_error(run: Run, tiny: ModuleType) -> None:
    with pytest.raises(TrainingError, match=r"none of the .* weights moved in 6 steps"):
        run(options=tiny.section(learning_rate=1e-50))


def test_a_run_of_one_step_moves(run: Run, tiny: ModuleType) -> None:
    result = run(options=tiny.section(epochs=1, batch_size=16))
    assert result.n_steps == 1
    assert result.n_moved > 0


def test_an_example_without_a_target_is_refused(run: Run, tiny: ModuleType) -> None:
    empty = Tokens("no-target", np.array([1, 2]), np.array([True, False]))
    with pytest.raises(DataError, match="no-target"):
        run(items=[*tiny.tiny_items(), empty])
    with pytest.raises(DataError, match="no example"):
        run(items=[])


def test_a_model_with_nothing_to_train_is_refused(run: Run, tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match="no weight"):
        run(model=tiny.tiny_llama().requires_grad_(False))


# With a training method


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_method_that_takes_everything_trains_as_none_does(
    run: Run, tiny: ModuleType, trainer: str
) -> None:
    options = tiny.section(trainer=trainer, batch_size=2, accumulation=2)
    plain, acted = tiny.tiny_lora(), tiny.tiny_lora()
    without = run("plain", plain, options=options)
    result = run("gast", acted, options=options, method=GAST(pick="all"))
    assert [step for step, _ in result.losses] == [step for step, _ in without.losses]
    assert torch.allclose(
        torch.tensor([loss for _, loss in result.losses]),
        torch.tensor([loss for _, loss in without.losses]),
        rtol=1e-5,
    )
    for (name, p), q in zip(plain.named_parameters(), acted.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4), name  # Adam makes steps of gradients near 0


def test_every_step_has_its_facts_and_they_are_kept(run: Run, tiny: ModuleType) -> None:
    result = run(method=GAST(target="target"), target=tiny.tiny_items(4))
    assert [step for step, _ in result.records] == [step for step, _ in result.losses]
    trained = sorted(i for _, facts in result.records[:3] for i in facts["examples"])
    assert trained == sorted(item.id for item in tiny.tiny_items())
    for _, facts in result.records:
        for picked in facts["picks"].values():
            n = len(facts["examples"])
            assert (len(picked), picked.count("1")) == (n, round(0.5 * n))
    assert run(method=GAST(target="target"), target=tiny.tiny_items(4)) == result
    assert (result.path / "records.json").exists()
    assert not (run("plain").path / "records.json").exists()


def test_a_fact_that_is_no_number_becomes_null(run: Run, tiny: ModuleType) -> None:
    result = run(method=tiny.Flicker())
    assert {facts["importance"][0] for _, facts in result.records} == {None}
    assert run(method=tiny.Flicker()) == result


@pytest.mark.parametrize("end", ["done", "raised"])
def test_the_model_comes_back_without_the_method(run: Run, tiny: ModuleType, end: str) -> None:
    model = tiny.tiny_lora()

    def state() -> list[object]:
        return [
            (name, len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
            for name, m in model.named_modules()
        ] + [(name, p.requires_grad) for name, p in model.named_parameters()]

    before = state()
    fails_at = 3 if end == "raised" else None
    method = GAST(sampler=tiny.Flicker(fails_at=fails_at), refresh_every=2)
    if end == "raised":
        with pytest.raises(ZeroDivisionError):
            run(model=model, method=method)
    else:
        assert run(model=model, method=method).n_steps == 6
    assert state() == before


def test_another_method_or_target_is_another_run(run: Run, tiny: ModuleType) -> None:
    target, other = tiny.tiny_items(4), tiny.tiny_items(5)
    run("plain")
    with pytest.raises(IncompatibleRunError, match=r"\bmethod differ"):
        run("plain", method=GAST())
    run("gast", method=GAST(), target=target)
    with pytest.raises(IncompatibleRunError, match=r"\bmethod differ"):
        run("gast", method=GAST(keep=0.25), target=target)
    run("gast", method=GAST(), target=other)  # which it does not look at
    aimed = (
        GAST(target="target"),
        IST(layers=1, probe_from="target"),
        GAST(sampler="ist", sampler_options={"layers": 1, "probe_from": "target"}),
        GAST(sampler=IST(layers=1, probe_from="target")),
    )
    for n, method in enumerate(aimed):
        run(f"aimed-{n}", method=method, target=target)
        with pytest.raises(IncompatibleRunError, match=r"\btarget differ"):
            run(f"aimed-{n}", method=method, target=other)
