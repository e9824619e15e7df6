"""Statistics do not depend on how calibration text is cut up, and leave the model as it was."""

import pytest
import torch
from tiny import tiny_model, tiny_tokens
from torch import Tensor, nn
from torch.testing import assert_close

from selectune.data import Batch, Tokens, collate
from selectune.errors import CoverageError, DataError, TrainingError
from selectune.models import blocks
from selectune.offsite.pooling import pooled_states
from selectune.offsite.statistics import LayerStatistics, collect, statistics_bytes

EXAMPLES = tiny_tokens(6, seed=2)
BOTH = frozenset({"gradients"})
SAMPLED = frozenset({"gradients", "sampled_labels"})
INPUTS = frozenset({"inputs"})
FAMILIES = ("llama", "qwen2", "opt", "gpt2")


def batches(items: list[Tokens], size: int, side: str = "right") -> list[Batch]:
    return [collate(items[k : k + size], pad_id=0, side=side) for k in range(0, len(items), size)]


def tensors(found: LayerStatistics) -> dict[str, Tensor]:
    parts = {"A": "A", "S": "S", "G": "G"}
    return {
        f"{key} {part}": value
        for key, of in found.matrices.items()
        for part in parts
        if (value := getattr(of, part)) is not None
    }


def alike(one: LayerStatistics, other: LayerStatistics, rtol: float = 2e-5) -> None:
    assert one.n_positions == other.n_positions
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert_close(value, theirs[key], rtol=rtol, atol=rtol * float(theirs[key].abs().max()))


@pytest.mark.parametrize("needs", [BOTH, SAMPLED], ids=["text", "sampled"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_padding_and_groups_change_nothing(
    family: str, side: str, needs: frozenset
) -> None:
    model = tiny_model(family)
    whole = collect(model, batches(EXAMPLES, 6, side), [0, 1], needs=needs)
    single = collect(model, batches(EXAMPLES[::-1], 1), [1], needs=needs)
    single |= collect(model, batches(EXAMPLES, 2), [0], needs=needs)
    for j in (0, 1):
        alike(whole[j], single[j])


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_alone_are_the_same_inputs(family: str) -> None:
    model = tiny_model(family)
    whole = collect(model, batches(EXAMPLES, 3), [0, 1], needs=BOTH)
    inputs = collect(model, batches(EXAMPLES, 3), [0, 1], needs=INPUTS)
    for j in (0, 1):
        assert inputs[j].matrices.keys() == whole[j].matrices.keys()
        for key, of in inputs[j].matrices.items():
            assert of.S is None
            assert of.G is None
            assert_close(of.A, whole[j].matrices[key].A)


def test_who_reads_the_same_shares_the_moments() -> None:
    found = collect(tiny_model("llama"), batches(EXAMPLES, 6), [0], needs=INPUTS)[0].matrices
    q, k, v, o = (found[f"self_attn.{x}_proj"].A for x in "qkvo")
    assert q is k is v
    assert o is not q
    assert found["mlp.up_proj"].A is found["mlp.gate_proj"].A
    assert found["mlp.down_proj"].A.shape == (24, 24)


def test_a_matrix_without_bias_leaves_out_the_constant_of_its_neighbours() -> None:
    model = tiny_model("qwen2")
    with_bias = collect(model, batches(EXAMPLES, 6), [0], needs=BOTH)[0].matrices
    blocks(model)[0].get_submodule("self_attn.k_proj").bias = None
    without = collect(model, batches(EXAMPLES, 6), [0], needs=BOTH)[0].matrices
    q, k = without["self_attn.q_proj"], without["self_attn.k_proj"]
    assert q.A.shape == (17, 17)
    assert k.A.shape == (16, 16)
    assert torch.equal(q.A[:16, :16], k.A)
    assert k.G is not None
    assert k.G.shape == (8, 16)
    assert_close(q.A, with_bias["self_attn.q_proj"].A)


@pytest.mark.parametrize("needs", [BOTH, INPUTS])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_is_what_was_foretold(family: str, needs: frozenset) -> None:
    model = tiny_model(family)
    found = collect(model, batches(EXAMPLES, 6), [1], needs=needs)[1]
    stored = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors(found).values()}
    assert sum(stored.values()) == statistics_bytes(blocks(model)[1], needs)


def test_the_model_is_left_as_it_was_and_nothing_below_the_group_is_recorded() -> None:
    model = tiny_model("llama").train()
    first, second = blocks(model)
    seen: list[bool] = []
    handle = first.register_forward_hook(lambda m, a, y: seen.append(y.requires_grad))
    flags = {name: k % 2 == 0 for k, (name, _) in enumerate(model.named_parameters())}
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name])
        p.grad = torch.ones_like(p) if flags[name] else None
    collect(model, batches(EXAMPLES, 3), [1], needs=BOTH)
    handle.remove()
    assert seen == [False, False]
    assert model.training
    assert second.training
    for name, p in model.named_parameters():
        assert p.requires_grad == flags[name]
        assert p.grad is None if not flags[name] else torch.equal(p.grad, torch.ones_like(p))
    assert not any(m._forward_hooks for m in model.modules())


# transformers 5.24 renames it to `activation_checkpointing_enable`; 5.23 has the old name only.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = tiny_model("llama")
    plain = collect(model, batches(EXAMPLES, 6), [0, 1], needs=BOTH)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = collect(model.train(), batches(EXAMPLES, 6), [0, 1], needs=BOTH)
    for j in (0, 1):
        alike(plain[j], again[j])


def test_half_precision_is_close_and_summed_in_fp32() -> None:
    model = tiny_model("llama")
    exact = collect(model, batches(EXAMPLES, 6), [0], needs=BOTH)[0]
    half = collect(model, batches(EXAMPLES, 6), [0], needs=BOTH, precision="bfloat16")[0]
    for key, value in tensors(half).items():
        assert value.dtype == torch.float32
        assert_close(value, tensors(exact)[key], rtol=0.2, atol=0.05 * float(value.abs().max()))


def test_without_needs_there_is_no_pass() -> None:
    assert collect(tiny_model("llama"), [], [0], needs=frozenset()) == {}
    assert statistics_bytes(blocks(tiny_model("llama"))[0], frozenset()) == 0


def test_no_text_and_no_numbers_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="no calibration text"):
        collect(model, [], [0], needs=INPUTS)
    with torch.no_grad():
        blocks(model)[1].get_submodule("mlp.down_proj").weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not numbers"):
        collect(model, batches(EXAMPLES, 6), [1], needs=BOTH)


def test_a_matrix_that_is_not_called_on_every_token_is_refused() -> None:
    model = tiny_model("llama")
    mlp = blocks(model)[0].get_submodule("mlp")
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + plain(2 * x)
    with pytest.raises(CoverageError, match="positions"):
        collect(model, batches(EXAMPLES, 6), [0], needs=BOTH)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pooled_states_are_means_over_an_example_s_tokens(family: str, side: str) -> None:
    model = tiny_model(family)
    found = pooled_states(model, batches(EXAMPLES, 3, side), [0, 1])
    for k, example in enumerate(EXAMPLES):
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, y: object, seen: list = seen) -> None:
            seen.append(y if isinstance(y, Tensor) else y[0])

        handles = [block.register_forward_hook(keep) for block in blocks(model)]
        with torch.no_grad():
            model(input_ids=torch.as_tensor(example.input_ids)[None])
        for handle in handles:
            handle.remove()
        for layer, state in enumerate(seen):
            assert_close(found[layer, k], state[0].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="no calibration text"):
        pooled_states(model, [], [0])
