"""Generic text as blocks of tokens: what statistics are taken from, and what they are tried on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from selectune.data.tokens import Tokens, fingerprint_of
from selectune.errors import DataError

# So many of all blocks are held back where the text is short.
_PROBE_SHARE = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Blocks of one length, every token of which is predicted.

    Attributes:
        blocks: to compress by.
        probe: other ones, to compare emulator and original on.
    """

    blocks: tuple[Tokens, ...]
    probe: tuple[Tokens, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the blocks to compress by."""
        return fingerprint_of(self.blocks)[:32]


def calibration_of(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_blocks: int,
    block_tokens: int,
    n_probe: int,
    seed: int,
) -> Calibration:
    """Join texts, in an order drawn by their content, and cut them into blocks.

    Where they fill fewer blocks than are asked for, all are taken; a last, shorter one is not.

    Args:
        texts: plain text.
        tokenizer: of the model.
        n_blocks: to compress by.
        block_tokens: of each.
        n_probe: further ones, held back; of short text at most a fifth.
        seed: of the order.

    Raises:
        DataError: there is no text, or too little for two blocks.
    """
    drawn = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    end = cast("int | None", tokenizer.eos_token_id)
    wanted = (n_blocks + n_probe) * block_tokens
    ids: list[int] = []
    for text in drawn:
        if len(ids) >= wanted:
            break
        # Of a long text no warning: it is cut into blocks the model can read.
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += cast("list[int]", found)
        ids += [] if end is None else [end]
    n = min(len(ids) // block_tokens, n_blocks + n_probe)
    if n < 2:
        raise DataError(
            "the calibration text is empty"
            if not any(map(str.strip, texts))
            else f"the calibration text has {len(ids)} tokens, too few for 2 blocks of "
            f"{block_tokens}",
            where="calibration",
            why="one block at least is compressed by, and another one tells how well",
            do="give more text, or smaller blocks (emulate.block_tokens)",
        )
    cut = [_block(k, ids[k * block_tokens : (k + 1) * block_tokens]) for k in range(n)]
    held = n_probe if n == n_blocks + n_probe else min(n_probe, max(1, round(_PROBE_SHARE * n)))
    return Calibration(tuple(cut[held:]), tuple(cut[:held]))


def _block(k: int, ids: Sequence[int]) -> Tokens:
    is_target = np.ones(len(ids), dtype=bool)
    is_target[0] = False
    return Tokens(f"block-{k}", np.array(ids, dtype=np.int64), is_target)
