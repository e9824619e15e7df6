"""trl's SFTTrainer on our batches; imported only where it is asked for, as trl is slow to load."""

import os
from typing import Any

from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from selectune.training.trainers import TransformersArm


class TrlArm(TransformersArm, SFTTrainer):
    """SFTTrainer: no tokenising, no packing, no truncation and no call home.

    trl 1.16 replaces the LM head by a fused one, which on a CPU scores every position and fires
    no hook. Our loss asks the model for its own forward instead, as trl documents for trainers
    that override `compute_loss`.
    """

    def _extra_arguments(self) -> dict[str, Any]:
        # SFTTrainer insists on a tokenizer, and loads one by the model's name without it. The
        # data set is tokenised already, so one that knows a padding token is enough.
        words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))  # noqa: S106
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")  # noqa: S106
        if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
            # The variable is read when huggingface_hub is imported, which was long ago.
            constants.HF_HUB_DISABLE_TELEMETRY = True
        return {"processing_class": tokenizer}

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write no card next to the checkpoints: ours comes with the finished adapter."""


def sft_arguments(common: dict[str, Any]) -> SFTConfig:
    """Return trl's arguments; its own defaults turn on bf16, checkpointing and truncation."""
    return SFTConfig(
        **common,
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
