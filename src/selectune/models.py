"""Base models, tokenizers and adapters: loaded strictly, fingerprinted, on one chosen device.

What moves between versions of transformers and peft when a model is loaded is touched here only.
"""

import hashlib
import json
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from selectune.errors import (
    ConfigError,
    CorruptFileError,
    IncompatibleRunError,
    SelectionError,
    nearest,
)
from selectune.files import open_dir, sha256_file
from selectune.recipe import AdapterSection, ModelSection

# Keys of a model's configuration that say where it came from, not what it computes.
_BYSTANDERS = frozenset({"_name_or_path", "transformers_version", "architectures", "use_cache"})


@dataclass(frozen=True, slots=True)
class Base:
    """A base model ready for use, and what was decided for it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: str
    fingerprint: str
    pad_id: int


def choose_device(asked: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means here.

    Raises:
        ConfigError: cuda is asked for and absent.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device is cuda, and this machine has no CUDA device that torch can use",
            where="model.device",
            do="use model.device=cpu or auto",
        )
    use_cuda = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def choose_precision(asked: str, device: torch.device) -> str:
    """Return "bfloat16" where asked for or fast in hardware, else "float32"."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if cpu_has_fast_bf16() else "float32"


def cpu_has_fast_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 itself; emulated it is slower than fp32."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16"} & set(info.read_text().split()))


