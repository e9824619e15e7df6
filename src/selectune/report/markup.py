"""HTML that cannot be left unescaped: every string is text unless `tag` made it.

A template engine escapes what its author remembers to pass through it; here the type decides. Plain
`str` children and attribute values are escaped, `Markup` comes only from `tag` and `join`.
"""

import unicodedata
from collections.abc import Iterable
from html import escape

_VOID = frozenset({"br", "link", "meta"})
_KEPT_CONTROLS = frozenset("\n\t")


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


Child = str | Markup | None
Number = int | float  # beartype takes no int where only float is named


def printable(text: str) -> str:
    """Return `text` without what no HTML file may hold: controls and lone surrogates.

    C0 controls become their visible pictures (U+2400..), everything else becomes U+FFFD.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable_character, text.replace("\r\n", "\n")))


def _printable_character(character: str) -> str:
    if character in _KEPT_CONTROLS or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "\ufffd"


def tag(name: str, /, *children: Child, **attributes: str | Number | bool | None) -> Markup:
    """Return one element; text is escaped.

    Args:
        name: the element, such as "p".
        *children: text (escaped), `Markup` (as it is) or None (nothing).
        **attributes: `class_` gives class, `aria_label` gives aria-label; None and False are left
            out, True stands alone, numbers are written with at most 2 decimals.

    Returns:
        The element and all it holds.
    """
    head = [name]
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        match value:
            case None | False:
                continue
            case True:
                head.append(label)
            case str():
                head.append(f'{label}="{escape(printable(value))}"')
            case _:
                head.append(f'{label}="{coordinate(value)}"')
    start = f"<{' '.join(head)}>"
    return Markup(start if name in _VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Return children in a row; text is escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(printable(child), quote=False)
            for child in children
            if child is not None
        )
    )


def coordinate(value: Number) -> str:
    """Return a number as SVG wants it, short and without exponent."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def width_in_columns(text: str) -> int:
    """Return how many Latin letters wide `text` is in most fonts."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def shortened(text: str, columns: int) -> str:
    """Return `text`, or its beginning and an ellipsis where it is wider than `columns`."""
    flat = " ".join(text.split()) or "(no name)"
    if width_in_columns(flat) <= columns:
        return flat
    used, end = 0, 0
    for end, character in enumerate(flat):  # noqa: B007 (the index is what is wanted)
        used += width_in_columns(character)
        if used >= columns:
            break
    return flat[:end].rstrip() + "…"


def split_long(text: str, limit: int) -> tuple[str, str]:
    """Return a beginning of about `limit` characters and the rest, cut between words."""
    if len(text) <= limit * 1.2:
        return text, ""
    cut = max(text.rfind(" ", 0, limit), text.rfind("\n", 0, limit))
    if cut < limit // 2:  # no spaces, as in Chinese, or one endless word
        cut = limit
        while cut < len(text) and (unicodedata.combining(text[cut]) or text[cut] == "\u200d"):
            cut += 1
    return text[:cut], text[cut:]
