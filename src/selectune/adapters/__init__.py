"""What is trained on a frozen base: added, saved by peft, loaded strictly.

LoRA, DoRA and prefixes are peft's; series and parallel bottleneck adapters are ours, as peft
tuners, so that `PeftModel` saves and loads them once this package is imported.
"""

from selectune.adapters.add import add_adapter
from selectune.adapters.bottleneck import BottleneckConfig, BottleneckLayer
from selectune.adapters.load import (
    adapter_fingerprint,
    checkpoints_fingerprint,
    load_adapter,
    load_tuned,
)
from selectune.adapters.prefix import BlockPrefix, put_in_blocks

__all__ = [
    "BlockPrefix",
    "BottleneckConfig",
    "BottleneckLayer",
    "adapter_fingerprint",
    "add_adapter",
    "checkpoints_fingerprint",
    "load_adapter",
    "load_tuned",
    "put_in_blocks",
]
