"""Recipes in which the chosen weights change while they train."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from selectune.errors import ConfigError
from selectune.pipeline.run import Run
from selectune.recipe import load_recipe
from selectune.weights import SparseDelta, WeightMask, merge
from small_run import small_recipe

MASK = "{method: random, density: 0.1, decay_to: base}"


def run(folder: Path, *overrides: str) -> Run:
    if not (folder / "recipe.yaml").exists():
        small_recipe(folder)
    found = load_recipe(folder / "recipe.yaml", overrides)
    made = Run(found, out=Path(found.output))
    made.all()
    return made


@pytest.mark.parametrize(("method", "trainer"), [("spiel_ag", "transformers"), ("spiel_ma", "trl")])
def test_entries_change_and_a_broken_training_ends_in_the_same_bytes(
    tmp_path: Path, method: str, trainer: str
) -> None:
    words = (
        "score.method=random", f"tune.weights={MASK}", f"tune.method={method}",
        "tune.options={every: 3, accumulate: 1}", f"tune.trainer={trainer}", "tune.controls=[]",
        "tune.save_every=1", "tune.keep_checkpoints=9", "tune.weight_decay=0.5",
    )  # fmt: skip
    run(tmp_path, *words)
    arm = tmp_path / "run/tune/selected"
    whole = (arm / "adapter/sparse.safetensors").read_bytes()
    steps = sorted(int(p.name.split("-")[1]) for p in arm.glob("checkpoint-*"))
    assert len(steps) > 4
    for kept in (steps[2], steps[-1]):  # in a phase; and between last checkpoint and adapter
        shutil.rmtree(arm / "adapter")
        for step in steps:
            if step > kept:
                shutil.rmtree(arm / f"checkpoint-{step}", ignore_errors=True)
        run(tmp_path, *words)
        assert (arm / "adapter/sparse.safetensors").read_bytes() == whole
    run(tmp_path, *words)  # finished: the delta is loaded, with its own entries

    delta, start = (
        SparseDelta.load(arm / "adapter"),
        WeightMask.load(tmp_path / "run/mask/selected"),
    )
    assert len(delta) == start.n_chosen
    assert delta.about["reselected_by"] == method
    assert (delta.mask() & start).n_chosen < 0.5 * start.n_chosen
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "reselected" in line]
    assert [line["step"] for line in told] == [1, 4]
    assert told[0]["reselected"]["share"] == 1
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: p.clone() for name, p in base.state_dict().items()}
    for name, after in merge(base, delta).state_dict().items():
        places = (after != before[name]).flatten().nonzero().flatten()
        chosen = delta.indices.get(name, torch.zeros(0, dtype=torch.int32))
        assert torch.isin(places, chosen.long()).all()


def test_an_optimizer_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adafactor would not be used"):
        run(tmp_path, f"tune.weights={MASK}", "tune.method=spiel_ag", "tune.optimizer=adafactor")
