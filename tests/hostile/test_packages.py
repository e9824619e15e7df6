"""Packages and plugins that somebody else wrote: a clear refusal, no code run, nothing changed."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from slow_emulator import Handed, hand_out
from torch import Tensor

import selectune
from selectune.errors import CorruptFileError, IncompatibleRunError, SelectuneError
from selectune.files import open_dir, seal
from selectune.models import fingerprint, load_base
from selectune.offsite.loading import load_emulator
from selectune.offsite.manifests import Terms
from selectune.offsite.package import KIND
from selectune.offsite.plugin import plug, plug_files
from selectune.offsite.plugin_files import KIND as PLUGIN
from selectune.offsite.plugin_saving import save_plugin
from selectune.recipe import AdapterSection, ModelSection

Facts = dict[str, Any]
Tensors = dict[str, Tensor]
NAME = "model.layers.0.mlp.up_proj.weight"


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def canary_pickle(mark: Path) -> bytes:
    """Return the same as bytes, written out by hand."""
    return b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR."


def sent(tmp_path: Path, form: str = "full", terms: Terms | None = None) -> tuple[Handed, Path]:
    """Return a package and a sound plugin for it."""
    made = hand_out(tmp_path, terms=terms)
    model = selectune.Emulator.from_pretrained(made.package).model
    if form == "lora":
        from peft import LoraConfig, get_peft_model

        from selectune.adapters.add import quiet

        names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 4)]
        with quiet():
            config = LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
    return made, save_plugin(model, made.package, tmp_path / "plugin")


def reseal(folder: Path, kind: str, change: Callable[[Facts], object] = lambda _: None) -> None:
    """Give a folder a manifest whose checksums are right: the liar knows how they are made."""
    meta = json.loads((folder / "manifest.json").read_text())["meta"]
    change(meta)
    seal(folder, kind=kind, meta=meta)


def refused(
    made: Handed, plugin: Path, why: str | None, kind: type[Exception] = SelectuneError
) -> None:
    """See that a plugin is refused for this reason, and that nothing was changed or written."""
    before = fingerprint(made.model.state_dict())
    with pytest.raises(kind, match=why) as error:
        plug(made.model, plugin, made.owner)
    assert isinstance(error.value, SelectuneError)
    assert error.value.where
    assert error.value.exit_code == 1
    assert fingerprint(made.model.state_dict()) == before
    out = made.package.parent / "tuned"
    with pytest.raises(kind, match=why):
        plug_files(made.package.parent / "original", plugin, made.owner, out)
    assert not out.exists()


# Plugins, in the order of the checks.


def test_a_sound_plugin_is_taken(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    reseal(plugin, PLUGIN)
    assert plug(made.model, plugin, made.owner).changes


@pytest.mark.parametrize("name", ["notes.json", "adapter.pt", "adapter.bin", "run.py", "a/b.json"])
def test_one_file_too_many_is_refused(tmp_path: Path, name: str) -> None:
    made, plugin = sent(tmp_path)
    (plugin / name).parent.mkdir(exist_ok=True)
    (plugin / name).write_bytes(b"{}")
    refused(made, plugin, "does not belong into this folder", CorruptFileError)
    reseal(plugin, PLUGIN)
    refused(made, plugin, "does not belong into this folder", CorruptFileError)


@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json"])
def test_a_link_is_refused(tmp_path: Path, name: str) -> None:
    made, plugin = sent(tmp_path)
    (plugin / name).rename(tmp_path / "elsewhere")
    (plugin / name).symlink_to(tmp_path / "elsewhere")
    refused(made, plugin, "does not belong into this folder", CorruptFileError)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    (plugin / "adapter.safetensors").unlink()
    os.mkfifo(plugin / "adapter.safetensors")
    refused(made, plugin, "does not belong into this folder", CorruptFileError)


def test_a_pickle_under_another_name_is_refused_and_not_run(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    (plugin / "adapter.safetensors").write_bytes(canary_pickle(tmp_path / "boom"))
    reseal(plugin, PLUGIN)
    refused(made, plugin, "adapter.safetensors is damaged", CorruptFileError)
    assert not (tmp_path / "boom").exists()


def test_a_file_of_torch_is_refused_and_not_run(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    tensors = load_file(plugin / "adapter.safetensors")
    torch.save({**tensors, "x": Bomb(tmp_path / "boom")}, plugin / "adapter.safetensors")
    reseal(plugin, PLUGIN)
    refused(made, plugin, r"adapter.safetensors (is damaged|has)", CorruptFileError)
    assert not (tmp_path / "boom").exists()


def test_a_file_larger_than_its_tensors_can_be_is_not_read(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    with (plugin / "adapter.safetensors").open("ab") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk, and reading it would take hours
    refused(made, plugin, "has 1099511627776 bytes", CorruptFileError)


def test_a_header_that_claims_the_moon_is_refused(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    (plugin / "adapter.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    reseal(plugin, PLUGIN)
    refused(made, plugin, "adapter.safetensors is damaged", CorruptFileError)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json"])
def test_a_flipped_bit_is_refused(tmp_path: Path, name: str, place: float) -> None:
    made, plugin = sent(tmp_path)
    data = bytearray((plugin / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (plugin / name).write_bytes(data)
    refused(made, plugin, None, CorruptFileError)


@pytest.mark.parametrize("n_bytes", [0, 7, 1000])
@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, n_bytes: int) -> None:
    made, plugin = sent(tmp_path)
    (plugin / name).write_bytes((plugin / name).read_bytes()[:n_bytes])
    refused(made, plugin, None, CorruptFileError)


@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    made, plugin = sent(tmp_path)
    (plugin / name).unlink()
    refused(made, plugin, None, CorruptFileError)
    refused(made, tmp_path / "nowhere", "not a finished result", CorruptFileError)


def test_another_kind_of_folder_is_no_plugin(tmp_path: Path) -> None:
    made, _ = sent(tmp_path)
    refused(made, made.owner, None, CorruptFileError)
    refused(made, made.package, None, CorruptFileError)


def test_a_plugin_of_another_package_is_refused(tmp_path: Path) -> None:
    made, _ = sent(tmp_path / "one")
    _, other = sent(tmp_path / "two")
    refused(made, other, "trained on another package", IncompatibleRunError)


def test_a_plugin_of_other_start_values_is_refused(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    reseal(plugin, PLUGIN, lambda meta: meta.update(start="0" * 32))
    refused(made, plugin, "other start values", IncompatibleRunError)


@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_another_original_is_refused(tmp_path: Path, name: str) -> None:
    made, plugin = sent(tmp_path)
    with torch.no_grad():
        made.model.get_parameter(name).view(-1)[3] += 1e-3
    made.model.save_pretrained(tmp_path / "original")
    refused(made, plugin, "not the model that the package was made of", IncompatibleRunError)


def test_an_original_in_another_type_is_refused(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    with pytest.raises(IncompatibleRunError, match="with dtype=float32"):
        plug(made.model.bfloat16(), plugin, made.owner)


def test_an_original_of_another_depth_is_refused(tmp_path: Path) -> None:
    made, plugin = sent(tmp_path)
    made.model.model.layers = made.model.model.layers[:4]
    with pytest.raises(IncompatibleRunError, match="it has 4 layers"):
        plug(made.model, plugin, made.owner)


def facts_of(tensors: Tensors) -> Facts:
    return {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in tensors.items()
    }


def rewrite(plugin: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a plugin, and its manifest so that it agrees with them."""
    tensors = load_file(plugin / "adapter.safetensors")
    change(tensors)
    save_file(tensors, plugin / "adapter.safetensors")
    reseal(plugin, PLUGIN, lambda meta: meta.update(tensors=facts_of(tensors)))


