from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, get_scheduler

from selectune.data import collate
from selectune.recipe import TuneSection
from selectune.training import TuneResult
from selectune.training.order import EpochBatches
from selectune.training.trainers import TransformersArm

Run = Callable[..., TuneResult]
MODULE = import_module("selectune.training.tune")


def bare_loop(model: nn.Module, items: list, options: TuneSection, seed: int) -> list[float]:
    """Train as transformers would, its own loss on all logits, in plain torch."""
    order = EpochBatches(
        [len(item.input_ids) for item in items],
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        seed=seed,
    )
    n_steps = order.n_steps * options.epochs
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 1, n_steps)
    losses = []
    model.train()
    for epoch in range(options.epochs):
        order.set_epoch(epoch)
        batches = list(order)
        for start in range(0, len(batches), options.accumulation):
            passes = [
                collate([items[i] for i in batch], pad_id=0)
                for batch in batches[start : start + options.accumulation]
            ]
            n_targets = sum(int((b.labels[:, 1:] != -100).sum()) for b in passes)
            total = 0.0
            for b in passes:
                loss = model(
                    input_ids=b.input_ids,
                    attention_mask=b.attention_mask,
                    labels=b.labels,
                    num_items_in_batch=n_targets,
                ).loss
                loss.backward()
                total += float(loss.detach())
            nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize(("size", "passes"), [(4, 1), (2, 3)])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_training_equals_a_bare_loop_with_the_loss_of_transformers(
    run: Run, tiny: ModuleType, trainer: str, size: int, passes: int, head: str
) -> None:
    saved = {"modules_to_save": ["lm_head"]} if head == "trained" else {}
    options = tiny.section(trainer=trainer, batch_size=size, accumulation=passes)
    ours, plain = (tiny.tiny_lora(lora_dropout=0.0, **saved) for _ in range(2))
    result = run(model=ours, options=options)
    losses = bare_loop(plain, tiny.tiny_items(), options, seed=3)
    assert_close([loss for _, loss in result.losses], losses, rtol=1e-5, atol=0)
    assert_close(trained(ours), trained(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_trainers_end_in_the_same_bytes(run: Run, tiny: ModuleType, precision: str) -> None:
    dtype = getattr(torch, precision)
    one, two = (
        run(
            trainer,
            tiny.tiny_lora(dtype),
            options=tiny.section(trainer=trainer),
            precision=precision,
        )
        for trainer in ("transformers", "trl")
    )
    assert one.losses == two.losses
    assert tiny.weights(one.path) == tiny.weights(two.path)


def test_one_step_is_the_same_however_many_passes_it_takes(run: Run, tiny: ModuleType) -> None:
    results = [
        run(
            f"{size}",
            tiny.tiny_lora(lora_dropout=0.0),
            options=tiny.section(batch_size=size, accumulation=8 // size),
        )
        for size in (8, 4, 1)
    ]
    for other in results[1:]:
        assert_close(other.losses, results[0].losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_the_head_is_computed_where_a_target_is_predicted_and_nowhere_else(
    run: Run, tiny: ModuleType, trainer: str
) -> None:
    model, items, n_rows = tiny.tiny_lora(), tiny.tiny_items(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: n_rows.append(logits[..., 0].numel()))
    run(model=model, items=items, options=tiny.section(trainer=trainer, epochs=1))
    assert sum(n_rows) == sum(item.is_target.sum() for item in items)


class PlainLoss(TransformersArm):
    """Our batches with whatever loss the Trainer takes by itself."""

    def compute_loss(self, model: nn.Module, inputs: dict, **kwargs: object) -> torch.Tensor:
        inputs.pop("ids")
        return Trainer.compute_loss(self, model, inputs, **kwargs)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_experts_keep_their_balancing_loss(
    run: Run, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=64, **shape, **heads, output_router_logits=True)
        )

    ours = run("ours", model(), options=tiny.section(trainer=trainer, epochs=1))
    monkeypatch.setattr(MODULE, "TransformersArm", PlainLoss)
    plain = run("plain", model(), options=tiny.section(epochs=1))
    assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-6)
