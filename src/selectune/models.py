"""Base models and tokenizers: loaded strictly, fingerprinted, on one chosen device.

What moves between versions of transformers when a model is loaded is touched here only.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from selectune.errors import ConfigError, CorruptFileError, SelectionError
from selectune.recipe import AdapterSection, ModelSection
from selectune.recipe.methods import BESIDE_QUANTISED

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


def load_base(section: ModelSection, *, adapter: AdapterSection, as_stored: bool = False) -> Base:
    """Load a causal LM and its tokenizer.

    Weights come in the chosen precision; with `adapter.kind: full` they come in fp32 (what trains
    needs it), and only the forward pass runs in the chosen precision. With `as_stored` they keep
    the type that they have on disk, whatever the forward pass runs in. Quantised ones stay so, and
    products with them run in the chosen precision.

    Raises:
        ConfigError: there is no such model, or it is not a causal LM; or its weights are quantised,
            and cannot be used as asked.
    """
    device = choose_device(section.device)
    precision = choose_precision(section.dtype, device)
    held = torch.float32 if adapter.kind == "full" else getattr(torch, precision)
    if as_stored:
        held = "auto"
    # First, so that nothing of a package is used before all of it was checked.
    emulator = _emulator(section, held) if model_is_package(section.base) else None
    tokenizer = load_tokenizer(section)
    how = quantization_of(section)
    if how is not None:
        _refuse_quantised(section, how, adapter, as_stored=as_stored)
    model: Any = emulator or _causal_lm(section, held, is_quantised=how is not None)
    if how is not None:
        _refuse_repacking(model, device)
    else:
        model.to(device)  # quantised weights were put there as they were read
    model.config.use_cache = False
    found = _base_fingerprint(model, section)
    return Base(model, tokenizer, device, precision, found, pad_id_of(tokenizer))


def quantization_of(section: ModelSection) -> str | None:
    """Return what holds a model's weights in fewer bits, None where nothing does.

    That is "4bit" or "8bit" where the recipe asks for it, else the method that the model's own
    configuration names.

    Raises:
        ConfigError: there is no such model.
    """
    if model_is_package(section.base):
        return section.quantization
    own: Any = getattr(load_config(section), "quantization_config", None)
    if own is None:
        return section.quantization
    told = own if isinstance(own, dict) else own.to_dict()
    return str(cast("dict[str, Any]", told).get("quant_method", "unknown"))


def _refuse_quantised(
    section: ModelSection, how: str, adapter: AdapterSection, *, as_stored: bool
) -> None:
    asked = section.quantization is not None
    where = "model.quantization" if asked else "model.base"
    if adapter.kind not in BESIDE_QUANTISED or as_stored or model_is_package(section.base):
        raise ConfigError(
            f"the weights of {section.base} are quantised",
            where=where,
            why="an emulator is made and used in full precision"
            if as_stored or model_is_package(section.base)
            else f"adapter.kind {adapter.kind} is not trained on quantised weights",
            do="give the model in fp32 or bf16"
            + ("" if as_stored else f", or use adapter.kind {' or '.join(BESIDE_QUANTISED)}"),
        )
    if how not in ("4bit", "8bit", "bitsandbytes"):
        raise ConfigError(
            f"the weights of {section.base} are quantised by {how}",
            where=where,
            why="runs on weights quantised by bitsandbytes are tested, others are not",
            do="give the model in fp32 or bf16; model.quantization=4bit quantises it when it is "
            "read",
        )
    if asked and how == "bitsandbytes":
        raise ConfigError(
            f"the weights of {section.base} are quantised already",
            where=where,
            why="its configuration says how, and that cannot be changed",
            do="remove model.quantization",
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "bitsandbytes is not installed",
            where=where,
            why="it holds quantised weights, and multiplies with them",
            do="pip install bitsandbytes",
        )


def _refuse_repacking(model: nn.Module, device: torch.device) -> None:
    """Refuse 4-bit weights that bitsandbytes 0.50 cannot repack for CPUs with bf16 products."""
    if device.type != "cpu" or not cpu_has_fast_bf16():
        return
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        shape = cast("Any", module).out_features, cast("Any", module).in_features
        if shape[0] % 32 or shape[1] % 64:
            raise ConfigError(
                f"{name} cannot be held in 4 bits on this processor",
                where="model.quantization",
                why="bitsandbytes asks for outputs in multiples of 32 and inputs in multiples of "
                f"64, and it has {shape[0]} and {shape[1]}",
                do="use 8bit, or a GPU",
            )


def _causal_lm(section: ModelSection, held: torch.dtype | str, *, is_quantised: bool) -> nn.Module:
    more: dict[str, Any] = {}
    if is_quantised:
        more["device_map"] = {"": choose_device(section.device)}
    if section.quantization is not None:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=section.quantization == "8bit",
            load_in_4bit=section.quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=held,
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            section.base,
            revision=section.revision,
            dtype=held,
            attn_implementation=section.attention,
            trust_remote_code=False,
            **more,
        )
    except SafetensorError as error:
        raise _unreadable(section, str(error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        why = "a weight has another shape than config.json gives it"
        raise _unreadable(section, why) from error
    except ImportError as error:
        raise _no_attention(section, error) from error
    except (OSError, ValueError) as error:
        raise _no_model(section, error) from error


def _emulator(section: ModelSection, held: torch.dtype | str) -> nn.Module:
    from selectune.offsite.loading import load_emulator

    dtype = held if isinstance(held, torch.dtype) else None
    try:
        return load_emulator(section.base, dtype=dtype, attention=section.attention)
    except ImportError as error:
        raise _no_attention(section, error) from error


def model_is_package(base: str | Path) -> bool:
    """Return whether a model is an emulator package: a stand-in, of which some layers train."""
    from selectune.offsite.loading import is_package

    return is_package(base)


def adapter_layers(base: str | Path) -> tuple[int, ...]:
    """Return which layers of an emulator package train, by the emulator's numbers.

    Raises:
        CorruptFileError: it is no package, or its manifest was changed.
    """
    from selectune.offsite.loading import adapter_layers as found

    return found(base)


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


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id that fills up the rows of a batch."""
    return cast("int | None", tokenizer.pad_token_id) or 0


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


def _no_attention(section: ModelSection, error: ImportError) -> ConfigError:
    return ConfigError(
        f"model.attention is {section.attention}, and its library is missing",
        where="model.attention",
        why=str(error).split("\n", 1)[0],
        do="install it, or use model.attention=sdpa",
    )


def _no_model(section: ModelSection, error: Exception) -> ConfigError:
    folder = Path(section.base)
    first = str(error).strip().split("\n", 1)[0]
    if folder.is_dir():
        why = f"the folder holds no usable causal LM with tokenizer: {first}"
        do = "point model.base at a folder written by save_pretrained"
    elif folder.is_absolute() or section.base.count("/") > 1 or section.base.startswith((".", "~")):
        why, do = "no such folder here", "check the spelling"
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


def trainable_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of what is trainable in a model."""
    return fingerprint({n: p for n, p in model.named_parameters() if p.requires_grad})
