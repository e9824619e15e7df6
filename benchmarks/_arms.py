"""What sparse training and merging are measured against: the same base, as many trained numbers."""

import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn

from selectune.adapters.add import quiet
from selectune.data import Tokens, demo_assets
from selectune.models import Base, blocks, load_base
from selectune.recipe import AdapterSection, ModelSection
from selectune.weights import eligible_weights
from selectune.weights.budget import sizes_of

DENSITY = 0.01
T, ANSWER = 96, 24


def load(dtype: str, model: str | None) -> Base:
    """Return a model with weights of one type; SmolLM2-135M by default."""
    section = ModelSection(base=model or str(demo_assets().model), dtype=dtype)
    return load_base(section, adapter=AdapterSection())


def tokens(k: int) -> Tokens:
    """Return an example of 96 random tokens, of which the last 24 are targets."""
    ids = torch.randint(3, 49_000, (T,), generator=torch.Generator().manual_seed(k)).numpy()
    return Tokens(f"e{k}", ids, (torch.arange(T) >= T - ANSWER).numpy())


def lora(model: nn.Module, count: int) -> PeftModel:
    """Put a LoRA of about `count` numbers on every matrix of the layers, with trained-looking B.

    No one rank has as many as 1 % of the weights, so the first layers have one rank more.
    """
    per_rank, n_layers = _per_rank(model), len(blocks(model))
    rank = count // per_rank
    n_more = round((count - rank * per_rank) / (per_rank / n_layers))
    more = "|".join(str(k) for k in range(n_more))
    pattern = {rf"layers\.({more})\..*": rank + 1} if n_more else {}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, rank_pattern=pattern, target_modules=_names(model)
    )
    return _adapted(model, config, "lora_B")


def shira(model: nn.Module, count: int, seed: int = 0) -> PeftModel:
    """Put peft's SHiRA on the same matrices; its rank is one for all, here the nearest."""
    return _adapted(model, shira_config(model, count, seed), "shira_weight")


def shira_config(model: nn.Module, count: int, seed: int) -> ShiraConfig:
    """Return a SHiRA of about `count` random entries."""
    rank = round(count / _per_rank(model))
    return ShiraConfig(r=rank, target_modules=_names(model), random_seed=seed)


def fill(model: nn.Module, part: str, seed: int) -> None:
    """Give the adapters values as after some training: they start at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.normal_(0, 1e-3)


def clock(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes, on the device too."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _adapted(model: nn.Module, config: LoraConfig | ShiraConfig, part: str) -> PeftModel:
    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, but without a warning
    with quiet():
        adapted = get_peft_model(model, config)
    fill(adapted, part, 0)
    return adapted


def _names(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name in eligible_weights(model, "layers")]


def _per_rank(model: nn.Module) -> int:
    return sizes_of(model, eligible_weights(model, "layers")).per_rank
