"""The last table of a comparison: what tuning did to plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from selectune.evaluation.estimate import Estimate
from selectune.evaluation.generic_text import GenericLoss, compare_generic, mean_loss
from selectune.tables import aligned, signed


@dataclass(frozen=True, slots=True)
class TextRow:
    """One method's loss on plain text, its models of all tasks and seeds taken together.

    Args:
        method: its name in the table.
        nats_per_token: mean over models and tokens.
        vs_base: the same less the base's; None for the base itself.
        vs_random: the same less random's; None for the base and for random itself.
    """

    method: str
    nats_per_token: float
    vs_base: Estimate | None = None
    vs_random: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def text_rows(
    losses: Mapping[str, Sequence[GenericLoss]],
    base: GenericLoss,
    *,
    references: Mapping[str, str],
    n_boot: int,
) -> list[TextRow]:
    """Return the rows of the table, the base first.

    Intervals are over texts; how models of other tasks and seeds would differ is not in them.

    Args:
        losses: of every model, by method in the table's order.
        base: of the untouched base.
        references: the method that each is compared with; itself for none.
        n_boot: draws behind an interval.
    """
    means = {method: mean_loss(found) for method, found in losses.items()}
    rows = [TextRow("base", base.nats_per_token)]
    for method, mine in means.items():
        is_reference = method == references[method]
        rows.append(
            TextRow(
                method,
                mine.nats_per_token,
                compare_generic(mine, base, n_boot=n_boot),
                None
                if is_reference
                else compare_generic(mine, means[references[method]], n_boot=n_boot),
            )
        )
    return rows


def text_lines(rows: Sequence[TextRow]) -> list[str]:
    """Return the rows as a Markdown table, widths aligned."""
    head = ("plain text", "nats / token", "perplexity", "- base [95 %]", "- random [95 %]")
    body = [
        (
            row.method,
            f"{row.nats_per_token:.3f}",
            f"{exp(row.nats_per_token):.1f}",
            _interval(row.vs_base),
            _interval(row.vs_random),
        )
        for row in rows
    ]
    return aligned(head, body)


def _interval(found: Estimate | None) -> str:
    return "-" if found is None else signed(found.value, found.low, found.high)
