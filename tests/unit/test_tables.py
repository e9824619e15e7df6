"""Tables as text."""

from selectune.tables import aligned


def test_a_bar_in_a_name_makes_no_cell() -> None:
    lines = aligned(["name", "n"], [["x|y", "1"], ["a long name", "2"]])
    assert lines == [
        "| name        | n |",
        "| ----------- | - |",
        r"| x\|y        | 1 |",
        "| a long name | 2 |",
    ]