FULL: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "extra": (lambda t: t.update(x=torch.zeros(1)), '"x" is extra'),
    "extra, of the middle": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(24, 16)}),
        "is extra",
    ),
    "extra, the head": (lambda t: t.update({"lm_head.weight": torch.zeros(61, 16)}), "is extra"),
    "missing": (lambda t: t.pop(NAME), f'"{NAME}" is missing'),
    "renamed": (lambda t: t.update({f"base.{NAME}": t.pop(NAME)}), "is extra"),
    "of another shape": (lambda t: t.update({NAME: t[NAME].T.contiguous()}), "it should be"),
    "of a wider shape": (lambda t: t.update({NAME: t[NAME][None]}), "it should be"),
    "of another type": (lambda t: t.update({NAME: t[NAME].half()}), "it should be float32"),
    "of whole numbers": (lambda t: t.update({NAME: t[NAME].int()}), "it should be float32"),
    "not a number": (lambda t: t[NAME].view(-1)[5].fill_(float("nan")), "not finite numbers"),
    "infinite": (lambda t: t[NAME].view(-1)[5].fill_(float("-inf")), "not finite numbers"),
}


@pytest.mark.parametrize("lie", FULL)
def test_tensors_that_are_not_the_adapters_are_refused(tmp_path: Path, lie: str) -> None:
    made, plugin = sent(tmp_path)
    change, why = FULL[lie]
    rewrite(plugin, change)
    refused(made, plugin, why)


