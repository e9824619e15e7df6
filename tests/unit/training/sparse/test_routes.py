"""How gradients reach the chosen entries: every way gives the same, and auto keeps its choice."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_gast import batch_loss
from slow_sparse import dense_gradients, is_matrix, mask_of
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from selectune.errors import ConfigError
from selectune.gradients.kernels import Pattern
from selectune.training.sparse import sparsify
from selectune.training.sparse.channels import whole_channels
from selectune.training.sparse.refusals import refuse_options
from selectune.training.sparse.routes import Route, Routes
from selectune.weights.base import base_weights
from selectune.weights.mask import WeightMask

BATCH = tiny_batch()


def channels_mask(model: nn.Module, ending: str = "down_proj.weight") -> WeightMask:
    """Return a mask of whole input channels of some Linears."""
    weights = {n: p for n, p in base_weights(model).items() if n.endswith(ending)}
    found = {}
    for k, (name, p) in enumerate(weights.items()):
        is_chosen = torch.zeros(p.shape, dtype=torch.bool)
        is_chosen[:, [1 + k, 5, 7]] = True
        found[name] = is_chosen.flatten().nonzero().flatten()
    return WeightMask(found, {n: tuple(p.shape) for n, p in weights.items()})


@pytest.mark.parametrize("route", ["gather", "sampled", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_values_are_the_dense_ones_at_the_chosen_entries(
    family: str, route: Route
) -> None:
    model = tiny_model(family)
    expected = dense_gradients(tiny_model(family), [BATCH])
    mask = mask_of(model, 0.3)
    sparsify(model, mask, route=route)
    batch_loss(model, BATCH, "token").backward()
    assert mask.n_chosen == sum(p.grad.numel() for p in model.sparse.parameters())
    for name, entries in model.sparse.entries.items():
        assert entries.values.grad.dtype == torch.float32
        dense = expected[name].flatten()[entries.index]
        assert_close(entries.values.grad, dense, rtol=1e-5, atol=1e-6, msg=name)


def test_tied_weights_have_one_vector_and_both_uses_count() -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = LlamaConfig(
            vocab_size=61, num_attention_heads=2, tie_word_embeddings=True, **shape
        )
        return LlamaForCausalLM(config)

    model, name = tied(), "model.embed_tokens.weight"
    expected = dense_gradients(tied(), [BATCH])[name].flatten()
    sparsify(model, mask_of(model, 0.3), route="sampled")
    entries = model.sparse.entries[name]
    assert model.lm_head.weight_values is model.model.embed_tokens.weight_values is entries.values
    assert [n for n, _ in model.named_parameters()].count("lm_head.weight_values") == 0
    batch_loss(model, BATCH, "token").backward()
    assert_close(entries.values.grad, expected[entries.index], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        entries.values.add_(1)
        model.lm_head(torch.zeros(1, 16))
    assert model.lm_head.get_parameter("weight") is model.model.embed_tokens.get_parameter("weight")
    assert torch.equal(entries.weight.flatten()[entries.index], entries.values)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_channels_keep_a_part_of_the_inputs_only(family: str) -> None:
    model = tiny_model(family)
    if family == "llama":
        mask, name = channels_mask(model), "model.layers.0.mlp.down_proj.weight"
    else:
        name = "transformer.h.0.mlp.c_proj.weight"
        index = torch.cat([torch.arange(16) + 16 * row for row in (3, 9)])
        mask = WeightMask({name: index}, {name: tuple(base_weights(model)[name].shape)})
    expected = dense_gradients(tiny_model(family), [BATCH])
    sparsify(model, mask)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = batch_loss(model, BATCH, "token")
    n_tokens = BATCH.input_ids.numel()
    n_channels = 3 if family == "llama" else 2
    assert any(t.shape == (n_tokens, n_channels) for t in kept)
    loss.backward()
    assert model.sparse.route.n_dense == 0
    assert model.sparse.routes == {}
    for key, entries in model.sparse.entries.items():
        dense = expected[key].flatten()[entries.index]
        assert_close(entries.values.grad, dense, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1), st.data())
def test_whole_channels_are_found_by_brute_force_too(
    n_rows: int, n_cols: int, axis: int, data: st.DataObject
) -> None:
    weight = torch.zeros(n_rows, n_cols)
    n = (n_rows, n_cols)[axis]
    wanted = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    is_chosen = weight.bool().index_fill(axis, torch.tensor(wanted), 1)
    if data.draw(st.booleans()):  # one entry is another
        place = data.draw(st.integers(0, n_rows * n_cols - 1))
        is_chosen.flatten()[place] ^= True
    index = is_chosen.flatten().nonzero().flatten().int()
    found = whole_channels(index, weight, axis)
    lines = is_chosen.unbind(axis)
    is_whole = index.numel() > 0 and all(bool(c.all()) or not bool(c.any()) for c in lines)
    assert (found is not None) == is_whole
    if found is not None:
        assert found.tolist() == [k for k, c in enumerate(lines) if bool(c.any())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_the_sampled_product_is_the_dense_one(dtype: torch.dtype, n_tokens: int) -> None:
    left, right = torch.randn(n_tokens, 6).to(dtype), torch.randn(n_tokens, 9).to(dtype)
    index = torch.tensor([0, 3, 8, 9, 40, 53], dtype=torch.int32)  # some rows are empty
    found = Pattern.of(index, (6, 9)).sampled(left, right)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    dense = (left.to(exact).T @ right.to(exact)).flatten()[index]
    assert found.dtype == exact
    assert_close(found, dense, rtol=1e-5, atol=1e-6)


class Alive(TorchDispatchMode):
    """Counts tensors of one shape that are made, and how many live at once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = {shape, shape[::-1]}
        self.living: WeakSet[Any] = WeakSet()
        self.n = self.most = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, Tensor) and out.layout == torch.strided and not func.is_view
        if made and tuple(out.shape) in self.shapes:
            self.n += 1
            self.living.add(out.untyped_storage())
            self.most = max(self.most, len(self.living))
        return out


