"""From scorers to masks: options, budgets, evidence that stays at hand, and refusals."""

import logging
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokens, tiny_trainable
from torch import Tensor, nn

import selectune
from selectune import registry, weights
from selectune.errors import ConfigError, SelectionError, TrainingError
from selectune.registry import Entry
from selectune.weights.mask import WeightMask
from selectune.weights.options import TensorEvidence
from selectune.weights.scorer import WeightScorer
from selectune.weights.scores import WeightScores
from workspace import byte_tokenizer, save_model

POOL = tiny_tokens(9, seed=4)
ENTRIES = registry.methods("weight_scorer")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_scorer_says_what_a_user_needs(entry: Entry) -> None:
    assert entry.summary.endswith(".")
    assert entry.paper
    assert entry.cost
    assert entry.fails
    assert Path(sys.modules[entry.function.__module__].__file__ or "").stem == entry.name
    assert issubclass(entry.options, WeightScorer)
    assert getattr(weights, entry.options.__name__) is entry.options
    assert entry.options.__name__ in weights.__all__
    default = entry.options()
    plain = {f.name: getattr(default, f.name) for f in fields(default)}
    assert entry.parse(plain) == default
    assert entry.parse({"density": 0.5, "eligible": ["q_proj"]}).eligible == ["q_proj"]
    with pytest.raises(FrozenInstanceError):
        default.density = 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": -0.1}, "density"),
        ({"percent_of_model": 100.0}, "percent_of_model"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"count": 0}, "count"),
        ({"examples": 0}, "examples"),
        ({"eps": 0.0}, "eps"),
        ({"floor": 2.0}, "floor"),
        ({"density": 0.1, "count": 3}, "2 budgets were given: density, count"),
        ({"floor": 0.1, "scope": "per_tensor"}, 'floor has no meaning with scope="per_tensor"'),
        ({"ceiling": 0.1, "threshold": "sampled"}, 'ceiling needs threshold="exact"'),
    ],
    ids=str,
)
def test_wrong_options_are_refused_where_they_are_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        weights.GaLLoP(**options)
    with pytest.raises(ConfigError, match=words):
        registry.get("weight_scorer", "gallop").parse(options)


@pytest.mark.parametrize(
    "options",
    [{"scope": "layer"}, {"eligible": "attention"}, {"threshold": "approximate"}, {"dnsity": 0.1}],
    ids=str,
)
def test_wrong_words_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        registry.get("weight_scorer", "gallop").parse(options)


def test_importing_selectune_waits_for_no_torch() -> None:
    code = (
        "import sys, selectune, selectune.weights as w\n"
        "assert 'torch' not in sys.modules and 'GaLLoP' in w.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(weights, name) for name in weights.__all__)
    with pytest.raises(AttributeError, match="no attribute 'GaLLop'"):
        _ = weights.GaLLop


def test_scores_stay_at_hand() -> None:
    model = tiny_model("llama")
    passes: list[int] = []
    scores = weights.GaLLoP(density=0.01).score(model, POOL, advance=passes.append)
    n = len(passes)
    small, large = scores.select(), scores.select(density=0.02)
    assert len(passes) == n
    assert len(small) == int(0.01 * len(scores))
    assert len(large) == int(0.02 * len(scores))
    assert len(small & large) == len(small)
    assert small == scores.select()
    assert small.base == scores.base
    assert "gallop" in repr(scores)
    assert "9 examples" in repr(scores)


def test_a_mask_tells_how_it_came_about() -> None:
    model = tiny_model("llama")
    scores = weights.GaLLoP(lora_rank=2, seed=5, examples=4).score(model, POOL)
    mask = scores.select()
    about = mask.about
    assert about["method"] == "gallop"
    assert about["options"]["lora_rank"] == 2
    assert about["options"]["seed"] == 5
    assert about["scope"] == "global"
    assert about["n_examples"] == 4
    assert about["n_zero"] == 0
    per_rank = sum(sum(w.parameter.shape) for w in scores.weights.values())
    n_model = sum(p.numel() for p in model.parameters())
    assert about["budget"] == {
        "count": 2 * per_rank,
        "density": 2 * per_rank / len(scores),
        "percent_of_model": 100 * 2 * per_rank / (n_model + 2 * per_rank),
        "lora_rank": 2.0,
    }
    other = weights.GaLLoP(examples=4, seed=6).score(model, POOL).select()
    assert other.about["examples"] != about["examples"]
    assert sum(d > 0 for d in mask.densities().values()) == len(mask.indices)


def test_a_mask_is_saved_with_all_it_tells(tmp_path: Path) -> None:
    mask = weights.SNIP().score(tiny_model("llama"), POOL).select()
    again = WeightMask.load(mask.save(tmp_path / "mask"))
    assert again == mask
    assert again.about == mask.about


@pytest.mark.parametrize("name", ["low_magnitude", "high_magnitude", "random", "s2ft"])
def test_scorers_without_evidence_need_no_data(name: str) -> None:
    entry = registry.get("weight_scorer", name)
    model = tiny_model("gemma")
    mask = entry.options(density=0.1).score(model).select()
    assert mask == entry.options(density=0.1).score(model, POOL).select()
    assert mask.about["n_examples"] == 0


def test_missing_evidence_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="gallop needs examples") as caught:
        weights.GaLLoP().score(model)
    assert "mean gradient" in caught.value.why
    with pytest.raises(ConfigError, match="lota needs the model after full fine-tuning"):
        weights.LoTA().score(model)