Q = "model.layers.0.self_attn.q_proj"
LORA: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "modules_to_save": (lambda t: t.update({NAME: torch.zeros(24, 16)}), "is extra"),
    "a factor missing": (lambda t: t.pop(f"{Q}.lora_B"), "is missing"),
    "both missing": (lambda t: (t.pop(f"{Q}.lora_A"), t.pop(f"{Q}.lora_B")), "is missing"),
    "ranks that differ": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(1, 16)}), "should be"),
    "a rank of a thousand": (
        lambda t: t.update({f"{Q}.lora_A": torch.zeros(17, 16)}),
        "have the rank 17",
    ),
    "a bias": (lambda t: t.update({f"{Q}.bias": torch.zeros(16)}), "is extra"),
    "another type": (
        lambda t: t.update({f"{Q}.lora_A": torch.zeros(2, 16, dtype=torch.bfloat16)}),
        "should be float32",
    ),
    "not a number": (lambda t: t[f"{Q}.lora_A"].fill_(float("nan")), "not finite numbers"),
    "too large": (
        lambda t: (t[f"{Q}.lora_A"].fill_(3e38), t[f"{Q}.lora_B"].fill_(3e38)),
        "would not be finite",
    ),
}


@pytest.mark.parametrize("lie", LORA)
def test_factors_that_are_not_the_adapters_are_refused(tmp_path: Path, lie: str) -> None:
    made, plugin = sent(tmp_path, "lora")
    change, why = LORA[lie]
    rewrite(plugin, change)
    refused(made, plugin, why)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("model.layers.1.self_attn.q_proj", "no linear module of a layer that trains"),
        ("model.layers.0.input_layernorm", "no linear module"),
        ("lm_head", "no linear module"),
        ("model.layers.9.self_attn.q_proj", "no linear module"),
        ("", "no linear module"),
    ],
)
def test_factors_elsewhere_are_refused(tmp_path: Path, module: str, why: str) -> None:
    made, plugin = sent(tmp_path, "lora")
    reseal(plugin, PLUGIN, lambda meta: meta["scales"].update({module: 1.0}))
    refused(made, plugin, why, IncompatibleRunError)


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ({"forms": ["full"]}, 'of the form "lora"'),
        ({"max_rank": 1}, "have the rank 2"),
        ({"modules": ["k_proj"]}, "agreed are those in k_proj"),
    ],
)
def test_what_was_not_agreed_is_refused(tmp_path: Path, terms: Facts, why: str) -> None:
    made, plugin = sent(tmp_path, "lora")
    # The owner's own record decides, whatever the package that was sent out says.
    record = json.loads((made.owner / "owner.json").read_text())
    record["terms"] |= terms
    (made.owner / "owner.json").write_text(json.dumps(record))
    reseal(made.owner, "record of the owner")
    refused(made, plugin, why, IncompatibleRunError)


