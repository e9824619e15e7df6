"""Tables as text."""

from collections.abc import Sequence


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, its columns as wide as their widest cell.

    Args:
        head: one cell for each column.
        body: the rows below it.
    """
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return [_row(line, widths) for line in (lines[0], rule, *lines[1:])]


def signed(value: float, low: float, high: float, digits: int = 3) -> str:
    """Return a difference with its interval, as every table writes it."""
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _row(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    return "| " + " | ".join(cells) + " |"