@pytest.mark.parametrize("name", ["gallop", "random"])
def test_a_model_with_chosen_entries_is_not_scored(name: str) -> None:
    model = tiny_model("llama")
    mask = weights.Random(density=0.1).score(model).select()
    scorer = registry.get("weight_scorer", name).parse({})
    with pytest.raises(SelectionError, match="chosen entries already"):
        scorer.score(selectune.sparsify(model, mask), POOL)


def test_weights_that_changed_are_not_chosen_from() -> None:
    model = tiny_model("llama")
    scores = weights.GaLLoP().score(model, POOL)
    scores.select()
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] += 1
    with pytest.raises(SelectionError, match="has changed since it was scored"):
        scores.select()
    model = tiny_model("llama")
    scores = weights.LowMagnitude().score(model)
    with pytest.raises(SelectionError, match="has changed since it was scored"):
        model.to(torch.bfloat16) and scores.select()


def test_weights_that_are_no_number_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] = torch.nan
    with pytest.raises(SelectionError, match=f"a score of {UP} is not a number"):
        weights.HighMagnitude().score(model).select()
    with pytest.raises(TrainingError, match="not a number"):
        weights.GaLLoP().score(model, POOL)


def test_bounds_keep_every_tensor_in_range() -> None:
    scores = weights.SAFT(density=0.1).score(tiny_model("llama"), POOL)
    free = scores.select().densities().values()
    assert min(free) < 0.05
    assert max(free) > 0.15
    mask = scores.select(floor=0.05, ceiling=0.15)
    assert len(mask) == len(scores.select())
    for name, share in mask.densities().items():
        n = scores.weights[name].parameter.numel()
        assert int(0.05 * n) / n <= share <= 0.15 + 1 / n
    with pytest.raises(SelectionError, match=r"do not fit between a floor of 0.2"):
        scores.select(floor=0.2)
    with pytest.raises(SelectionError, match=r"a ceiling of 0.05"):
        scores.select(ceiling=0.05)


def test_a_sampled_threshold_says_what_it_achieved() -> None:
    scores = weights.GaLLoP(density=0.1, threshold="sampled", sample=2000).score(
        tiny_model("llama"), POOL
    )
    mask = scores.select()
    assert abs(mask.density / 0.1 - 1) < 4 / (0.1 * 2000) ** 0.5
    assert mask.about["budget"]["count"] == len(mask)
    exact = scores.select(threshold="exact")
    assert len(mask & exact) == min(len(mask), len(exact))
    assert scores.select(sample=10**7) == exact


@pytest.mark.parametrize("scope", ["global", "per_layer", "per_tensor"])
def test_everything_can_be_chosen(scope: str) -> None:
    scores = weights.GaLLoP(density=1.0, scope=scope).score(tiny_model("qwen2"), POOL)
    assert len(scores.select()) == len(scores)
    assert not scores.select().complement().indices


def test_a_budget_below_one_weight_per_tensor_is_refused() -> None:
    scores = weights.HighMagnitude(count=3).score(tiny_model("llama"))
    with pytest.raises(SelectionError, match="not one weight of any tensor") as caught:
        scores.select()
    assert 'scope="global"' in caught.value.do
    assert len(scores.select(scope="global")) == 3


def test_zeros_that_win_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(UP).zero_()
    scorer = weights.LowMagnitude(count=300)
    with caplog.at_level(logging.INFO):
        mask = scorer.score(model).select()
    assert mask.about["n_zero"] == 300
    assert "300 of them are exactly 0" in caplog.text
    assert "300 of 300 chosen weights are exactly 0" in caplog.text


def test_relative_eps_is_in_units_of_the_tensor() -> None:
    model = tiny_model("llama")
    scorer = weights.GaLLoP(eps=0.5, relative_eps=True)
    scores = scorer.score(model, POOL)
    w, g = model.get_parameter(UP), scores.statistics.values["mean_gradient"][UP]
    expected = g.abs() / (w.abs() + 0.5 * w.square().mean().sqrt())
    torch.testing.assert_close(scores.of(UP), expected.detach())


