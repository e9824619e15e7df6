import random

import pytest

from selectune.data import duplicates, leakage, near_duplicates, plain_text, read_examples
from selectune.data.checks import _WORD  # pyright: ignore[reportPrivateUsage]


def test_a_pool_row_that_equals_a_target_or_heldout_row_is_a_leak() -> None:
    pool = read_examples([{"text": t} for t in "abcda"])
    target = read_examples([{"text": "a"}, {"text": "x"}], what="target")
    heldout = {"task": read_examples([{"text": "c"}], what="heldout")}
    report = leakage(pool, {"qa": target}, heldout)
    assert report.n == 3
    assert report.ids == (pool[0].id, pool[2].id, pool[4].id)
    assert report.matches[pool[0].id] == "target qa, target[0]"
    assert report.matches[pool[2].id] == "held-out task, heldout[0]"
    assert leakage(pool, target, []).n == 2
    assert leakage(target, [], heldout["task"]).n == 0


def test_the_same_words_in_another_form_are_still_the_same_row() -> None:
    pool = read_examples([{"conversations": [{"from": "gpt", "value": "a"}]}])
    target = read_examples([{"messages": [{"role": "assistant", "content": "a"}]}])
    assert leakage(pool, target, []).n == 1


def test_every_repetition_points_to_the_first() -> None:
    pool = read_examples([{"text": t} for t in "abaca"])
    report = duplicates(pool)
    assert report.matches == {pool[2].id: pool[0].id, pool[4].id: pool[0].id}
    assert (report.n, report.ids) == (2, (pool[2].id, pool[4].id))


def slow_near_duplicates(texts: list[str], threshold: float) -> dict[int, int]:
    """Compare each text with every kept one before it."""
    sets = []
    for text in texts:
        words = _WORD.findall(text.lower())
        last = max(1, len(words) - 4)
        sets.append({tuple(words[k : k + 5]) for k in range(last)})
    found: dict[int, int] = {}
    for k, grams in enumerate(sets):
        for j in range(k):
            alike = len(sets[j] & grams) / len(sets[j] | grams)
            if j not in found and alike >= threshold:
                found[k] = j
                break
    return found


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_copies_are_those_that_comparing_all_pairs_finds(threshold: float) -> None:
    rng = random.Random(1)
    texts = ["", "one two", "ONE  two", "one, two"]
    for _ in range(12):
        words = [rng.choice("abcdefgh") * rng.randint(1, 4) for _ in range(40)]
        texts.append(" ".join(words))
        for n_changes in (1, 1, 2, 4):
            changed = list(words)
            for _ in range(n_changes):
                changed[rng.randrange(40)] = "new"
            texts.append(" ".join(changed))
    rng.shuffle(texts)
    examples = read_examples([{"text": text or "-"} for text in texts])
    expected = slow_near_duplicates([plain_text(e.content) for e in examples], threshold)
    assert len(expected) > 1
    found = near_duplicates(examples, threshold)
    assert found.matches == {examples[k].id: examples[j].id for k, j in expected.items()}


def test_the_first_in_the_given_order_is_kept() -> None:
    examples = read_examples([{"text": "a b c d e f"}, {"text": "A b c d e f"}])
    assert near_duplicates(examples).ids == (examples[1].id,)
    assert near_duplicates(examples[::-1]).ids == (examples[0].id,)
