"""Means of hidden states equal a loop over unpadded examples, and so do RDS+ and embedding."""

import numpy as np
import pytest
import torch
from slow_gist import slow_cosine
from test_gist import examples
from tiny import FAMILIES, tiny_model, tiny_trainable
from torch import nn

from selectune.data import Tokens, collate
from selectune.errors import CoverageError
from selectune.gradients.states import mean_states, state_similarity
from selectune.methods.evidence import Evidence
from selectune.registry import get


def slow_states(model: nn.Module, example: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Return both means of one example's last hidden states."""
    ids = torch.as_tensor(example.input_ids)[None]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
    weighted, plain = torch.zeros(states.shape[1]), torch.zeros(states.shape[1])
    n = len(states)
    for t, h in enumerate(states, start=1):
        weighted = weighted + t / (n * (n + 1) / 2) * h
        plain = plain + h / n
    return weighted.numpy(), plain.numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_means_equal_the_loop_in_every_family(family: str, side: str) -> None:
    model, items = tiny_model(family), examples("z", 5, seed=1)
    with torch.no_grad():
        found = mean_states(model, collate(items, pad_id=0, side=side), "float32")
    for n, item in enumerate(items):
        for k, expected in enumerate(slow_states(model, item)):
            np.testing.assert_allclose(found[k, n].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "which"), [("rds", 0), ("embedding", 1)])
@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_scores_equal_the_loop(method: str, which: int, aggregate: str) -> None:
    model = tiny_trainable("llama", "lora")
    pool, targets = examples("z", 7, seed=1), examples("v", 3, seed=2)
    facts = state_similarity(
        model, pool, targets, groups=["", "", ""], pad_id=0, precision="float32", token_budget=25
    )
    entry = get("data_scorer", method)
    evidence = Evidence(tuple(t.id for t in pool), np.ones(7, int), states=facts)
    scores = entry.function(evidence, entry.parse({"aggregate": aggregate}))
    aims = [slow_states(model, t)[which] for t in targets]
    for n, item in enumerate(pool):
        h = slow_states(model, item)[which]
        cosines = [slow_cosine(h, a) for a in aims]
        expected = max(cosines) if aggregate == "max" else sum(cosines) / 3
        assert scores.score[n] == pytest.approx(expected, abs=1e-5)
        assert scores.best_target[n] == f"v{int(np.argmax(cosines))}"


def test_a_model_without_a_head_is_refused() -> None:
    backbone = tiny_model("llama").model
    with pytest.raises(CoverageError, match="one hidden state per token"):
        mean_states(backbone, collate(examples("z", 2, seed=1), pad_id=0), "float32")
