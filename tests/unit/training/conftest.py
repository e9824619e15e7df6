import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from selectune.data.tokens import Tokens
from selectune.recipe import TuneSection
from selectune.training import TuneResult, tune
from selectune.training.layers import trainable_layers
from selectune.training.method import Method, Scene, Session

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, pad_token_id=0, **shape)
    return LlamaForCausalLM(config).to(dtype)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep a warning of transformers 5.24 about peft 0.21 from failing a test.

    peft reads `is_gradient_checkpointing`; the release that reads the new name ends this.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def tiny_lora(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    model = tiny_llama(dtype)
    torch.manual_seed(1)
    options = {"lora_dropout": 0.2, **options}
    config = LoraConfig(r=2, target_modules=MODULES, **options)
    with quiet_peft():
        return get_peft_model(model, config)


def tiny_items(n: int = 11) -> list[Tokens]:
    rng = np.random.default_rng(0)
    items = []
    for i in range(n):
        ids = rng.integers(1, 63, rng.integers(4, 12))
        is_target = np.zeros(len(ids), dtype=bool)
        is_target[-int(rng.integers(1, 4)) :] = True
        items.append(Tokens(f"example-{i}", ids.astype(np.int64), is_target))
    return items


def section(**changes: object) -> TuneSection:
    usual = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "save_every": 2}
    return TuneSection(**{**usual, **changes})


def weights(path: Path) -> bytes:
    return (path / "adapter_model.safetensors").read_bytes()


@dataclass(frozen=True, slots=True)
class Flicker(Method):
    """A layer sampler in small: one layer at a time, at random, so that a draw has to be kept."""

    fails_at: int | None = None

    def start(self, scene: Scene) -> Session:
        return FlickerSession(self, scene)


class FlickerSession:
    def __init__(self, options: Flicker, scene: Scene) -> None:
        self.options, self.layers = options, trainable_layers(scene.model)
        self.generator = torch.Generator().manual_seed(scene.seed)
        self.counts = torch.zeros(len(self.layers))
        self.active = 0
        assert scene.pool is not None
        self.n = (scene.pool.n, scene.target.n if scene.target else 0)
        self.seen: list[str] = []

    def begin_step(self, step: int) -> None:
        if step == self.options.fails_at:
            raise ZeroDivisionError
        self.active = int(torch.randint(len(self.layers), (), generator=self.generator))
        self.counts[self.active] += 1
        self.seen = []
        for k, layer in enumerate(self.layers):
            for p in layer.parameters.values():
                p.requires_grad_(k == self.active)

    def expect(self, labels: Tensor, ids: Sequence[str] = ()) -> None:
        assert len(labels) == len(ids)
        self.seen += ids

    def end_step(self) -> dict[str, Any]:
        importance = [float("nan"), *self.counts.tolist()[1:]]
        return {"active": [self.active], "importance": importance, "examples": self.seen}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"n": list(self.n)}, {"rng": self.generator.get_state(), "counts": self.counts}

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert facts["n"] == list(self.n)
        self.generator.set_state(tensors["rng"])
        self.counts = tensors["counts"]

    def close(self) -> None:
        for layer in self.layers:
            for p in layer.parameters.values():
                p.requires_grad_(True)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., TuneResult]:
    """Call `tune` on a fresh tiny model; every argument can be replaced."""

    def call(output: str = "run", model: nn.Module | None = None, **changes: object) -> TuneResult:
        given: dict[str, Any] = {
            "items": tiny_items(),
            "options": section(),
            "seed": 3,
            "pad_id": 0,
            "precision": "float32",
            "device": "cpu",
            "fingerprint": "base",
            "name": "gist",
            "log": lambda row: None,
            **changes,
        }
        return tune(model or tiny_lora(), output=tmp_path / output, **given)

    return call


@pytest.fixture
def tiny() -> ModuleType:
    """Return this module's builders, as tests cannot import a conftest."""
    return sys.modules[__name__]
