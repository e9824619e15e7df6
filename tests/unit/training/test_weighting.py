"""How a training loss weighs its examples is found out, said, or refused."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from loops import loop_gradients
from slow_gast import batch_loss
from tiny import tiny_batch, tiny_tokens, tiny_trainable
from torch import Tensor, nn
from torch.nn import functional

from selectune import GAST
from selectune.data import Batch, Tokens, collate
from selectune.errors import ConfigError
from selectune.gradients.kernels import DenseRows
from selectune.training import aligned
from selectune.training.weighting import detect

Loss = Callable[[nn.Module, Batch], Tensor]


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    return batch_loss(model, batch, "token")


def example_mean(model: nn.Module, batch: Batch) -> Tensor:
    return batch_loss(model, batch, "example")


def scaled(loss: Loss) -> Loss:
    return lambda model, batch: 3.7 * loss(model, batch)


def per_example(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    answers = batch.labels[:, 1:]
    nats = functional.cross_entropy(logits[:, :-1].mT, answers, reduction="none")
    n_tokens = (answers != -100).sum(1)
    return nats.sum(1) / n_tokens, n_tokens


def squared_weights(model: nn.Module, batch: Batch) -> Tensor:
    losses, n_tokens = per_example(model, batch)
    return (losses * n_tokens**2).sum() / (n_tokens**2).sum()


def squared_losses(model: nn.Module, batch: Batch) -> Tensor:
    return per_example(model, batch)[0].square().mean()


def sum_of_tokens(model: nn.Module, batch: Batch) -> Tensor:
    losses, n_tokens = per_example(model, batch)
    return (losses * n_tokens).sum()


def smoothed(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), label_smoothing=0.3
    )


def of_the_model(model: nn.Module, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss


def lora(dropout: float = 0.0) -> nn.Module:
    model = tiny_trainable("llama", "lora").train()
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = dropout
    return model


def found_weighting(
    model: nn.Module,
    loss: Loss,
    batches: list[Batch],
    precision: str = "float32",
    **options: object,
) -> list[str | None]:
    """Return what was known of the loss after each batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    method = GAST(**{"target": tiny_tokens(2, seed=9), **options})
    known: list[str | None] = []
    with method.attach(model, optimizer, precision=precision) as session:
        for batch in batches:
            if loss is not of_the_model:
                session.expect(batch.labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                value = loss(model, batch)
            value.backward()
            known.append(session.state()[0]["weighting"])
    return known


LOSSES = {
    "token": [token_mean, scaled(token_mean), sum_of_tokens, of_the_model],
    "example": [example_mean, scaled(example_mean)],
}
CASES = [(name, loss) for name, losses in LOSSES.items() for loss in losses]


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_mean_losses_are_recognised(name: str, loss: Loss) -> None:
    assert found_weighting(lora(), loss, [tiny_batch(6)]) == [name]
    assert found_weighting(lora(dropout=0.2), loss, [tiny_batch(6)]) == [name]


@pytest.mark.parametrize(
    ("form", "name", "loss"),
    [("two_pass", *CASES[1]), ("concat", *CASES[1]), ("concat", *CASES[5])],
)
def test_every_form_recognises_them(form: str, name: str, loss: Loss) -> None:
    found = found_weighting(lora(), loss, [tiny_batch(6)], form=form, target_batch=2)
    assert found == [name]


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "full"), ("opt", "lora"), ("gemma", "dora")])
def test_every_model_tells(family: str, kind: str) -> None:
    model = tiny_trainable(family, kind).train()  # GPT-2 comes with dropout
    for name, loss in (("token", token_mean), ("example", example_mean)):
        assert found_weighting(model, loss, [tiny_batch(4)]) == [name]


@pytest.mark.parametrize("loss", [squared_weights, squared_losses, smoothed])
def test_other_losses_are_refused_with_the_numbers(loss: Loss) -> None:
    model = lora()
    with pytest.raises(ConfigError, match="weighs its examples in an unknown way") as caught:
        found_weighting(model, loss, [tiny_batch(6)])
    assert "%" in str(caught.value)
    assert "loss_weighting" in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("said", ["token", "example"])
