"""Progress on a terminal counts, tells a rate, and leaves one line per phase."""

import io
import re

import pytest
from rich.console import Console

from selectune.cli.bars import Bars, duration, rate


def drawn() -> tuple[Bars, io.StringIO]:
    screen = io.StringIO()
    return Bars(Console(file=screen, force_terminal=True, width=120)), screen


def test_a_phase_leaves_one_line_with_its_count() -> None:
    bars, screen = drawn()
    with bars, bars.phase("score [pool]", 5, "examples") as advance:
        advance(2)
        advance(3)
    assert re.search(r"score \[pool\]: 5 examples in \d", screen.getvalue())


def test_a_finished_bar_is_not_drawn_again() -> None:
    bars, screen = drawn()
    with bars:
        with bars.phase("score", 5, "examples") as advance:
            advance(5)
            bars.note("half way")
        bars.note("all done")
    text = screen.getvalue()
    assert "/5" in text.split("half way")[1]
    assert "/5" not in text.split("all done")[1]


def test_a_phase_without_a_known_length_is_shown_too() -> None:
    bars, screen = drawn()
    with bars:
        with bars.phase("load", None, "files"):
            pass
        bars.note("[bold]as it is[/bold]")
    assert "load in " in screen.getvalue()
    assert "[bold]as it is[/bold]" in screen.getvalue()


def test_a_phase_that_fails_says_nothing_of_being_done() -> None:
    bars, screen = drawn()

    def fail() -> None:
        with bars.phase("tune", 3, "steps") as advance:
            advance(1)
            raise KeyError

    with bars, pytest.raises(KeyError):
        fail()
    assert "tune: 1 steps" not in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200.0, "3 min 20 s"),
     (3600.0, "1 h 0 min"), (7500.0, "2 h 5 min")],
)  # fmt: skip
def test_a_time_is_said_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("per_second", "text"), [(0.1234, "0.123"), (5.87, "5.87"), (1234.5, "1234")]
)
def test_a_rate_has_the_digits_that_mean_something(per_second: float, text: str) -> None:
    assert rate(per_second) == text
