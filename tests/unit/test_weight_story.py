"""Masks, deltas and transfers become what the page shows."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokens

from selectune import weights
from selectune.errors import SelectionError
from selectune.evaluation.transfer import RoundRobin, transfer
from selectune.pipeline.weight_story import tell_weights
from selectune.report.weights import trained
from selectune.weights.delta import SparseDelta
from selectune.weights.mask import WeightMask
from selectune.weights.plane import plane_of


def delta_of(mask: WeightMask, sign: float) -> SparseDelta:
    return SparseDelta(
        indices=mask.indices,
        deltas={name: torch.full((len(i),), sign) for name, i in mask},
        shapes=mask.shapes,
        dtypes=dict.fromkeys(mask.shapes, "float32"),
        base=mask.base,
    )


def test_everything_found_is_told() -> None:
    model = tiny_model("llama")
    scores = weights.GaLLoP(density=0.05).score(model, tiny_tokens(5))
    masks = {
        "selected": scores.select(),
        "low": weights.LowMagnitude(density=0.05).score(model).select(),
        "random": weights.Random(density=0.1).score(model).select(),
    }
    rng = np.random.default_rng(0)
    rounds = RoundRobin(
        ("t", "u"), "generated", (("1", "2"), ("3",)),
        (rng.integers(0, 2, (2, 1, 2)) * 1.0, rng.integers(0, 2, (2, 1, 1)) * 1.0),
        (np.ones(2), np.ones(1)),
    )  # fmt: skip
    facts = tell_weights(
        masks,
        plane=plane_of(scores, masks).to_json(),
        moved={"selected": 3},
        deltas={"selected": delta_of(masks["selected"], 1.0), "low": delta_of(masks["low"], -1.0)},
        transfers={"lora": transfer(rounds, n_boot=20)},
    )
    assert facts is not None
    first = facts.chosen[0]
    assert (first.arm, first.n_chosen, first.n_moved) == ("selected", masks["selected"].n_chosen, 3)
    assert first.n_eligible == masks["selected"].n_eligible
    assert {n: k / first.eligible[n] for n, k in first.chosen.items()} == {
        n: d for n, d in masks["selected"].densities().items() if d
    }
    assert first.about["method"] == "gallop"
    assert facts.plane is not None
    for arm, mask in masks.items():
        assert facts.plane.chosen[arm].sum() == mask.n_chosen
    pairs = {(p.first, p.second): p for p in facts.shared}
    assert [*pairs] == [("selected", "low"), ("selected", "random"), ("low", "random")]
    for (a, b), pair in pairs.items():
        assert pair.n_both == (masks[a] & masks[b]).n_chosen
        assert pair.n_eligible == masks[a].n_eligible
    assert pairs["selected", "low"].sign_agreement == 0
    assert pairs["low", "random"].sign_agreement is None
    assert facts.transfers[0].arm == "lora"
    assert set(facts.transfers[0].base) == {"t", "u"}
    told = trained(facts) or ""
    for words in ("Arm: <bdi>selected", "Where are they?", "Are they small?", "Do methods choose",
                  "What did they do to other tasks?"):  # fmt: skip
        assert words in told


def test_no_weights_and_no_transfer_tell_nothing() -> None:
    assert tell_weights({}) is None


def test_masks_of_two_bases_are_refused() -> None:
    one = WeightMask({"a": torch.tensor([0])}, {"a": (2,)}, "base")
    other = WeightMask({"a": torch.tensor([0])}, {"a": (2,)}, "another")
    with pytest.raises(SelectionError, match="different base models"):
        tell_weights({"x": one, "y": other})