def test_what_is_said_is_not_checked(said: str) -> None:
    assert found_weighting(lora(), squared_weights, [tiny_batch(6)], loss_weighting=said) == [said]


def test_examples_of_one_length_tell_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(*args: object, **options: object) -> str:
        asked.append(1)
        return detect(*args, **options)

    monkeypatch.setattr(aligned, "detect", counted)
    is_target = np.arange(8) >= 5
    rng = np.random.default_rng(0)
    alike = [Tokens(f"a{k}", rng.integers(2, 60, 8), is_target) for k in range(4)]
    batches = [collate(alike, pad_id=0), tiny_batch(4, seed=1), tiny_batch(4, seed=2)]
    known = found_weighting(lora(), example_mean, batches)
    assert known == [None, "example", "example"]
    assert len(asked) == 1


@pytest.mark.parametrize(("name", "loss"), [CASES[1], CASES[5]])
def test_half_precision_tells_as_well(name: str, loss: Loss) -> None:
    assert found_weighting(lora(), loss, [tiny_batch(8)], "bfloat16") == [name]
    assert found_weighting(lora().bfloat16(), loss, [tiny_batch(8)]) == [name]


def test_an_autocast_of_the_loop_alone_is_noticed() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return example_mean(model, batch)

    assert found_weighting(lora(), loss, [tiny_batch(8)]) == ["example"]


@pytest.mark.parametrize("place", [0, 2])
def test_examples_without_target_tokens_tell_nothing(place: int) -> None:
    items = tiny_tokens(6)
    mute = Tokens("none", items[place].input_ids, np.zeros_like(items[place].is_target))
    batch = collate([*items[:place], mute, *items[place + 1 :]], pad_id=0)
    for name in ("token", "example"):
        assert found_weighting(lora(), lambda m, b, n=name: batch_loss(m, b, n), [batch]) == [name]


def test_left_padding_tells_without_dropout_and_must_be_told_with_it() -> None:
    batch = tiny_batch(6, side="left")
    assert found_weighting(lora(), token_mean, [batch]) == ["token"]
    with pytest.raises(ConfigError, match="dropout with left padding"):
        found_weighting(lora(0.3), token_mean, [batch])


def test_a_batch_of_one_tells_nothing() -> None:
    assert found_weighting(lora(), token_mean, [tiny_batch(1)], keep=1.0) == [None]


def rows_of(items: list[Tokens]) -> Tensor:
    found = loop_gradients(tiny_trainable("llama", "lora"), items)
    return found[max(found, key=lambda name: float(found[name].norm()))]


@pytest.mark.parametrize("constant", [1e-6, 1.0, 65536.0])
def test_the_constant_of_the_loss_does_not_matter(constant: float) -> None:
    items = tiny_tokens(6)
    own = rows_of(items)
    n_tokens = torch.tensor([int(t.is_target[1:].sum()) for t in items])
    every = torch.ones(6, dtype=torch.bool)

    def asked(weight: Tensor, **changes: object) -> str:
        theirs = DenseRows(constant * weight[:, None, None] * own)
        return detect(theirs, DenseRows(own), n_tokens, every, **{"is_half": False, **changes})

    assert asked(n_tokens.float()) == "token"
    assert asked(torch.ones(6)) == "example"
    noise = 1 + 0.03 * torch.randn(6)
    assert asked(n_tokens * noise, is_half=True) == "token"
    for wrong in (n_tokens * noise, n_tokens.float().sqrt(), n_tokens.float() ** 2, torch.rand(6)):
        with pytest.raises(ConfigError, match="unknown way"):
            asked(wrong)
    with pytest.raises(ConfigError, match="unknown way"):
        asked(-torch.ones(6) * torch.tensor([1.0, -1, 1, -1, 1, -1]))