LIES: dict[str, Callable[[Facts], object]] = {
    "no package": lambda m: m.pop("package"),
    "another form": lambda m: m.update(form="delta"),
    "a key more": lambda m: m.update(losses=[1.0]),
    "no tensors": lambda m: m.update(tensors={}),
    "tensors are a list": lambda m: m.update(tensors=[]),
    "a negative shape": lambda m: m["tensors"][NAME].update(shape=[-24, -16]),
    "an absurd shape": lambda m: m["tensors"][NAME].update(shape=[10**15, 16]),
    "a function for a type": lambda m: m["tensors"][NAME].update(dtype="load"),
    "a tensor more": lambda m: m["tensors"].update(x={"shape": [1], "dtype": "float32"}),
    "scales of whole layers": lambda m: m.update(scales={Q: 1.0}),
    "a newer version": lambda m: m.update(version=99),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_is_a_sealed_lie_is_refused(tmp_path: Path, lie: str) -> None:
    made, plugin = sent(tmp_path)
    reseal(plugin, PLUGIN, LIES[lie])
    refused(made, plugin, None)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Handed, Path]:
    return sent(tmp_path)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_for_tensors_break_the_reader(pair: tuple[Handed, Path], content: bytes) -> None:
    made, plugin = pair
    (plugin / "adapter.safetensors").write_bytes(content)
    reseal(plugin, PLUGIN)
    with pytest.raises(SelectuneError):
        plug(made.model, plugin, made.owner)


# Packages.


def edit(file: Path, change: Callable[[Facts], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def unusable(package: Path, why: str | None) -> None:
    """See that a package is refused by every way in."""
    with pytest.raises((CorruptFileError, IncompatibleRunError), match=why) as error:
        load_emulator(package)
    assert error.value.where
    section = ModelSection(base=str(package), dtype="float32", device="cpu")
    with pytest.raises((CorruptFileError, IncompatibleRunError), match=why):
        load_base(section, adapter=AdapterSection())


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "modeling.Evil"}),
        ("trust_remote_code", True),
        ("quantization_config", {"quant_method": "evil"}),
        ("attn_implementation", "evil/kernel"),
        ("_attn_implementation", "evil/kernel"),
    ],
)
def test_a_key_that_runs_code_is_refused(
    tmp_path: Path, name: str, key: str, value: object
) -> None:
    made = hand_out(tmp_path)
    edit(made.package / name, lambda c: c.update({"deep": [{"in": {key: value}}]}))
    reseal(made.package, KIND)
    unusable(made.package, f'{name} has the key "{key}"')


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "weights.pt", "a.so"])
def test_a_file_that_is_not_exchanged_is_refused(tmp_path: Path, name: str) -> None:
    made = hand_out(tmp_path)
    (made.package / name).write_bytes(canary_pickle(tmp_path / "boom"))
    reseal(made.package, KIND)
    unusable(made.package, f"{name} does not belong into this folder")
    assert not (tmp_path / "boom").exists()


