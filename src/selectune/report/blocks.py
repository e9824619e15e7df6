"""Blocks of the page that every part uses: sections, tables, folded parts."""

from collections.abc import Iterable, Sequence

from selectune.report.markup import Child, Markup, join, tag


def section(anchor: str, heading: str, lede: Child, *body: Child) -> Markup:
    """Return one part of the page; `lede` says how to read it."""
    return tag(
        "section",
        tag("h2", heading, id=f"{anchor}-heading"),
        tag("p", lede, class_="lede") if lede else None,
        *body,
        id=anchor,
        aria_labelledby=f"{anchor}-heading",
    )


def panel(heading: Child, *body: Child, note: str = "") -> Markup:
    """Return a figure with its heading and a note underneath."""
    return tag(
        "figure",
        tag("figcaption", heading),
        *body,
        tag("p", note, class_="note") if note else None,
        class_="panel",
    )


def drawn_rows(
    rows: Sequence[Sequence[Child]], axis: Markup | None = None, *, class_: str = "rows"
) -> Markup:
    """Return label, drawing and words side by side, with an axis under the drawings."""
    body = [
        tag("tr", tag("th", label, scope="row"), tag("td", drawn, class_="draw"), tag("td", words))
        for label, drawn, words in rows
    ]
    foot = tag("tr", tag("td"), tag("td", axis, class_="draw"), tag("td"), class_="axis")
    return tag("table", tag("tbody", *body, foot if axis else None), class_=class_)


def isolated(text: str) -> Markup:
    """Return foreign text inside a sentence, whatever its writing direction."""
    return tag("bdi", text)


def table(
    headings: Sequence[Child], rows: Iterable[Sequence[Child]], *, class_: str = ""
) -> Markup:
    """Return a table whose first column names the row; wide ones scroll by themselves."""
    body = [
        tag(
            "tr",
            tag("th", first, scope="row"),
            *(tag("td", cell) for cell in rest),
        )
        for first, *rest in rows
    ]
    head = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in headings)))
    inner = tag("table", head, tag("tbody", *body), class_=class_ or None)
    return tag("div", inner, class_="scroll", tabindex="0")


def folded(summary: Child, *body: Child) -> Markup:
    """Return a part that opens on a click, without a script."""
    return tag("details", tag("summary", summary), *body)


def bullets(sentences: Iterable[Child], class_: str = "") -> Markup:
    """Return a list of sentences."""
    return tag("ul", join(tag("li", s) for s in sentences), class_=class_ or None)


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
