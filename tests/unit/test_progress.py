"""A silent progress takes the same calls and says nothing."""

import pytest

from selectune.progress import Progress, Silent


def test_silent_takes_every_call_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress: Progress = Silent()
    with progress.phase("score", None, "examples") as advance:
        advance(3)
    progress.note("a note")
    assert capfd.readouterr() == ("", "")
