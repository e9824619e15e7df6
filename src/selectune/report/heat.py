"""The tokens of a few chosen examples, each as strong as it helps the task or works against it."""

import math
from itertools import groupby

from selectune.report import figures
from selectune.report.blocks import isolated, section
from selectune.report.contents import ReportData, TokenMap
from selectune.report.markup import Child, Markup, join, tag
from selectune.report.numbers import decimal

_LEVELS = 4
_LEAST = 0.02  # of the strongest token: weaker ones stay plain
_MOST_TOKENS = 600
_MOST_CHARACTERS = 400  # of a stretch without scores: its end is shown
_LEDES = {
    "loss": "How far each token of a chosen example helps: the first-order fall of the target's "
    "loss when the adapter is trained on that token alone.",
    "position": "At which tokens of a chosen example the adapter learns what the target asks for, "
    "whose loss it may be: the first-order fall of the target's loss by the update that comes from "
    "there.",
}
_KEY = {"selected": "helps the task", "random": "works against it"}


def tokens(data: ReportData) -> Markup | None:
    """Return a card for each example whose tokens were scored."""
    if not data.token_maps:
        return None
    parts: list[Child] = []
    for task, maps in groupby(data.token_maps, lambda one: one.task):
        parts.append(tag("h3", isolated(task)))
        parts += [_card(one) for one in maps]
    return section(
        "tokens",
        "Tokens",
        f"{_LEDES[data.token_maps[0].form]} The scores of an example add up to its gradient's "
        "product with the target's; colours are relative to its strongest token.",
        figures.key(_KEY),
        tag("div", *parts, class_="cards"),
    )


def _card(one: TokenMap) -> Markup:
    scored = [s for s in one.scores if s is not None]
    facts: list[Child] = [
        tag("b", f"{one.place} of {one.n}"),
        isolated(one.source),
        f"sum {decimal(one.score)}",
        f"{sum(s > 0 for s in scored)} of {len(scored)} tokens help",
        isolated(one.id),
    ]
    return tag(
        "article",
        tag("p", join(tag("span", fact) for fact in facts), class_="facts"),
        tag("div", *_spans(one), class_="heat", dir="auto"),
        class_="card",
    )


def _spans(one: TokenMap) -> list[Child]:
    largest = max((abs(s) for s in one.scores if s is not None), default=0.0) or 1.0
    spans: list[Child] = []
    n_shown = 0
    pairs = zip(one.tokens, one.scores, strict=True)
    for is_scored, some in groupby(pairs, lambda pair: pair[1] is not None):
        if not is_scored:
            text = "".join(piece for piece, _ in some)
            cut = text[-_MOST_CHARACTERS:]
            spans.append(tag("span", cut if cut == text else f"… {cut}", class_="soft"))
            continue
        for piece, score in some:
            n_shown += 1
            if score is not None and n_shown <= _MOST_TOKENS:
                spans.append(_token(piece, score, score / largest))
    if n_shown > _MOST_TOKENS:
        more = f" … {n_shown - _MOST_TOKENS:,} more tokens are in tokens.jsonl"
        spans.append(tag("span", more, class_="soft"))
    return spans


def _token(piece: str, score: float, share: float) -> Child:
    text = piece.replace("\n", "↵\n")
    if abs(share) < _LEAST:
        return tag("span", text, title=f"{score:+.3g}")
    level = min(_LEVELS, math.ceil(abs(share) * _LEVELS))
    side = "up" if share > 0 else "down"
    return tag("span", text, class_=f"{side} l{level}", title=f"{score:+.3g}")
