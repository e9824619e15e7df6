"""peft's prefix tuning, with the part of each block held by the block.

peft keeps the keys and values of all blocks in one tensor, so a frozen block's part would get a
gradient of zero instead of none, and AdamW would go on moving it. Here every block owns its part:
freezing works as for any other adapter. The saved file is peft's, one tensor as before.

Paper  Li and Liang, "Prefix-Tuning", ACL 2021, arXiv 2101.00190; without the MLP over the prefix,
       as LLM-Adapters (arXiv 2304.01933) trains it, with 30 virtual tokens.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel, PrefixEncoder, PrefixTuningConfig
from torch import Tensor, nn

from selectune.errors import ConfigError
from selectune.models import blocks

_NAME = "prefix"  # of the part, in its block


class BlockPrefix(nn.Module):
    """The keys and values that one block attends to before the text."""

    def __init__(self, weight: Float[Tensor, "v d"], adapter_name: str) -> None:
        """Hold one row of keys and values per virtual token."""
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        self.adapter_name = adapter_name
        self.scaling = {adapter_name: 1.0}

    def forward(self, places: Int[Tensor, "n v"]) -> Float[Tensor, "n v d"]:
        """Return the rows at these places of the prefix."""
        return self.embedding(places) * self.scaling[self.adapter_name]


class _Joined:
    """What peft takes for the one tensor of all blocks."""

    def __init__(self, parts: Sequence[BlockPrefix]) -> None:
        self._parts = parts

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        with torch.no_grad():
            return torch.cat([part.embedding.weight for part in self._parts], dim=1)


class BlockwiseEncoder(PrefixEncoder):
    """peft's prefix encoder, over parts that live in the blocks."""

    def __init__(self, parts: Sequence[BlockPrefix]) -> None:
        """Refer to the parts; their blocks own them, so that each parameter has one name."""
        nn.Module.__init__(self)
        self.prefix_projection = False
        # A tuple is no module: nothing is registered twice.
        self.parts = tuple(parts)

    @property
    def embedding(self) -> _Joined:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All parts side by side, for peft to read."""
        return _Joined(self.parts)

    def forward(self, prefix: Int[Tensor, "n v"]) -> Float[Tensor, "n v d"]:
        """Return keys and values of all blocks, block by block."""
        return torch.cat([part(prefix) for part in self.parts], dim=-1)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take the weights of a saved prefix."""
        with torch.no_grad():
            widths = [part.embedding.embedding_dim for part in self.parts]
            for part, piece in zip(self.parts, prompt_embeddings.split(widths, 1), strict=True):
                part.embedding.weight.copy_(piece)

    def _load_adapter_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.load_prompt_embeddings(state_dict["prompt_embeddings"])


def put_in_blocks(model: PeftModel) -> PeftModel:
    """Give every block its part of a fresh or loaded prefix; nothing is computed otherwise.

    Raises:
        ConfigError: the prefix comes from an MLP that all blocks share, or from another model.
    """
    name = cast("str", model.active_adapter)
    config = cast("PrefixTuningConfig", model.peft_config[name])
    found = blocks(model.get_base_model())
    if config.prefix_projection or len(found) != config.num_layers:
        raise ConfigError(
            "the prefix cannot be divided among the blocks",
            where="adapter",
            why="an MLP that all blocks share makes it"
            if config.prefix_projection
            else f"it was made for {config.num_layers} blocks, the model has {len(found)}",
            do="use PrefixTuningConfig(prefix_projection=False) on this model",
        )
    encoders = cast("Any", model).prompt_encoder
    weight = cast("Tensor", encoders[name].embedding.weight).detach()
    parts = [BlockPrefix(piece.clone(), name) for piece in weight.chunk(len(found), dim=1)]
    for block, part in zip(found, parts, strict=True):
        block.add_module(_NAME, part)
    encoders[name] = BlockwiseEncoder(parts)
    config.inference_mode = False  # a loaded one would be read past the encoder
    # peft 0.21 hands the prefix over by a name that transformers 5.24 has renamed to `cache`.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
    return model
