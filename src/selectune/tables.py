"""Tables as text."""

from collections.abc import Sequence


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, its columns as wide as their widest cell.

    Args:
        head: one cell for each column.
        body: the rows below it.
    """
    widths = [max(len(line[k]) for line in (head, *body)) for k in range(len(head))]
    rule = ["-" * width for width in widths]
    return [_row(line, widths) for line in (head, rule, *body)]


def signed(value: float, low: float, high: float, digits: int = 3) -> str:
    """Return a difference with its interval, as every table writes it."""
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _row(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    return "| " + " | ".join(cells) + " |"
