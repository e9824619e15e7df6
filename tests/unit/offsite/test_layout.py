import pytest

from selectune.errors import SelectionError
from selectune.offsite.layout import Layout


def test_without_indices_the_first_two_and_the_last_two_layers_train() -> None:
    layout = Layout.of(7)
    assert layout.adapters == (0, 1, 5, 6)
    assert layout.middle == (2, 3, 4)


def test_negative_indices_count_from_the_end_and_order_does_not_matter() -> None:
    layout = Layout.of(24, [-1, 5, 0, 18])
    assert layout.adapters == (0, 5, 18, 23)
    assert layout == Layout.of(24, [0, 5, 18, 23])
    assert sorted({*layout.adapters, *layout.middle}) == list(range(24))


@pytest.mark.parametrize(
    ("n", "adapters", "words"),
    [
        (4, None, "no middle"),
        (6, [0, 6], "no layer 6"),
        (6, [-7], "no layer -7"),
        (6, [5, -1], "layer 5 is named twice"),
        (6, [2, 2], "layer 2 is named twice"),
        (6, [], "no layer is named"),
        (3, [0, 1, 2], "all 3 layers"),
    ],
)
def test_what_is_no_split_is_refused(n: int, adapters: list[int] | None, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        Layout.of(n, adapters)
