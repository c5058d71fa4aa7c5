"""Near-duplicates, against the obvious double loop."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfc.data.similarity import Pair, grams, near_duplicates


def oracle(texts: list[str], threshold: float) -> list[Pair]:
    """Every pair, one after the other."""
    sets = [grams(text) for text in texts]
    pairs = []
    for first, second in itertools.combinations(range(len(texts)), 2):
        jaccard = len(sets[first] & sets[second]) / len(sets[first] | sets[second])
        if jaccard >= threshold:
            pairs.append(Pair(first, second, jaccard))
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def assert_same(found: list[Pair], expected: list[Pair]) -> None:
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert [pair.similarity for pair in found] == pytest.approx([pair.similarity for pair in expected])


words = st.lists(st.sampled_from(["help", "me", "kill", "the", "process", "my", "neighbour's", "dog", "?"]), max_size=7)


@given(st.lists(words.map(" ".join), max_size=25), st.sampled_from([0.05, 0.2, 0.5, 0.8, 1.0]))
@settings(deadline=None)
def test_agrees_with_the_double_loop(texts: list[str], threshold: float) -> None:
    assert_same(near_duplicates(texts, threshold), oracle(texts, threshold))


@given(st.lists(st.text(max_size=12), max_size=12), st.floats(0.01, 1))
@settings(deadline=None)
def test_agrees_on_any_text(texts: list[str], threshold: float) -> None:
    assert_same(near_duplicates(texts, threshold), oracle(texts, threshold))


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    vocabulary = ["write", "letter", "threat", "aunt", "boss", "garden", "plan", "steal", "bake", "list", "cake"]
    texts = [" ".join(rng.choices(vocabulary, k=5)) for _ in range(150)]
    expected = oracle(texts, 0.3)
    assert len(expected) > 100
    monkeypatch.setattr("sfc.data.similarity._BLOCK_ROWS", 7)
    monkeypatch.setattr("sfc.data.similarity._BLOCK_PAIRS", 5)
    assert_same(near_duplicates(texts, 0.3), expected)


def test_grams() -> None:
    assert grams("Hi, you!") == {" hi y", "hi yo", "i you", " you "}
    assert grams("a") == {" a "}
    assert grams("self-harm") == grams("SELF  harm?")


def test_nothing_to_compare() -> None:
    assert near_duplicates([]) == []
    assert near_duplicates(["alone"]) == []


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_threshold_must_make_sense(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a", "b"], threshold)
