"""Gradients of the top layers are the full ones' share, and their backward pass ends there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from loops import loop_gradients
from test_gist import examples
from tiny import tiny_trainable
from torch import Tensor, nn
from torch.testing import assert_close

from selectune.data import collate
from selectune.errors import ConfigError
from selectune.gradients.engine import GradientEngine
from selectune.gradients.kernels import Rows
from selectune.models import blocks
from selectune.pipeline.economy import n_top, only_layers

ITEMS = examples("z", 5, seed=3)


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Count in which blocks linear modules keep something for backward, and which it passes."""
    seen: dict[str, list[int]] = {"kept": [], "passed": []}
    handles = []

    def watch(index: int, module: nn.Module) -> None:
        def after(_: nn.Module, args: object, output: Tensor) -> None:
            if output.requires_grad:
                seen["kept"].append(index)
                output.register_hook(lambda _: seen["passed"].append(index))

        handles.append(module.register_forward_hook(after))

    for index, block in enumerate(blocks(model)):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                watch(index, module)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rows_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return every parameter's gradients, and what the engine's own passes touched."""
    found: dict[str, Tensor] = {}

    def keep(name: str, rows: Rows) -> None:
        found[name] = rows.dense()

    batch = collate(ITEMS, pad_id=0)
    engine = GradientEngine(model)
    engine.probe(batch)
    with counted(model) as seen:
        engine.run(batch, keep)
    return found, seen


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_lower_layers_keep_nothing_and_are_not_passed(kind: str) -> None:
    model = tiny_trainable("llama", kind)
    expected = loop_gradients(model, ITEMS)
    everything, seen = rows_of(model)
    assert set(seen["passed"]) == {0, 1}
    assert everything.keys() == expected.keys()
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    with only_layers(model, "top:1"):
        found, seen = rows_of(model)
    assert set(seen["kept"]) == set(seen["passed"]) == {1}
    assert found.keys() == {n for n in expected if ".layers.1." in n}
    for name, rows in found.items():
        assert_close(rows, expected[name], rtol=1e-4, atol=1e-6)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


@pytest.mark.parametrize(
    ("layers", "n_layers", "n"), [("top:3", 30, 3), ("top:25%", 30, 8), ("top:1%", 4, 1)]
)
def test_layers_are_counted_from_the_last(layers: str, n_layers: int, n: int) -> None:
    assert n_top(layers, n_layers) == n


def test_more_layers_than_there_are_and_layers_without_anything_to_train_are_refused() -> None:
    model = tiny_trainable("llama", "lora")
    with pytest.raises(ConfigError, match="the model has 2 layers"), only_layers(model, "top:3"):
        pass
    for name, p in model.named_parameters():
        p.requires_grad_(".layers.0." in name and "lora" in name)
    with pytest.raises(ConfigError, match="nothing trains"), only_layers(model, "top:1"):
        pass
    assert any(p.requires_grad for p in model.parameters())
