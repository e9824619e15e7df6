"""A delta as a SHiRA adapter: peft loads it to the same weights and logits."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.shira import Linear as ShiraLinear
from safetensors.torch import load_file
from torch import Tensor, nn

from selectune.adapters.add import quiet
from selectune.errors import CoverageError, IncompatibleRunError, StorageError, TrainingError
from selectune.weights.delta import SparseDelta
from selectune.weights.merging import merge, unmerge
from selectune.weights.shira import export_shira
from unit.weights.deltas import assert_same_bits, bits, tiny_delta, tiny_model

# torch 2.13 says this once per process of every sparse tensor; peft 0.21 makes some.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

HALF = torch.bfloat16
IDS = torch.arange(20).view(2, 10)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_peft(model: nn.Module, folder: Path) -> PeftModel:
    with quiet():
        return PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_peft_computes_the_logits_of_the_merged_model(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    model = tiny_model(dtype)
    delta = tiny_delta(model, density=0.1, names="proj", dtype=stored)
    export_shira(delta, tmp_path / "shira", model)
    expected = logits(merge(model, delta))
    bare = logits(unmerge(model))
    found = logits(in_peft(model, tmp_path / "shira"))
    assert torch.equal(found, expected)
    assert not torch.equal(found, bare)


def test_peft_merges_it_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model(HALF)
    delta = tiny_delta(model, names="proj")
    export_shira(delta, tmp_path / "shira", model)
    theirs = in_peft(tiny_model(HALF), tmp_path / "shira").merge_and_unload()
    assert_same_bits(theirs, bits(merge(model, delta)))


def test_every_module_has_the_entries_of_one_rank(tmp_path: Path) -> None:
    model = tiny_model()
    delta = tiny_delta(model, density=0.2, names="mlp")
    made = export_shira(delta, tmp_path / "shira", model)
    tensors = load_file(tmp_path / "shira" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "shira" / "adapter_config.json").read_text())
    assert config["r"] == made.rank == 2  # 77 of 16 x 24: two times 40 entries
    held = {n: t for n, t in tensors.items() if n.endswith("shira_weight")}
    assert {t.numel() for t in held.values()} == {80}
    assert made.n_stored == sum(t.numel() for t in held.values()) == 480
    assert made.n_entries == delta.n_entries == 6 * 77
    assert made.growth == 480 / 462
    for name, values in held.items():
        rows = tensors[name.replace("weight", "indices")].long()
        places = rows[0] * delta.shapes[_parameter(name)][1] + rows[1]
        assert len(places.unique()) == 80  # each place once
        kept = torch.isin(places, delta.indices[_parameter(name)].long())
        assert torch.equal(values[kept], delta.deltas[_parameter(name)])
        assert values[~kept].count_nonzero() == 0


def _parameter(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix("shira_weight") + "weight"


def test_the_base_is_as_before(tmp_path: Path) -> None:
    model = tiny_model()
    frozen = model.get_parameter("model.norm.weight").requires_grad_(False)
    before = bits(model)
    export_shira(tiny_delta(model, names="q_proj"), tmp_path / "shira", model)
    assert_same_bits(model, before)
    assert not frozen.requires_grad
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad
    assert "peft_config" not in vars(model)


def test_a_base_may_be_a_folder(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    delta = tiny_delta(model, names="proj").save(tmp_path / "delta")
    export_shira(delta, tmp_path / "shira", tmp_path / "base")
    config = json.loads((tmp_path / "shira" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


# --- what is refused ---


def test_only_linear_weights_fit(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(CoverageError, match=r"cannot hold model\.embed_tokens\.weight"):
        export_shira(tiny_delta(model), tmp_path / "shira", model)
    assert not (tmp_path / "shira").exists()


def test_a_rank_that_more_than_fills_a_small_module_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    # 346 of 16 x 24 need rank 9, which would be 288 entries of 16 x 16.
    with pytest.raises(CoverageError, match="its one rank would be 9") as error:
        export_shira(tiny_delta(model, density=0.9, names="proj"), tmp_path / "shira", model)
    assert "the 8 smallest modules" in str(error.value)
    whole = tiny_delta(model, density=1.0, names="q_proj")
    assert export_shira(whole, tmp_path / "shira", model).growth == 1.0


def test_an_empty_delta_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    empty = SparseDelta({}, {}, {}, {}, tiny_delta(model).base)
    with pytest.raises(CoverageError, match="changes no weight"):
        export_shira(empty, tmp_path / "shira", model)


def test_another_base_is_refused(tmp_path: Path) -> None:
    delta = tiny_delta(tiny_model(), names="proj")
    with pytest.raises(IncompatibleRunError):
        export_shira(delta, tmp_path / "shira", tiny_model(seed=1))


def test_another_result_is_not_replaced(tmp_path: Path) -> None:
    model = tiny_model()
    delta = tiny_delta(model, names="proj")
    delta.save(tmp_path / "delta")
    with pytest.raises(StorageError, match="something else"):
        export_shira(delta, tmp_path / "delta", model)
    assert SparseDelta.load(tmp_path / "delta") == delta


def test_a_peft_that_adds_otherwise_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ShiraLinear.get_delta_weight
    monkeypatch.setattr(ShiraLinear, "get_delta_weight", lambda self, name: 2 * ours(self, name))
    model = tiny_model()
    before = bits(model)
    with pytest.raises(TrainingError, match="peft makes other weights"):
        export_shira(tiny_delta(model, names="proj"), tmp_path / "shira", model)
    assert not (tmp_path / "shira").exists()
    assert_same_bits(model, before)
