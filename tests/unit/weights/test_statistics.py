"""The pass over examples: what it leaves alone, what it holds at once, and what it refuses."""

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokens, tiny_trainable
from torch import Tensor, nn

from ranks import PAIR, run_ranks
from selectune.data import Tokens
from selectune.errors import DataError, SelectionError, StorageError, TrainingError
from selectune.registry import WeightNeed
from selectune.weights.eligible import eligible_weights
from selectune.weights.mask import WeightMask
from selectune.weights.statistics import Statistics, drawn, estimate

POOL = tiny_tokens(9, seed=4)
MEAN = frozenset({"mean_gradient"})


def mean(model: nn.Module, tokens: list[Tokens] = POOL, **options: Any) -> Statistics:  # noqa: ANN401
    return estimate(model, tokens, MEAN, eligible_weights(model, "layers"), **options)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny_trainable("llama", kind).train()
    model.model.layers[0].eval() if kind == "full" else None
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    mean(model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("need", ["mean_gradient", "square_gradient"])
def test_sums_on_disk_are_the_sums_in_memory(tmp_path: Path, need: WeightNeed) -> None:
    model = tiny_model("llama")
    eligible, needs = eligible_weights(model, "layers"), frozenset({need})
    here = estimate(model, POOL, needs, eligible)
    there = estimate(model, POOL, needs, eligible, spill=tmp_path)
    for name, tensor in there.values[need].items():
        assert torch.equal(tensor, here.values[need][name])
        assert str(tensor.untyped_storage().filename).startswith(str(tmp_path))
        assert here.values[need][name].untyped_storage().filename is None
    assert not list(tmp_path.iterdir())  # nothing is left behind, however the process ends


def test_sums_find_no_room_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        mean(tiny_model("llama"), spill=tmp_path / "nowhere")


def test_dropout_is_off() -> None:
    model = tiny_trainable("gpt2", "full").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    one, other = mean(model), mean(model)
    for name, tensor in one.values["mean_gradient"].items():
        assert torch.equal(tensor, other.values["mean_gradient"][name])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_activation_checkpointing_does_not_matter(use_reentrant: bool) -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    one, other = (mean(m).values["mean_gradient"] for m in (plain, model))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_dense_gradient_is_alive_at_a_time() -> None:
    model = tiny_model("llama").to(torch.bfloat16)  # fp32 gradients would live on as the sums
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    # Runs before the hook under test: counts the gradients that earlier ones left behind.
    def look(p: Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        others = [r() for r in alive]
        held = [g for g in others if g is not None and g.data_ptr() != p.grad.data_ptr()]
        most = max(most, len(held) + 1)
        alive.append(weakref.ref(p.grad))

    eligible = eligible_weights(model, "layers")
    for weight in eligible.values():
        weight.parameter.register_post_accumulate_grad_hook(look)
    found = estimate(model, POOL, MEAN, eligible, token_budget=40, precision="bfloat16")
    assert len(alive) % len(eligible) == 0
    assert len(alive) > len(eligible)
    assert most == 1
    largest = max(2 * w.parameter.numel() for w in eligible.values())
    assert found.peak_gradient_bytes == largest


def test_sums_are_fp32_on_the_cpu_whatever_the_model_holds() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    found = mean(model, precision="bfloat16").values["mean_gradient"]
    exact = mean(tiny_model("llama")).values["mean_gradient"]
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        cosine = torch.cosine_similarity(tensor.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.95


def test_half_precision_sums_do_not_stall() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    one = POOL[0]
    many = [Tokens(f"copy {k}", one.input_ids, one.is_target) for k in range(400)]
    single, repeated = mean(model, [one]), mean(model, many, token_budget=1)
    for name, tensor in single.values["mean_gradient"].items():
        torch.testing.assert_close(
            repeated.values["mean_gradient"][name], tensor, rtol=1e-4, atol=1e-7
        )


def test_a_draw_depends_on_ids_and_seed_alone() -> None:
    def ids(tokens: list[Tokens], n: int, seed: int) -> list[str]:
        return [t.id for t in drawn(tokens, n, seed)]

    assert ids(POOL, 4, 0) == ids(POOL[::-1], 4, 0)
    assert ids(POOL, 4, 0) != ids(POOL, 4, 1)
    assert sorted(ids(POOL, 99, 0)) == sorted(t.id for t in POOL)
    assert ids(POOL, 3, 0) == ids(POOL, 4, 0)[:3]


def test_every_example_is_told() -> None:
    counts: list[int] = []
    found = mean(tiny_model("llama"), examples=7, token_budget=20, advance=counts.append)
    assert sum(counts) == len(found.ids) == 7
    assert len(counts) > 1


def test_examples_without_an_answer_are_passed_over() -> None:
    empty = Tokens("none", POOL[0].input_ids, np.zeros(len(POOL[0].input_ids), bool))
    model = tiny_model("llama")
    assert "none" not in mean(model, [*POOL, empty]).ids
    with pytest.raises(DataError, match="no example has a target token"):
        mean(model, [empty])


def test_a_gradient_that_is_no_number_is_an_error_that_names_the_tensor() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.register_hook(lambda grad: grad.index_put((torch.tensor(3),), torch.tensor(np.inf)))
    with pytest.raises(TrainingError, match=r"gradient of model.layers.1.mlp.down_proj.weight"):
        mean(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_huge_gradients_are_still_numbers() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.register_hook(lambda grad: torch.full_like(grad, 1e30))  # their norm overflows
    assert mean(model).values["mean_gradient"]["model.layers.1.mlp.down_proj.weight"].max() > 1e28


def test_a_loss_that_is_no_number_is_an_error_that_names_the_example() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = np.nan
    with pytest.raises(TrainingError, match="the loss of 4 examples") as caught:
        mean(model, POOL[:4])
    assert "example e" in caught.value.where


def test_tensors_without_a_gradient_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # nothing of the MLP gets through any more
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with caplog.at_level(logging.WARNING):
        found = mean(model)
    names = [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")]
    assert list(found.silent) == names
    assert "zero throughout in 2 of 14 tensors" in caplog.text


def test_gradients_that_are_all_zero_are_an_error() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(TrainingError, match="mean gradient of every eligible weight is zero"):
        mean(model)


class Aside(nn.Module):
    """A model beside a weight that it does not use."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.unused = inner, nn.Linear(3, 3)

    def forward(self, **inputs: object) -> object:
        return self.inner(**inputs)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()


def test_weights_that_the_model_does_not_use_are_an_error() -> None:
    model = Aside(tiny_model("llama"))
    with pytest.raises(TrainingError, match="is zero") as caught:
        estimate(model, POOL, MEAN, eligible_weights(model, ["unused"]))
    assert "no loss depends" in caught.value.why


def test_drift_is_what_fine_tuning_changed() -> None:
    base, tuned = tiny_model("llama"), tiny_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        tuned.get_parameter(name)[2, 3] += 0.5
    needs = frozenset({"drift"})
    found = estimate(base, [], needs, eligible_weights(base, "layers"), tuned=tuned)
    moved = found.values["drift"][name]
    assert moved.nonzero().tolist() == [[2, 3]]
    assert float(moved[2, 3]) == pytest.approx(0.5)
    with pytest.raises(TrainingError, match="drift of every eligible weight is zero") as caught:
        estimate(base, [], needs, eligible_weights(base, "layers"), tuned=tiny_model("llama"))
    assert "after training" in caught.value.do
    with pytest.raises(SelectionError, match=r"has no model.layers.0.self_attn.q_proj.weight"):
        estimate(base, [], needs, eligible_weights(base, "layers"), tuned=tiny_model("gpt2"))
    with torch.no_grad():
        tuned.get_parameter(name)[0, 0] = np.nan
    with pytest.raises(TrainingError, match=f"drift of {name} is not a number"):
        estimate(base, [], needs, eligible_weights(base, "layers"), tuned=tuned)


def test_masks_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    run_ranks(Path(__file__).parent / "mask_of_one_rank.py", tmp_path, (*PAIR, (0, 1)))
    for name in ("gallop", "token", "fisher", "sift"):
        first, second, alone = (
            WeightMask.load(tmp_path / f"{name}-{which}") for which in ("2-0", "2-1", "1-0")
        )
        assert first == second == alone
        sums = [
            json.loads((tmp_path / f"{name}-{which}.txt").read_text()) for which in ("2-0", "1-0")
        ]
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)
