"""Made-up facts about single weights: one that looks real, and its awkward relatives."""

from typing import Any

import numpy as np

from selectune.report.weight_facts import (
    ChosenWeights,
    SharedWeights,
    TransferFacts,
    WeightFacts,
    WeightPlane,
)

_MODULES = {
    "self_attn.q_proj": 4096, "self_attn.k_proj": 1536, "self_attn.v_proj": 1536,
    "self_attn.o_proj": 4096, "mlp.gate_proj": 9216, "mlp.up_proj": 9216, "mlp.down_proj": 9216,
}  # fmt: skip


def chosen_of(
    arm: str, *, n_layers: int = 30, seed: int = 0, about: dict[str, Any] | None = None
) -> ChosenWeights:
    """Return about one percent of a model's weights, more of them in the upper layers."""
    rng = np.random.default_rng(seed)
    eligible = {
        f"model.layers.{layer}.{module}.weight": n
        for layer in range(n_layers)
        for module, n in _MODULES.items()
    }
    chosen = {
        name: int(rng.binomial(n, 0.02 * (k + 1) / len(eligible)))
        for k, (name, n) in enumerate(eligible.items())
    }
    k, n = sum(chosen.values()), sum(eligible.values())
    return ChosenWeights(
        arm=arm,
        eligible=eligible,
        chosen=chosen,
        about={
            "method": "gallop",
            "scope": "global",
            "budget": {"count": k, "density": k / n, "percent_of_model": 0.78, "lora_rank": 3.48},
            "n_zero": 12,
            "silent": [],
            "n_examples": 1024,
            **(about or {}),
        },
        n_moved=k - 7,
    )


def plane_facts(*arms: str, m: int = 40, g: int = 36, zeros: bool = False) -> WeightPlane:
    """Return a cloud of weights of which the first arm chose the upper left, others blindly."""
    rng = np.random.default_rng(1)
    x, y = np.arange(m), np.arange(g)
    cloud = np.exp(-(((x[:, None] - 0.7 * m) / 8) ** 2) - ((y[None] - 0.6 * g) / 7) ** 2)
    eligible = np.zeros((m + 1, g + 1), np.int64)
    eligible[1:, 1:] = (40_000 * cloud).astype(np.int64)
    if zeros:
        eligible[0, 1:], eligible[1:, 0] = 30, 50
    is_left = x[:, None] < y[None] - 4
    chosen: dict[str, np.ndarray] = {}
    for place, arm in enumerate(arms):
        counts = rng.binomial(eligible, 0.01)
        if place == 0:
            counts = np.where(np.pad(is_left, ((1, 0), (1, 0))), eligible, 0)
        chosen[arm] = counts.astype(np.int64)
    return WeightPlane(
        statistic="mean_gradient",
        magnitude=[-6 + k / 8 for k in range(m + 1)],
        gradient=[-7 + k / 8 for k in range(g + 1)],
        eligible=eligible,
        chosen=chosen,
    )


def transfer_of(arm: str, *, scoring: str = "generated", shift: float = 0.0) -> TransferFacts:
    """Return what a method did on five tasks."""
    tasks = ("boolq", "piqa", "siqa", "hellaswag", "obqa")
    values = {
        "id_accuracy": 0.63 + shift, "ood_accuracy": 0.36 + shift, "ood_gain": 0.01 + shift,
        "forget_ratio": max(0.0, -shift), "collapse_percent": 12.5,
    }  # fmt: skip
    if scoring == "likelihood":
        del values["collapse_percent"]
    estimates: dict[str, tuple[float, float, float] | None] = {
        name: (v, v - 0.02, v + 0.03) for name, v in values.items()
    }
    return TransferFacts(
        arm=arm,
        scoring=scoring,
        n_seeds=3,
        base={task: 0.3 + 0.02 * k for k, task in enumerate(tasks)},
        estimates=estimates,
        by_task={task: dict(values) for task in tasks},
    )


def shared_of(first: str, second: str, n_both: int = 6_000) -> SharedWeights:
    return SharedWeights(
        first=first, second=second, n_eligible=1_000_000, n_first=10_000, n_second=10_000,
        n_both=n_both,
    )  # fmt: skip


def weight_facts(*arms: str) -> WeightFacts:
    """Return everything about some arms."""
    pairs = [(a, b) for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return WeightFacts(
        chosen=[chosen_of(arm, seed=k) for k, arm in enumerate(arms)],
        plane=plane_facts(*arms, zeros=True),
        shared=[shared_of(a, b, 6_000 // (1 + k)) for k, (a, b) in enumerate(pairs)],
        transfers=[transfer_of(arm, shift=-0.1 * k) for k, arm in enumerate(arms)],
    )
