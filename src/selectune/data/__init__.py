"""Data: from files to examples with ids, to tokens with a loss mask, to batches."""

from selectune.data.checks import (
    DuplicateReport,
    LeakReport,
    duplicates,
    leakage,
    near_duplicates,
)
from selectune.data.collate import NO_LOSS, Batch, collate, length_sorted_batches, narrowed
from selectune.data.demo import DemoAssets, demo_assets
from selectune.data.examples import Example, ExampleSet, content_key, plain_text
from selectune.data.read import Spec, read_examples
from selectune.data.tokens import Tokenized, Tokens, option_tokens, preview, tokenize

__all__ = [
    "NO_LOSS",
    "Batch",
    "DemoAssets",
    "DuplicateReport",
    "Example",
    "ExampleSet",
    "LeakReport",
    "Spec",
    "Tokenized",
    "Tokens",
    "collate",
    "content_key",
    "demo_assets",
    "duplicates",
    "leakage",
    "length_sorted_batches",
    "narrowed",
    "near_duplicates",
    "option_tokens",
    "plain_text",
    "preview",
    "read_examples",
    "tokenize",
]
