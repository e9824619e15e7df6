"""The owner's whole job in small: two folders, resumed, repeated, and never written over."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selectune.data import Example, read_examples
from selectune.errors import ConfigError, DataError, IncompatibleRunError, SelectionError
from selectune.files import open_dir
from selectune.methods.compressors.gradot import GradOT
from selectune.models import fingerprint
from selectune.offsite import compression
from selectune.offsite.emulate import Emulated, emulate
from selectune.offsite.loading import load_emulator
from selectune.offsite.package import OWNER_KIND
from selectune.offsite.statistics import LayerStatistics
from selectune.registry import methods
from workspace import byte_tokenizer, question

TEXTS = [f"secret paragraph {k}: the owl sees {k * k} stars" for k in range(30)]
HOW: dict[str, Any] = {
    "adapters": [0, -1],
    "calibration_blocks": 5,
    "block_tokens": 24,
    "probe_examples": 2,
    "token_budget": 72,
}
OPTIONS = {"layer_drop_distilled": {"steps": 2}}


def small_model() -> LlamaForCausalLM:
    """Return a random model of six layers that reads bytes."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(out: Path, **how: object) -> Emulated:
    return emulate(small_model(), TEXTS, out, tokenizer=byte_tokenizer(), **{**HOW, **how})


def weights(out: Path) -> str:
    """Return a fingerprint of what a package computes with."""
    return fingerprint(load_emulator(out / "package").state_dict())


def record(out: Path) -> dict[str, Any]:
    """Return what an owner keeps on record."""
    return json.loads((out / "owner/owner.json").read_bytes())["about"]


@pytest.mark.parametrize("method", [entry.name for entry in methods("compressor")])
def test_every_compressor_makes_a_package_that_loads(method: str, tmp_path: Path) -> None:
    found = made(tmp_path, compressor=method, options=OPTIONS.get(method))
    assert found.about["method"] == method
    loaded = load_emulator(tmp_path / "package")
    n = sum(p.numel() for p in loaded.parameters())
    ratios = found.about["quality"]["ratios"]
    assert (ratios["n_emulator"], ratios["n_original"]) == (n, 54752)
    assert 0 < ratios["middle"] < 1
    assert not (tmp_path / "work").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["owner", "package"]


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_the_number_of_layers_at_once_changes_nothing(budget: str, tmp_path: Path) -> None:
    for name, at_once in (("one", 1), ("three", 3), ("all", None)):
        made(tmp_path / name, budget=budget, layers_at_once=at_once)
    assert weights(tmp_path / "one") == weights(tmp_path / "three") == weights(tmp_path / "all")


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_what_was_finished_before_a_crash_is_not_done_again(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "whole", budget=budget, layers_at_once=1)
    seen: list[int] = []
    collect = compression.collect

    def collected(
        model: object, batches: object, layers: list[int], **how: object
    ) -> dict[int, LayerStatistics]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(layers)
        return collect(model, batches, layers, **how)

    monkeypatch.setattr(compression, "collect", collected)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "broken", budget=budget, layers_at_once=1)
    assert seen == [4, 3]
    assert not (tmp_path / "broken" / "package").exists()
    seen.append(0)  # no third crash
    made(tmp_path / "broken", budget=budget, layers_at_once=1)
    assert seen[3:] == [2, 1]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    about = [record(tmp_path / name) for name in ("whole", "broken")]
    assert [one["cost"]["is_resumed"] for one in about] == [False, True]


def test_the_same_call_again_gives_back_what_is_there(tmp_path: Path) -> None:
    first = made(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    again = made(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == before
    assert again.to_json() == first.to_json()


@pytest.mark.parametrize("change", [{"keep_mlp": 0.5}, {"seed": 1}, {"compressor": "random"}])
def test_a_package_does_not_give_way_to_another(change: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(IncompatibleRunError, match="holds another emulator"):
        made(tmp_path, **change)


def test_nothing_of_text_and_record_is_in_the_package(tmp_path: Path) -> None:
    made(tmp_path)
    about = record(tmp_path)
    told = [about["base"], about["calibration"], about["made_of"], "gradot", "secret paragraph"]
    for file in (tmp_path / "package").rglob("*"):
        content = file.read_bytes()
        assert not any(str(word).encode() in content for word in told), file
    assert [layer["original"] for layer in about["layers"]] == [1, 2, 3, 4]
    assert "secret paragraph" not in json.dumps(about)


def test_questions_are_asked_of_both(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [question("colours", rng) for _ in range(4)]
    asked: dict[str, tuple[Example, ...]] = {"colours": tuple(read_examples(rows))}
    found = made(tmp_path, questions=asked, heal_steps=2)
    quality = found.about["quality"]
    assert quality["answers"]["colours"]["emulator"]["n"] == 4
    assert quality["healed_loss_nats"] != quality["losses_nats"]["emulator"]
    assert any(line.lstrip().startswith("colours") for line in found.lines())
    assert any(line.startswith("healed") for line in found.lines())


def test_an_instance_is_its_name_and_options(tmp_path: Path) -> None:
    options = {"lambda_mlp": 0.3}
    made(tmp_path / "named", options=options)
    made(tmp_path / "given", compressor=GradOT(**options))
    assert weights(tmp_path / "named") == weights(tmp_path / "given")
    meta = [open_dir(tmp_path / n / "owner", kind=OWNER_KIND).meta for n in ("named", "given")]
    assert meta[0] != meta[1]  # each package has an id of its own


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"adapters": [0, 6]}, SelectionError, "there is no layer 6"),
        ({"adapters": list(range(6))}, SelectionError, "all 6 layers"),
        ({"keep_attention": 1.0, "keep_mlp": 1.0}, SelectionError, "would be the model itself"),
        ({"keep_attention": 0.01}, SelectionError, "leaves rank 0"),
        ({"compressor": "gradott"}, ConfigError, 'did you mean "gradot"'),
        ({"options": {"lambda": 1}}, ConfigError, '"lambda" is no option'),
        ({"compressor": GradOT(), "options": {"protect": 0.1}}, ConfigError, "would not be used"),
        ({"block_tokens": 5000}, DataError, "too few for 2 blocks"),
        ({"compressor": "crash", "budget": "global"}, ConfigError, "global would not be used"),
    ],
    ids=["index", "all", "ratios", "rank", "name", "option", "instance", "text", "budget"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    how: dict[str, Any], error: type[Exception], says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(compression, "collect", never)
    with pytest.raises(error, match=says):
        made(tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