def test_a_file_that_no_manifest_names_is_refused(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    (made.package / "extra.json").write_text("{}")
    unusable(made.package, "extra.json does not belong")


@pytest.mark.parametrize("name", ["config.json", "emulator.safetensors", "emulator.json"])
def test_a_changed_package_is_refused(tmp_path: Path, name: str) -> None:
    made = hand_out(tmp_path)
    data = bytearray((made.package / name).read_bytes())
    data[len(data) // 2] ^= 1
    (made.package / name).write_bytes(data)
    unusable(made.package, f"{name} is damaged")


def test_a_package_behind_a_link_is_refused(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    (made.package / "config.json").rename(tmp_path / "config.json")
    (made.package / "config.json").symlink_to(tmp_path / "config.json")
    unusable(made.package, "symbolic link")


UP = "model.layers.2.mlp.up_proj.weight"
FIRST = "model.layers.2.self_attn.q_proj.first.weight"
EMULATORS: dict[str, Callable[[Facts], object]] = {
    "no layers": lambda f: f.update(adapter_layers=[]),
    "layers out of range": lambda f: f.update(adapter_layers=[0, 9]),
    "layers out of order": lambda f: f.update(adapter_layers=[4, 0]),
    "a layer twice": lambda f: f.update(adapter_layers=[0, 0]),
    "a billion layers": lambda f: f.update(n_layers=10**9),
    "a layer less": lambda f: f.update(n_layers=4),
    "a layer that is shared": lambda f: f.update(shared=[[1, 2]]),
    "a layer that shares itself": lambda f: f.update(shared=[[1, 1]]),
    "an adapter that is shared": lambda f: f.update(shared=[[0, 1]]),
    "a shared layer out of range": lambda f: f.update(shared=[[1, 99]]),
    "another architecture": lambda f: f.update(architecture="GPT2LMHeadModel"),
    "other blocks": lambda f: f.update(blocks="model"),
    "a tensor more": lambda f: f["tensors"].update(x={"shape": [1], "dtype": "float32"}),
    "a tensor less": lambda f: f["tensors"].pop("model.norm.weight"),
    "another shape": lambda f: f["tensors"][UP].update(shape=[11, 16]),
    "a shape of three": lambda f: f["tensors"][UP].update(shape=[12, 16, 1]),
    "an absurd shape": lambda f: f["tensors"][UP].update(shape=[10**15, 16]),
    "an absurd rank": lambda f: f["tensors"][FIRST].update(shape=[10**15, 16]),
    "a missing factor": lambda f: f["tensors"].pop(FIRST),
    "another type": lambda f: f["tensors"][UP].update(dtype="float16"),
    "a type of torch's": lambda f: f["tensors"][UP].update(dtype="save"),
    "no tensors": lambda f: f.update(tensors={}),
    "no terms": lambda f: f.pop("terms"),
    "a newer version": lambda f: f.update(version=2),
    "a key more": lambda f: f.update(code="import os"),
}


@pytest.mark.parametrize("lie", EMULATORS)
def test_a_package_that_contradicts_itself_is_refused(tmp_path: Path, lie: str) -> None:
    made = hand_out(tmp_path)
    edit(made.package / "emulator.json", EMULATORS[lie])
    reseal(made.package, KIND)
    unusable(made.package, None)


CONFIGS: dict[str, Callable[[Facts], object]] = {
    "another model": lambda c: c.update(model_type="gpt2"),
    "no such model": lambda c: c.update(model_type="evil"),
    "no model": lambda c: c.clear(),
    "more layers": lambda c: c.update(num_hidden_layers=10**9),
    "wider": lambda c: c.update(hidden_size=10**9),
    "text for a number": lambda c: c.update(hidden_size="wide"),
    "heads that do not divide": lambda c: c.update(num_attention_heads=0),
    "a vocabulary of the moon": lambda c: c.update(vocab_size=10**15),
}


@pytest.mark.parametrize("lie", CONFIGS)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, lie: str) -> None:
    made = hand_out(tmp_path)
    edit(made.package / "config.json", CONFIGS[lie])
    reseal(made.package, KIND)
    unusable(made.package, None)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 100_000, b"\xff" * 100, b"[]", b"null"],
    ids=["nothing", "an object", "a deep list", "no text", "a list", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "emulator.json", "emulator.safetensors"])
def test_nonsense_for_a_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    made = hand_out(tmp_path)
    (made.package / name).write_bytes(content)
    reseal(made.package, KIND)
    unusable(made.package, None)


def test_resealing_alone_breaks_nothing(tmp_path: Path) -> None:
    made = hand_out(tmp_path)
    reseal(made.package, KIND)
    assert load_emulator(made.package)
    assert open_dir(made.package, kind=KIND).meta == {"package": made.manifest.package}