def load_base(section: ModelSection, *, adapter: AdapterSection) -> Base:
    """Load a causal LM and its tokenizer.

    Weights come in the chosen precision; with `adapter.kind: full` they come in fp32 (what trains
    needs it), and only the forward pass runs in the chosen precision.

    Raises:
        ConfigError: there is no such model, or it is not a causal LM.
    """
    device = choose_device(section.device)
    precision = choose_precision(section.dtype, device)
    held = torch.float32 if adapter.kind == "full" else getattr(torch, precision)
    tokenizer = load_tokenizer(section)
    if getattr(load_config(section), "quantization_config", None) is not None:
        raise ConfigError(
            f"the weights of {section.base} are quantised",
            where="model.base",
            why="quantised weights are neither supported nor tested as a base",
            do="give the model in fp32 or bf16",
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            section.base,
            revision=section.revision,
            dtype=held,
            attn_implementation=section.attention,
            trust_remote_code=False,
        )
    except SafetensorError as error:
        raise _unreadable(section, str(error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        why = "a weight has another shape than config.json gives it"
        raise _unreadable(section, why) from error
    except ImportError as error:
        raise ConfigError(
            f"model.attention is {section.attention}, and its library is missing",
            where="model.attention",
            why=str(error).split("\n", 1)[0],
            do="install it, or use model.attention=sdpa",
        ) from error
    except (OSError, ValueError) as error:
        raise _no_model(section, error) from error
    cast("nn.Module", model).to(device)
    model.config.use_cache = False
    pad_id = cast("int | None", tokenizer.pad_token_id) or 0
    found = _base_fingerprint(model, section)
    return Base(model, tokenizer, device, precision, found, pad_id)


def _base_fingerprint(model: nn.Module, section: ModelSection) -> str:
    """Return a hash of weights and of what else decides the function that they make up."""
    config = {k: v for k, v in cast("Any", model).config.to_dict().items() if k not in _BYSTANDERS}
    text = json.dumps([config, section.attention], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    digest.update(fingerprint(model.state_dict()).encode())
    return digest.hexdigest()[:32]


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.base, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _no_model(section, error) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_config(section: ModelSection) -> PretrainedConfig:
    """Load a model's configuration, without its weights.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(
            section.base, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _no_model(section, error) from error
    return cast("PretrainedConfig", config)


def context_length(section: ModelSection) -> int | None:
    """Return the number of positions that the model was made for, None where it does not say.

    Raises:
        ConfigError: there is no such model.
    """
    return load_config(section).to_dict().get("max_position_embeddings")


def _unreadable(section: ModelSection, why: str) -> CorruptFileError:
    return CorruptFileError(
        f"the weights of {section.base} cannot be read",
        where=section.base,
        why=why,
        do="copy or download the model again",
    )


def _no_model(section: ModelSection, error: Exception) -> ConfigError:
    folder = Path(section.base)
    first = str(error).strip().split("\n", 1)[0]
    if folder.is_dir():
        why = f"the folder holds no usable causal LM with tokenizer: {first}"
        do = "point model.base at a folder written by save_pretrained"
    else:
        why = f"no such folder here, and the Hub did not give it: {first}"
        do = "check the spelling; offline, give a local folder"
    return ConfigError(f'no model "{section.base}"', where="model.base", why=why, do=do)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a short hash of names, types, shapes and bytes: equal only for equal weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        content: Any = tensor.flatten().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()[:32]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks, first to last: the longest list of modules of one class.

    Raises:
        SelectionError: the model has no such list.
    """
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise SelectionError(
            "no decoder blocks were found in the model",
            where=type(model).__name__,
            why="blocks are the longest nn.ModuleList of modules of one class",
        )
    return max(lists, key=len)


def add_adapter(model: nn.Module, section: AdapterSection, *, seed: int) -> nn.Module:
    """Make trainable what the recipe asks for, and nothing else.

    Args:
        model: the untouched base; `full` trains it in place.
        section: kind, rank, modules and layers.
        seed: of the factors' first values.

    Returns:
        A peft model whose factors are fp32, or the base itself for kind full.

    Raises:
        SelectionError: a module name or a layer index does not exist.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    if section.kind == "full":
        _unfreeze_layers(model, section.layers)
        return model
    linear = {
        name.rsplit(".", 1)[-1]: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    targets = section.modules if isinstance(section.modules, str) else list(section.modules)
    for name in targets if isinstance(targets, list) else ():
        if name not in linear:
            raise SelectionError(
                f'no module of the model is called "{name}"',
                where="adapter.modules",
                why=f"its linear modules are called {', '.join(sorted(linear))}",
                do=nearest(name, linear) + ' "all-linear" takes every one but the head',
            )
    wanted = linear if isinstance(targets, str) else targets
    config = LoraConfig(
        r=section.rank,
        lora_alpha=cast("int", section.alpha),  # peft divides it by r; any number serves
        lora_dropout=section.dropout,
        target_modules=targets,
        use_dora=section.kind == "dora",
        fan_in_fan_out=any(linear[name] for name in wanted),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _quiet():
            adapted = get_peft_model(cast("Any", model), config)
    return cast("nn.Module", adapted)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence what peft 0.21 says about itself, not about the user's model."""
    with warnings.catch_warnings():
        # It asks transformers 5.24 for a renamed property; gone with a newer peft.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # It says so of every Conv1D beside a Linear when "all-linear" meets both.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        yield


def _unfreeze_layers(model: nn.Module, layers: Iterable[int] | None) -> None:
    found = blocks(model)
    for index in range(len(found)) if layers is None else layers:
        if not -len(found) <= index < len(found):
            raise SelectionError(
                f"there is no layer {index}",
                where="adapter.layers",
                why=f"the {len(found)} layers are called 0 to {len(found) - 1}",
                do="negative numbers count from the end: -1 is the last layer",
            )
        for p in found[index].parameters():
            p.requires_grad_(True)


def load_adapter(base: Base, path: str | Path) -> nn.Module:
    """Put a saved peft adapter onto its base, trainable, in evaluation-ready form.

    peft 0.21 loads an adapter of another model, or of one with fewer layers, without a word; here
    every tensor has to find its place.

    Raises:
        ConfigError: the folder holds no peft adapter.
        IncompatibleRunError: the adapter was made for another base.
    """
    folder = Path(path)
    weights, _ = _adapter_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with safe_open(weights, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, TypeError, ValueError, KeyError) as error:
        raise CorruptFileError(
            "the adapter cannot be read",
            where=str(folder),
            why=str(error),
            do="copy the adapter again",
        ) from error
    for p in base.model.parameters():
        p.requires_grad_(False)
    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(
                cast("Any", base.model), str(folder), config=config, is_trainable=True
            )
    except (RuntimeError, ValueError) as error:
        raise _other_base(folder, str(error).split("\n", 1)[0]) from error
    # peft names tensors otherwise on disk than in the model: DoRA's magnitudes, whole modules.
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    places = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    missing, extra = places.keys() - found.keys(), found.keys() - places.keys()
    odd = [name for name in places.keys() & found.keys() if places[name] != found[name]]
    if missing or extra or odd:
        first = sorted(missing or extra or odd)[0]
        raise _other_base(
            folder,
            f"{len(missing)} tensors are missing, {len(extra)} have no place in this model and "
            f"{len(odd)} have another shape; the first is {first}",
        )
    return cast("nn.Module", adapted)


def adapter_fingerprint(path: str | Path) -> str:
    """Return a short hash of a saved adapter, its configuration included.

    Raises:
        ConfigError: the folder holds no peft adapter.
    """
    parts = "".join(sha256_file(file) for file in _adapter_files(Path(path)))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _adapter_files(folder: Path) -> tuple[Path, Path]:
    files = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not all(file.exists() for file in files):
        raise ConfigError(
            f"no peft adapter in {folder}",
            where="model.adapter",
            why="a peft adapter is adapter_config.json beside adapter_model.safetensors",
            do="give the folder that peft's save_pretrained wrote",
        )
    return files


def _other_base(folder: Path, why: str) -> IncompatibleRunError:
    return IncompatibleRunError(
        "the adapter was made for another base model",
        where=str(folder),
        why=why,
        do="set model.base to the model that adapter_config.json names",
    )


def trainable_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of what is trainable in a model."""
    return fingerprint({n: p for n, p in model.named_parameters() if p.requires_grad})


def load_tuned(base: Base, path: Path) -> nn.Module:
    """Return the base with what `tune` saved: an adapter on it, or the whole model in its place.

    Raises:
        CorruptFileError: the folder is not what its manifest says.
        IncompatibleRunError: the adapter was made for another base.
    """
    opened = open_dir(path, kind="adapter")
    if "adapter_config.json" in opened.names:
        return load_adapter(base, path)
    tensors: dict[str, Tensor] = {}
    for name in opened.names:
        if name.endswith(".safetensors"):
            tensors |= opened.read_torch(name)
    places = base.model.state_dict()
    # A tied tensor is saved once, under one of its names.
    held = {places[n].data_ptr() for n in tensors if n in places}
    missing = [n for n, t in places.items() if n not in tensors and t.data_ptr() not in held]
    extra = tensors.keys() - places.keys()
    if missing or extra:
        why = f"{len(missing)} tensors are missing and {len(extra)} have no place in this model"
        raise _other_base(path, why)
    base.model.load_state_dict(tensors, strict=False)
    return base.model