@pytest.mark.parametrize(("route", "n"), [("sampled", 0), ("gather", 1)])
def test_dense_gradients_do_not_exist_or_one_at_a_time(route: Route, n: int) -> None:
    model = tiny_model("llama")
    sparsify(model, mask_of(model, only=is_matrix), route=route)
    loss = batch_loss(model, BATCH, "token")
    with Alive((24, 16)) as alive:  # up, gate and down of two layers
        loss.backward()
    assert alive.most == n
    assert alive.n == 6 * n
    assert model.sparse.route.most_alive == n
    assert model.sparse.route.n_dense == 14 * n


def test_other_modules_gather_one_at_a_time() -> None:
    model = tiny_model("llama")
    sparsify(model, mask_of(model, only=lambda n: "norm" in n or "embed" in n), route="sampled")
    batch_loss(model, BATCH, "token").backward()
    assert (model.sparse.route.most_alive, model.sparse.route.n_dense) == (1, 6)


def ticking(seconds: dict[str, float]) -> Iterator[float]:
    """Return a clock that tells made-up times, in the order that routes are tried."""
    now = 0.0
    while True:
        for name in ("sampled", "gather"):
            yield now
            now += seconds[name]
            yield now


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"sampled": 1.0, "gather": 2.0}, "sampled"),
        ({"sampled": 2.0, "gather": 1.0}, "gather"),
        ({"sampled": 1.05, "gather": 1.0}, "sampled"),  # about as fast, and smaller
    ],
)
def test_auto_keeps_what_the_clock_says(seconds: dict[str, float], expected: str) -> None:
    model = tiny_model("llama")
    sparsify(model, mask_of(model, only=is_matrix))
    clock = ticking(seconds)
    model.sparse.route.clock = lambda: next(clock)
    batch_loss(model, BATCH, "token").backward()
    assert set(model.sparse.routes.values()) == {expected}
    assert "24x16 float32 on cpu, 2^-2 of its entries, 2^6 tokens" in model.sparse.routes
    model.sparse.route.clock = lambda: pytest.fail("it was measured again")
    batch_loss(model, BATCH, "token").backward()


def test_a_choice_that_is_known_is_not_measured() -> None:
    module, index = Conv1D(4, 6), torch.tensor([1, 7], dtype=torch.int32)
    routes = Routes(clock=lambda: pytest.fail("it was measured"))
    routes.chosen["6x4 float32 on cpu, 2^-3 of its entries, 2^2 tokens"] = "gather"
    mask = WeightMask({"weight": index}, {"weight": (6, 4)})
    model = sparsify(module, mask)
    model.sparse.entries["weight"].routes = routes
    model(torch.randn(3, 6)).sum().backward()
    assert routes.n_dense == 1


def test_columns_are_for_whole_channels() -> None:
    model = tiny_model("llama")
    sparsify(model, channels_mask(model), route="columns")
    other = tiny_model("llama")
    with pytest.raises(ConfigError, match="whole input channels") as caught:
        sparsify(other, mask_of(other, only=is_matrix), route="columns")
    assert caught.value.where.endswith("_proj.weight")
    assert not hasattr(other, "sparse")


def test_what_is_no_option_is_refused() -> None:
    with pytest.raises(ConfigError, match='no route "gathr"') as caught:
        refuse_options("gathr", "zero")
    assert '"gather"' in caught.value.do
    with pytest.raises(ConfigError, match='no decay_to "one"'):
        refuse_options("auto", "one")
