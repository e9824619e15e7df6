"""Step facts become tables without losing or inventing a number."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectune.report.agreement import agreement, expected_jaccard, length_rates
from selectune.report.contents import TrainingFacts
from selectune.report.steps import Steps, columns, facts_of, mean_by_layer
from unit.report.samples import steps_of

_NUMBERS = st.none() | st.floats(-10, 10)


def facts_with(*steps: dict[str, Any], n_layers: int = 3, **more: Any) -> TrainingFacts:  # noqa: ANN401
    return TrainingFacts(arm="selected", n_layers=n_layers, records=list(enumerate(steps)), **more)


@given(st.lists(st.lists(_NUMBERS, min_size=3, max_size=3) | st.none(), min_size=1, max_size=60),
       st.integers(1, 20))  # fmt: skip
def test_columns_hold_every_step_once(told: list[list[float | None] | None], most: int) -> None:
    steps = Steps(facts_with(*({"importance": row} if row else {} for row in told)))
    table = steps.of("importance")
    assert np.isfinite(table).sum() == sum(v is not None for row in told if row for v in row)
    found = columns(steps.step, table, most, len(told))
    assert len(found.values) == min(most, len(told)) == len(found.edges) - 1
    assert (np.diff(found.edges) > 0).all()
    assert (found.edges[0], found.edges[-1]) == (0, len(told))
    for values, start, end in zip(found.values, found.edges, found.edges[1:], strict=False):
        assert end - start <= found.per_column
        inside = table[int(start) : int(end)]
        np.testing.assert_allclose(values, mean_by_layer(inside), rtol=1e-9, atol=1e-12)


def test_steps_are_read_in_order_and_the_last_telling_counts() -> None:
    records = [(3, {"tokens": [1, None]}), (1, {"tokens": [5, 6]}), (3, {"tokens": [7, None]})]
    steps = Steps(TrainingFacts(arm="a", n_layers=2, records=records))
    assert steps.step.tolist() == [1, 3]
    np.testing.assert_array_equal(steps.of("tokens"), [[5, 6], [7, np.nan]])


def test_a_step_that_does_not_say_what_was_active_is_not_counted_as_frozen() -> None:
    steps = Steps(facts_with({"active": [0, 2]}, {}, {"active": []}))
    np.testing.assert_array_equal(steps.active(), [[1, 0, 1], [np.nan, np.nan, np.nan], [0, 0, 0]])
    np.testing.assert_array_equal(mean_by_layer(steps.active()), [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"tokens": [1, 2]}, "tokens of step 0: 2 values for 3 layers"),
        ({"active": [0, 3]}, "step 0 names layers \\[3\\]"),
        ({"picks": {"7": "01"}}, "step 0 names layers \\[7\\]"),
        ({"picks": {"0": "01", "1": "011"}}, "picks of step 0: layers saw different numbers"),
    ],
)
def test_facts_that_do_not_fit_together_are_refused(step: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        facts_with(step)
    with pytest.raises(ValueError, match="2 names for 3 layers"):
        facts_with({}, layers=[4, 5])


def test_layers_get_the_numbers_that_the_records_give_them() -> None:
    def found(*steps: dict[str, Any]) -> TrainingFacts | None:
        return facts_of("a", list(enumerate(steps)), {})

    assert found() is None
    assert found({}, {"probe": {"sets": [], "losses": []}}) is None
    everything = found({"active": [1], "importance": [0.5, 0.5, 0.5]})
    assert everything is not None
    assert (everything.n_layers, everything.layers) == (3, ())
    upper = found({"active": [20], "tokens": [7, None]}, {"active": [21], "tokens": [None, 7]})
    assert upper is not None
    assert (upper.n_layers, upper.layers) == (2, [20, 21])
    named = found({"active": [20], "tokens": [7, None], "layers": [20, 24]})
    assert named is not None
    assert named.layers == [20, 24]
    unknown = found({"active": [20], "tokens": [7, None, None], "picks": {"20": "1"}})
    assert unknown is not None
    assert (unknown.n_layers, unknown.layers) == (1, [20])
    assert "2 of 3 layers were never active" in unknown.note
    assert np.isnan(Steps(unknown).of("tokens")).all()
    assert Steps(unknown).active().tolist() == [[1]]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5))
def test_the_overlap_by_chance_is_the_mean_over_all_draws(a: int, b: int, n: int) -> None:
    a, b = min(a, n), min(b, n)
    first = set(range(a))
    overlaps = [
        len(first & set(second)) / len(first | set(second)) if a + b else 0.0
        for second in itertools.combinations(range(n), b)
    ]
    assert expected_jaccard(a, b, n) == pytest.approx(np.mean(overlaps))


def test_picks_are_counted_and_compared_as_one_would_by_hand() -> None:
    facts = steps_of(n_layers=5, n_steps=12, n_active=3, batch=6)
    found = agreement(Steps(facts).picks(), 5)
    told = [{int(k): v for k, v in facts["picks"].items()} for _, facts in facts.records]
    for layer in range(5):
        assert found.picked[layer] == sum(p.get(layer, "").count("1") for p in told)
        assert found.seen[layer] == sum(len(p.get(layer, "")) for p in told)
    for a, b in itertools.combinations(range(5), 2):
        shares: list[float] = []
        for p in told:
            if a in p and b in p:
                both = [{i for i, c in enumerate(p[k]) if c == "1"} for k in (a, b)]
                shares.append(len(both[0] & both[1]) / len(both[0] | both[1]))
        expected = np.mean(shares) if shares else np.nan
        np.testing.assert_allclose(found.same[a, b], expected)
        if shares:
            assert found.chance[a, b] == pytest.approx(expected_jaccard(3, 3, 6))


def test_layers_that_all_pick_the_same_agree_fully_and_empty_picks_say_nothing() -> None:
    alike, empty = {"0": "0110", "1": "0110"}, {"0": "0000", "1": "0000"}
    steps = Steps(facts_with({"picks": alike}, {"picks": empty}))
    found = agreement(steps.picks(), 3)
    assert found.apart(1)[0] == 1
    assert found.apart(1)[1] == pytest.approx(expected_jaccard(2, 2, 4))
    assert np.isnan(found.apart(2)).all()
    assert found.rate()[:2].tolist() == [0.25, 0.25]
    assert np.isnan(found.rate()[2])


def test_every_example_of_known_length_is_in_one_group_of_lengths() -> None:
    facts = steps_of(n_layers=4, n_steps=30, n_active=2)
    found = length_rates(Steps(facts).picks(), 4)
    assert found is not None
    seen: list[int] = []
    picked = 0
    for _, step in facts.records:
        for row in step["picks"].values():
            seen += [facts.n_tokens[i] for i in step["examples"]]
            picked += row.count("1")
    assert found.seen.sum() == len(seen)
    assert found.picked.sum() == picked
    assert found.mean() == pytest.approx(picked / len(seen))
    for label, n in zip(found.labels, found.seen.sum(0), strict=True):
        low, _, high = label.partition("–")
        assert n == sum(int(low) <= length <= int(high or low) for length in seen)


@pytest.mark.parametrize(
    "more",
    [
        {},  # no lengths are known
        {"n_tokens": {"x": 3}},  # not of these examples
        {"n_tokens": {"a": 4, "b": 4}},  # all alike
    ],
)
def test_lengths_that_say_nothing_make_no_groups(more: dict[str, Any]) -> None:
    step = {"picks": {"0": "01"}, "examples": ["a", "b"]}
    assert length_rates(Steps(facts_with(step, **more)).picks(), 3) is None


def test_ids_of_a_part_of_the_examples_are_not_guessed_to_be_the_first() -> None:
    step = {"picks": {"0": "0101"}, "examples": ["a", "b"]}
    picks = list(Steps(facts_with(step, n_tokens={"a": 1, "b": 9})).picks())
    assert np.isnan(picks[0].n_tokens).all()
