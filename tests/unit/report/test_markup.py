"""Text stays text, whatever it holds."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from selectune.report.markup import (
    Markup,
    coordinate,
    join,
    printable,
    shortened,
    split_long,
    tag,
    width_in_columns,
)

_ANY_TEXT = st.text(st.characters(codec=None, categories=None))


class _Reader(HTMLParser):
    """What a browser would see: tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(_ANY_TEXT, _ANY_TEXT)
def test_any_text_comes_back_as_text_and_adds_no_element(child: str, value: str) -> None:
    page = tag("p", child, title=value)
    seen = _Reader(page)
    assert seen.tags == [("p", {"title": printable(value)})]
    assert seen.text == printable(child)
    page.encode()  # no lone surrogate is left


def test_markup_is_not_escaped_twice_and_nothing_is_left_out_for_none() -> None:
    inner = tag("b", "1 < 2")
    assert tag("p", inner, None, " & ") == "<p><b>1 &lt; 2</b> &amp; </p>"
    assert join(["<", inner]) == "&lt;<b>1 &lt; 2</b>"
    assert isinstance(inner, Markup)


def test_attributes_are_named_and_written_as_html_has_them() -> None:
    made = tag("td", class_="a", aria_label='"x"', hidden=True, title=None, width=2.5)
    assert made == '<td class="a" aria-label="&quot;x&quot;" hidden width="2.5"></td>'
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_control_characters_become_visible() -> None:
    assert printable("a\x00b\tc\r\nd\x1b\x85\ud800") == "a␀b\tc\nd␛\ufffd\ufffd"


@given(_ANY_TEXT.filter(str.strip), st.integers(2, 30))
def test_a_shortened_text_fits_its_columns(text: str, columns: int) -> None:
    short = shortened(text, columns)
    assert width_in_columns(short) <= columns
    flat = " ".join(text.split())
    assert short == flat or (short.endswith("…") and flat.startswith(short[:-1]))


@given(_ANY_TEXT, st.integers(1, 40))
def test_splitting_loses_nothing_and_keeps_short_texts_whole(text: str, limit: int) -> None:
    start, rest = split_long(text, limit)
    assert start + rest == text
    if len(text) <= limit:
        assert rest == ""


def test_long_texts_are_cut_between_words_and_never_inside_a_letter() -> None:
    assert split_long("river " * 100, 100)[0] == ("river " * 17)[:-1][:101].rsplit(" ", 1)[0]
    start, rest = split_long("e\u0301" * 100, 101)
    assert len(start) % 2 == 0
    assert not rest.startswith("\u0301")


@given(st.floats(-1e6, 1e6))
def test_coordinates_are_plain_decimals_close_to_the_number(value: float) -> None:
    written = coordinate(value)
    assert "e" not in written
    assert abs(float(written) - value) <= 0.005 + 1e-9
