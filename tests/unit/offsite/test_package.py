"""A package holds an emulator, all of it and nothing of its owner's; the owner's part the rest."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from slow_emulator import (
    ABOUT,
    FAMILIES,
    MIDDLES,
    case,
    compressed,
    hand_out,
    ids,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import selectune
from selectune.errors import ConfigError, DataError, SelectionError, StorageError
from selectune.models import adapter_layers, blocks, fingerprint, load_base, model_is_package
from selectune.offsite import package as package_module
from selectune.offsite.emulator import build_emulator
from selectune.offsite.loading import load_emulator, open_package
from selectune.offsite.package import save_package
from selectune.offsite.plugin import read_owner
from selectune.recipe import AdapterSection, ModelSection
from workspace import byte_tokenizer

PLAIN = ("untouched", "dropped")


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, family: str, middle: str) -> None:
    made = hand_out(tmp_path, family, middle)
    emulator = build_emulator(made.model, made.layout, MIDDLES[middle](made.model, made.layout))
    loaded = load_emulator(made.package)
    assert type(loaded) is type(emulator)
    assert fingerprint(loaded.state_dict()) == fingerprint(emulator.state_dict())
    assert torch.equal(loaded(ids()).logits, emulator(ids()).logits)
    shared = sum(p.numel() for p in loaded.parameters())
    assert shared == sum(p.numel() for p in emulator.parameters())


@pytest.mark.parametrize("middle", PLAIN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_package_needs_no_selectune(tmp_path: Path, family: str, middle: str) -> None:
    made = hand_out(tmp_path, family, middle)
    assert made.manifest.is_plain
    loaded = AutoModelForCausalLM.from_pretrained(made.package)
    assert torch.equal(loaded(ids()).logits, load_emulator(made.package)(ids()).logits)


@pytest.mark.parametrize("middle", sorted(MIDDLES.keys() - set(PLAIN)))
def test_another_loader_refuses_instead_of_guessing(tmp_path: Path, middle: str) -> None:
    made = hand_out(tmp_path, middle=middle)
    assert not made.manifest.is_plain
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(made.package)


def test_the_tokenizer_and_the_configuration_load_as_usual(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    text = "Question: 1 + 1?\nAnswer:"
    loaded = AutoTokenizer.from_pretrained(made.package)
    assert loaded(text).input_ids == byte_tokenizer()(text).input_ids
    assert loaded.chat_template == byte_tokenizer().chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_written_and_read(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_module, "SHARD_BYTES", 3000)
    made = hand_out(tmp_path, family, "dropped")
    assert len(list(made.package.glob("model-*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(made.package)
    assert fingerprint(plain.state_dict()) == fingerprint(load_emulator(made.package).state_dict())


def test_only_the_layers_that_may_train_take_gradients(tmp_path: Path) -> None:
    made = hand_out(tmp_path, middle="everything")
    emulator = selectune.Emulator.from_pretrained(made.package)
    assert emulator.adapter_layers == (0, 3)
    inside = {id(p) for i in (0, 3) for p in blocks(emulator.model)[i].parameters()}
    assert {id(p) for p in emulator.model.parameters() if p.requires_grad} == inside


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_recipe_takes_a_package_for_its_base(tmp_path: Path, kind: str) -> None:
    made = hand_out(tmp_path)
    section = ModelSection(base=str(made.package), dtype="float32", device="cpu")
    base = load_base(section, adapter=AdapterSection(kind=kind))
    expected = load_emulator(made.package)
    assert fingerprint(base.model.state_dict()) == fingerprint(expected.state_dict())
    assert base.tokenizer("a").input_ids == byte_tokenizer()("a").input_ids
    assert model_is_package(made.package)
    assert not model_is_package(tmp_path / "original")
    assert not model_is_package("somebody/something")
    assert adapter_layers(made.package) == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_package_loads_in_the_type_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    made = hand_out(tmp_path, dtype=torch.bfloat16)
    assert load_emulator(made.package).lm_head.weight.dtype is torch.bfloat16
    assert {p.dtype for p in load_emulator(made.package, dtype=dtype).parameters()} == {dtype}


# What leaks, and what does not.


def words(value: object) -> set[str]:
    """Return every name and every telling number or text in plain values."""
    if isinstance(value, dict):
        return set(value) | {w for v in value.values() for w in words(v)}
    if isinstance(value, list | tuple):
        return {w for v in value for w in words(v)}
    return {str(value)}


@pytest.mark.parametrize("middle", MIDDLES)
def test_nothing_of_the_owners_part_occurs_in_the_package(tmp_path: Path, middle: str) -> None:
    made = hand_out(tmp_path, middle=middle)
    record = read_owner(made.owner)
    assert record.about == json.loads(json.dumps(ABOUT))
    everything = b"".join(f.read_bytes() for f in made.package.rglob("*") if f.is_file())
    secret = words(ABOUT) | {record.rest, "secret-company", "great-model", str(tmp_path)}
    secret |= {fingerprint(made.model.state_dict()), "positions", "sources", "about"}
    assert [word for word in secret if word.encode() in everything] == []
    assert record.package.encode() in everything
    assert record.package == made.manifest.package


def test_no_row_that_was_removed_is_in_any_file(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    everything = b"".join(f.read_bytes() for f in made.package.rglob("*") if f.is_file())
    for j in made.layout.middle:
        block = blocks(made.model)[j]
        kept = compressed(made.model, made.layout)[j].pieces["mlp.up_proj"].weight
        rows = {row.numpy().tobytes() for row in kept}
        all_rows = [r.detach().numpy().tobytes() for r in block.mlp.up_proj.weight]
        assert sum(row in everything for row in all_rows) == len(rows) < len(all_rows)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix = block.get_submodule(f"self_attn.{name}").weight.detach()
            assert not any(row.numpy().tobytes() in everything for row in matrix)


@pytest.mark.parametrize("middle", ["dropped", "shared"])
def test_layers_that_are_left_out_are_in_no_file(tmp_path: Path, middle: str) -> None:
    made = hand_out(tmp_path, middle=middle)
    everything = b"".join(f.read_bytes() for f in made.package.rglob("*") if f.is_file())
    for j in (1, 3):
        for p in blocks(made.model)[j].parameters():
            assert p.detach().numpy().tobytes() not in everything


def test_what_a_package_says_of_its_base_is_stripped(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        found = words(json.loads((made.package / name).read_text()))
        assert not found & {"_name_or_path", "name_or_path", "auto_map", "_commit_hash"}
    with safe_open(made.package / "emulator.safetensors", "pt") as file:
        assert file.metadata() is None


def test_a_tokenizer_that_names_the_base_is_refused(tmp_path: Path) -> None:
    model, layout = case()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "You are big-company/best-model. {{ messages }}"
    tokenizer.name_or_path = "big-company/best-model"
    middle = MIDDLES["dropped"](model, layout)
    with pytest.raises(DataError, match="names the base, big-company/best-model"):
        save_package(
            build_emulator(model, layout, middle), model, tokenizer, layout=layout, middle=middle,
            package=tmp_path / "package", owner=tmp_path / "owner",
        )  # fmt: skip
    assert not (tmp_path / "package").exists()


def test_two_packages_of_one_model_have_two_ids(tmp_path: Path) -> None:
    first, second = hand_out(tmp_path / "a"), hand_out(tmp_path / "b")
    assert first.manifest.package != second.manifest.package
    assert first.manifest.start == second.manifest.start


def test_stored_parameters_equal_the_manifest(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    manifest, _ = open_package(made.package)
    loaded = load_emulator(made.package)
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        torch.Size(facts.shape).numel() for facts in manifest.tensors.values()
    )


@pytest.mark.parametrize(
    ("package", "owner"),
    [("out", "out"), ("out", "out/owner"), ("out/package", "out"), ("out", "./x/../out/owner")],
)
def test_the_two_folders_do_not_lie_in_one_another(
    tmp_path: Path, package: str, owner: str
) -> None:
    model, layout = case()
    middle = MIDDLES["dropped"](model, layout)
    with pytest.raises(ConfigError, match="lie in one another"):
        save_package(
            build_emulator(model, layout, middle), model, None, layout=layout, middle=middle,
            package=tmp_path / package, owner=tmp_path / owner,
        )  # fmt: skip
    assert not any(tmp_path.rglob("*.json"))


def test_a_link_does_not_hide_that_they_do(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    model, layout = case()
    middle = MIDDLES["dropped"](model, layout)
    with pytest.raises(ConfigError, match="lie in one another"):
        save_package(
            build_emulator(model, layout, middle), model, None, layout=layout, middle=middle,
            package=tmp_path / "out", owner=tmp_path / "link" / "owner",
        )  # fmt: skip


def test_another_result_is_not_replaced(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    middle = MIDDLES["dropped"](made.model, made.layout)
    emulator = build_emulator(made.model, made.layout, middle)
    with pytest.raises(StorageError, match="something else than a record of the owner"):
        save_package(
            emulator, made.model, None, layout=made.layout, middle=middle,
            package=tmp_path / "new", owner=made.package,
        )  # fmt: skip
    assert load_emulator(made.package)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_an_emulator_that_was_trained_outside_its_middle_is_not_written(
    tmp_path: Path, name: str
) -> None:
    model, layout = case()
    middle = MIDDLES["dropped"](model, layout)
    emulator = copy.deepcopy(build_emulator(model, layout, middle))
    with torch.no_grad():
        emulator.get_parameter(name).view(-1)[0] += 1
    with pytest.raises(SelectionError, match=f"the emulator's {name} is not"):
        save_package(
            emulator, model, None, layout=layout, middle=middle,
            package=tmp_path / "package", owner=tmp_path / "owner",
        )  # fmt: skip


def test_a_package_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    model, layout = case("gpt2")
    middle = compressed(model, layout)
    manifest = save_package(
        build_emulator(model, layout, middle), model, None, layout=layout, middle=middle,
        package=tmp_path / "package", owner=tmp_path / "owner",
    )  # fmt: skip
    assert manifest.tokenizer == ""
    assert load_emulator(tmp_path / "package")
