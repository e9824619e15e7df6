"""Examples to read: the text of the best and the worst, beside the target each matches best."""

from collections.abc import Sequence

from selectune.report.blocks import folded, isolated, section
from selectune.report.contents import Part, ReportData, ShownExample
from selectune.report.markup import Child, Markup, join, split_long, tag
from selectune.report.numbers import decimal, percent

_OPEN_CARDS = 4
_OPEN_CHARACTERS = 700
_MOST_CHARACTERS = 20_000


def examples(data: ReportData) -> Markup | None:
    """Return the best and the worst examples as cards."""
    if not (data.best or data.worst):
        return None
    return section(
        "examples",
        "Examples",
        "Read a few of each. If the best look unlike your task, look at their captured energy, at "
        "more target examples, or at another method.",
        _cards("Best scores", data.best),
        _cards("Lowest scores", data.worst),
    )


def _cards(heading: str, shown: Sequence[ShownExample]) -> Markup | None:
    if not shown:
        return None
    cards = [_card(place, example) for place, example in enumerate(shown, 1)]
    rest = cards[_OPEN_CARDS:]
    return tag(
        "div",
        tag("h3", heading),
        *cards[:_OPEN_CARDS],
        folded(f"{len(rest)} more", *rest) if rest else None,
        class_="cards",
    )


def _card(place: int, example: ShownExample) -> Markup:
    numbers = [f"score {decimal(example.score)}"]
    if example.energy is not None:
        numbers.append(f"captured energy {percent(example.energy)}")
    facts: list[Child] = [
        tag("b", f"{place}"),
        isolated(example.source),
        *numbers,
        tag("span", "chosen", class_="chosen") if example.is_selected else "not chosen",
    ]
    if example.note:
        facts.append(isolated(example.note))
    facts.append(isolated(example.origin or example.id))
    task = f" ({example.target_task})" if example.target_task else ""
    return tag(
        "article",
        tag("p", join(tag("span", fact) for fact in facts), class_="facts"),
        tag(
            "div",
            _side("Pool example", example.parts, example.origin or example.id),
            _side(f"Best-matching target{task}", example.target_parts, example.target_id)
            if example.target_parts
            else None,
            class_="sides",
        ),
        class_="card",
    )


def _side(heading: str, parts: Sequence[Part], where: str) -> Markup:
    body: list[Child] = [tag("h4", heading, dir="auto")]
    for role, text in parts:
        body.append(tag("p", role, class_="role", dir="auto"))
        body.append(_long_text(text, where))
    return tag("div", *body, class_="side")


def _long_text(text: str, where: str) -> Markup:
    """Return a text of any length: its beginning, the rest folded, the end cut far out."""
    if not text.strip():
        return tag("p", "(empty)", class_="text soft")
    start, rest = split_long(text.strip(), _OPEN_CHARACTERS)
    if not rest:
        return tag("div", start, class_="text", dir="auto")
    kept, cut = rest[:_MOST_CHARACTERS], rest[_MOST_CHARACTERS:]
    end = tag("p", f"… {len(cut):,} more characters are in {where}", class_="note") if cut else None
    return join(
        [
            tag("div", f"{start} …", class_="text", dir="auto"),
            folded(
                f"{len(rest):,} more characters", tag("div", kept, class_="text", dir="auto"), end
            ),
        ]
    )
