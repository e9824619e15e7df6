"""The loss of each example: right for every kind of model, at the cost of its targets only."""

from collections.abc import Callable

import pytest
import torch
from evaluation_case import VOCABULARY, tiny_lm
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from selectune.data.collate import Batch, collate
from selectune.data.tokens import Tokens
from selectune.errors import CoverageError, DataError
from selectune.gradients.loss import target_nll

Make = Callable[[str], nn.Module]
LENGTHS = ((9, 3), (5, 4), (12, 1), (7, 2))  # tokens, and targets at their end


def _items() -> list[Tokens]:
    rng = torch.Generator().manual_seed(5)
    items: list[Tokens] = []
    for k, (length, n_targets) in enumerate(LENGTHS):
        ids = torch.randint(3, VOCABULARY, (length,), generator=rng).numpy()
        items.append(Tokens(f"e{k}", ids, (torch.arange(length) >= length - n_targets).numpy()))
    return items


def _batch(side: str = "right") -> Batch:
    return collate(_items(), pad_id=0, side=side)


def _slow(model: nn.Module) -> Tensor:
    sums: list[Tensor] = []
    for item in _items():
        ids = torch.as_tensor(item.input_ids)
        logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = [t for t in range(1, len(ids)) if item.is_target[t]]
        sums.append(-torch.stack([logits[t - 1, ids[t]] for t in at]).sum())
    return torch.stack(sums)


def _adapted(family: str) -> nn.Module:
    names = ["c_attn"] if family == "gpt2" else ["q_proj"]
    config = LoraConfig(
        r=2, target_modules=names, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_lm(family), config).eval()


def _frozen(family: str) -> nn.Module:
    return tiny_lm(family).requires_grad_(False).eval()


def _full(family: str) -> nn.Module:
    return tiny_lm(family).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [_frozen, _full, _adapted])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_it_equals_full_logits_one_example_at_a_time(family: str, make: Make, side: str) -> None:
    model = make(family)
    nats, n_tokens = target_nll(model, _batch(side))
    assert_close(nats, _slow(model), rtol=1e-5, atol=1e-5)
    assert n_tokens.tolist() == [n for _, n in LENGTHS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [_full, _adapted])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_its_gradients_are_those_of_full_logits(family: str, make: Make, side: str) -> None:
    model = make(family)
    weights = [p for p in model.parameters() if p.requires_grad]
    fast = torch.autograd.grad(target_nll(model, _batch(side))[0].sum(), weights)
    for found, expected in zip(fast, torch.autograd.grad(_slow(model).sum(), weights), strict=True):
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (_frozen, (1, sum(n for _, n in LENGTHS))),
        (_adapted, (1, sum(n for _, n in LENGTHS))),
        (_full, (len(LENGTHS), max(n for _, n in LENGTHS))),
    ],
)
def test_the_head_sees_target_positions_only(make: Make, shape: tuple[int, int]) -> None:
    model = make("llama")
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(tuple(args[0].shape[:-1]))
    )
    target_nll(model, _batch())
    assert seen == [shape]


def test_a_head_that_peft_trains_keeps_the_batch_axis() -> None:
    model = get_peft_model(
        tiny_lm("llama"), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    ).eval()
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(tuple(args[0].shape[:-1]))
    )
    assert_close(target_nll(model, _batch())[0], _slow(model), rtol=1e-5, atol=1e-5)
    assert seen[0] == (len(LENGTHS), max(n for _, n in LENGTHS))


def test_a_head_used_as_a_bare_weight_falls_back_to_full_logits() -> None:
    model = _frozen("llama")
    head = model.get_output_embeddings()
    model.lm_head = nn.Identity()
    model.get_output_embeddings = lambda: head
    final = model.model.norm
    model.model.norm = nn.Sequential(final, _Tied(head.weight))
    nats, _ = target_nll(model, _batch("left"))
    assert_close(nats, _slow(model), rtol=1e-5, atol=1e-5)


class _Tied(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._weight.T


def test_virtual_tokens_are_refused_as_their_logits_line_up_with_nothing() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_lm("llama"), config).eval()
    with pytest.raises(CoverageError, match="logits of shape"):
        target_nll(model, _batch())


@pytest.mark.parametrize("make", [_frozen, _full])
def test_no_hook_stays_behind_even_after_an_error(make: Make) -> None:
    model = make("llama")
    target_nll(model, _batch())
    model.model.forward = None
    with pytest.raises(TypeError):
        target_nll(model, _batch())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_bf16_logits_are_summed_in_fp32_and_fp64_stays() -> None:
    model = _frozen("llama")
    assert target_nll(model.bfloat16(), _batch())[0].dtype == torch.float32
    assert target_nll(model.double(), _batch())[0].dtype == torch.float64


def test_an_example_without_a_target_is_named() -> None:
    batch = _batch()
    batch.labels[2] = -100
    with pytest.raises(DataError, match="e2"):
        target_nll(_frozen("llama"), batch)


def test_a_label_at_the_first_position_counts_for_nothing() -> None:
    model, batch = _frozen("llama"), _batch()
    expected = target_nll(model, batch)[0]
    batch.labels[:, 0] = batch.input_ids[:, 0]
    assert torch.equal(target_nll(model, batch)[0], expected)


def test_an_adapter_that_widens_nothing_runs_in_half_precision() -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_lm("llama"), config).eval()
    exact = target_nll(model, _batch())[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = target_nll(model, _batch())[0]
    assert_close(rough, exact, rtol=0.05, atol=0.05)
