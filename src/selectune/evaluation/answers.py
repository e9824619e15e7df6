"""Which option a model's own words say.

The last option that occurs in them, as whole words and without regard to case, spacing, kinds of
quotes and full stops; of two that end at the same place, the longer.
"""

import re
import unicodedata
from collections.abc import Sequence

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})  # noqa: RUF001 (typographic quotes)
_STOPS = " .,;:!?。、"
# Thai to Myanmar, Khmer, kana, ideographs: written without spaces, so a word may begin anywhere.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_IN_WORD = rf"[^\W{_SPACELESS}]"


def find_answer(words: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that occurs last in what a model wrote, None without any.

    Options alike but for case and spacing are one answer: the first of them.
    """
    text = _plain(words)
    found = [
        (match.end(1), match.end(1) - match.start(1), -k)
        for k, option in enumerate(options)
        for match in _pattern(option).finditer(text)
    ]
    return -max(found)[2] if found else None


def are_alike(one: str, other: str) -> bool:
    """Return whether two options differ at most in case, spacing, quotes and full stops."""
    return _key(one) == _key(other)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).translate(_QUOTES).split())


def _bare(option: str) -> str:
    text = _plain(option)
    return text.rstrip(_STOPS) or text


def _key(option: str) -> str:
    # A single letter is a label, and "A" is not the article "a".
    text = _bare(option)
    return text.casefold() if len(text) > 1 else text


def _pattern(option: str) -> re.Pattern[str]:
    text = _bare(option)
    before = rf"(?<!{_IN_WORD})" if re.match(_IN_WORD, text[0]) else ""
    after = rf"(?!{_IN_WORD})" if re.match(_IN_WORD, text[-1]) else ""
    # Neither 1.5 nor -5 says 5.
    before += r"(?<!\d[.,])(?<![-−])" if text[0].isdecimal() else ""
    after += r"(?![.,]\d)" if text[-1].isdecimal() else ""
    # Inside a lookahead, so that occurrences which overlap are all found.
    pattern = rf"{before}(?=({re.escape(text)}){after})"
    return re.compile(pattern, re.IGNORECASE if len(text) > 1 else 0)