def test_channels_of_both_layouts_train_as_a_whole() -> None:
    for family, name, axis in (
        ("llama", "model.layers.0.mlp.down_proj.weight", 1),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", 0),
    ):
        mask = weights.S2FT(density=0.5).score(tiny_model(family)).select()
        assert name in mask.shapes
        assert len(mask.shapes) == 2
        dense = torch.zeros(mask.shapes[name], dtype=torch.bool)
        dense.view(-1)[mask.indices[name].long()] = True
        channels = dense.any(1 - axis)
        assert torch.equal(dense.all(1 - axis), channels)
        assert 0 < channels.sum() < len(channels)


def test_channels_need_a_linear_map() -> None:
    model = tiny_model("llama")
    mask = weights.S2FT(eligible=["up_proj"]).score(model).select(density=0.2)
    assert set(mask.shapes) == {f"model.layers.{k}.mlp.up_proj.weight" for k in (0, 1)}
    with pytest.raises(SelectionError, match=r"model.norm.weight has no input channels"):
        weights.S2FT(eligible=["model.norm"]).score(model)
    model.model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    with pytest.raises(SelectionError, match="no down projection"):
        weights.S2FT().score(model)


def test_a_matched_random_mask_has_the_same_counts() -> None:
    mask = weights.GaLLoP(density=0.05).score(tiny_model("llama"), POOL).select()
    one, other = weights.random_matched(mask), weights.random_matched(mask, seed=1)
    assert one.densities() == other.densities() == mask.densities()
    assert one == weights.random_matched(mask)
    assert one != other
    assert one.base == mask.base
    assert one.about["matched"] == "gallop"
    assert len(one & mask) < 0.3 * len(mask)


def test_random_places_are_spread_evenly() -> None:
    weight, counts = torch.zeros(24, 16), torch.zeros(24, 16)
    for seed in range(200):
        draw = weights.Random(seed=seed).values(weight, TensorEvidence(UP, False, {}))
        counts += draw >= draw.flatten().kthvalue(288 + 1).values
    # Binomial(200, 1/4): mean 50, standard deviation 6.1; the largest of 384 stays within 4.5.
    assert counts.sum() == 200 * 96
    assert (counts - 50).abs().max() < 4.5 * 6.1


def test_a_new_scorer_is_one_function() -> None:
    @registry.weight_scorer("steady", needs={"mean_gradient", "square_gradient"})
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Steady(WeightScorer):
        """Signal to noise."""

        def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
            found = evidence.values
            return found["mean_gradient"].square() / (found["square_gradient"] + 1e-12)

    try:
        scores = Steady(count=50).score(tiny_model("llama"), POOL)
        assert len(scores.select()) == 50
        assert bool((scores.of(UP) <= 1 + 1e-3).all())  # Jensen
    finally:
        registry._entries["weight_scorer"].pop("steady")


def test_drift_comes_from_a_model_or_its_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    save_model(tmp_path / "tuned", seed=1)
    from transformers import AutoModelForCausalLM

    base, tuned = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("base", "tuned"))
    mask = weights.LoTA().score(base, tuned=tuned).select()
    assert mask == weights.LoTA().score(base, tuned=tmp_path / "tuned").select()
    assert mask.density == pytest.approx(0.1, abs=1e-4)


ROWS = [{"prompt": f"{k} + 1 =", "completion": f" {k + 1}"} for k in range(8)]


def test_data_comes_in_every_form_of_a_pool(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    Dataset.from_list(ROWS).to_json(str(file))
    scorer = weights.GaLLoP(density=0.05)
    mask = scorer.score(model, ROWS).select()  # the tokenizer is found where the model came from
    assert mask == scorer.score(model, Dataset.from_list(ROWS), tokenizer=byte_tokenizer()).select()
    assert mask == scorer.score(model, file).select()
    assert mask.about["n_examples"] == 8


def test_cut_examples_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        weights.GaLLoP().score(model, ROWS, max_length=8)
    assert "8 examples were cut to 8 tokens" in caplog.text


def test_an_adapter_does_not_change_names_or_base() -> None:
    scorer = weights.LowMagnitude(count=40)
    bare = scorer.score(tiny_model("llama")).select()
    assert scorer.score(tiny_trainable("llama", "lora")).select() == bare


def test_scores_of_one_tensor_can_be_asked_for() -> None:
    scores: WeightScores = weights.SAFT().score(tiny_model("llama"), POOL)
    assert scores.of(UP).shape == (24, 16)
    assert next(iter(scores.weights)) == "model.layers.0.self_attn.q_proj.weight"
