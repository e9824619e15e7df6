"""Row pickers: which examples of a batch one layer learns from."""

import torch
from jaxtyping import Float
from torch import Tensor

from selectune.registry import row_picker
from selectune.training.picks import Alignments


@row_picker("softmax", needs={"score"})
def softmax(alignments: Alignments) -> Float[Tensor, " n"]:
    """Draw k by odds that grow with alignment, none twice (GAST)."""
    # The k largest of log odds + Gumbel noise follow the law of drawing one after another.
    return alignments.largest(alignments.standardised() / alignments.temperature + alignments.noise)


@row_picker("random")
def random(alignments: Alignments) -> Float[Tensor, " n"]:
    """Draw k evenly, each layer by itself: the control for the alignment."""
    return alignments.largest(alignments.noise)


@row_picker("random_shared")
def random_shared(alignments: Alignments) -> Float[Tensor, " n"]:
    """Draw k evenly, the same for all layers: the control for the smaller batch."""
    return alignments.largest(alignments.noise)


@row_picker("topk", needs={"score"})
def topk(alignments: Alignments) -> Float[Tensor, " n"]:
    """Take the k best aligned; half of the examples may never be learnt from."""
    return alignments.largest(alignments.score)


@row_picker("all")
def all_examples(alignments: Alignments) -> Float[Tensor, " n"]:
    """Take every example: equals training without a method."""
    return alignments.is_valid.to(alignments.score.dtype)


@row_picker("greedy", needs={"score", "gram"})
def greedy(alignments: Alignments) -> Float[Tensor, " n"]:
    """Take the best aligned one by one, less what the picks so far already give (GREATS)."""
    assert alignments.gram is not None
    # The paper's gain over the learning rate, which is 0 in the first step of a warm-up.
    gain = alignments.score.where(alignments.is_valid, -torch.inf)
    picked = torch.zeros_like(alignments.score)
    for _ in range(alignments.k):
        best = gain.argmax()
        picked = picked.index_fill(0, best, 1.0)
        shared = alignments.learning_rate * alignments.gram[best]
        gain = (gain - shared).index_fill(0, best, -torch.inf)
    return picked
