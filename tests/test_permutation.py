"""Permuted labels: by brute force, on data without a signal, on data with one; and the pairs they are permuted in."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfc.circuits.methods.correlation import permutation_test, permuted_labels, strata
from sfc.core.errors import UserError
from sfc.data.or_bench import load_prompts
from sfc.data.similarity import listed_topics, topic_pairs
from sfc.stats import pearson

MINI = Path(__file__).parents[1] / "sfc" / "data" / "mini"
Q, DRAWS = 0.1, 200
BOUND = Q + 2 * np.sqrt(Q * (1 - Q) / DRAWS)


def without_signal(random: np.random.Generator, n_pairs: int, n_features: int) -> np.ndarray:
    """Sparse features of every firing rate with heavy tails, correlated with each other and within pairs."""
    rate = random.uniform(0.02, 0.9, n_features)
    shared = random.normal(size=(2 * n_pairs, 5)) @ random.normal(size=(5, n_features)) / 3
    of_pair = np.repeat(random.normal(size=(n_pairs, n_features)), 2, axis=0)
    drive = shared + of_pair + random.normal(size=(2 * n_pairs, n_features))
    size = np.exp(random.normal(size=drive.shape))
    return np.where(drive > np.quantile(drive, 1 - rate, axis=0).diagonal(), size, 0)


def coin_labels(random: np.random.Generator, n_pairs: int) -> np.ndarray:
    first = random.random(n_pairs) < 0.5
    return np.stack([first, ~first], axis=1).ravel()


def adjacent(n_pairs: int) -> list[tuple[int, int]]:
    return [(2 * i, 2 * i + 1) for i in range(n_pairs)]


def test_without_a_signal_the_false_discovery_proportion_stays_within_its_bound() -> None:
    """Every discovery is false here, so that the proportion is 1 as soon as there is one."""
    proportions = []
    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        features, labels = without_signal(random, 25, 150), coin_labels(random, 25)
        test = permutation_test(features, labels, adjacent(25), draws=100, min_firing=5, seed=draw)
        proportions.append(float((test.q_value <= Q).any()))
    assert np.mean(proportions) <= BOUND


def test_beside_a_signal_few_discoveries_are_false_and_the_signal_is_found() -> None:
    proportions, found = [], []
    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        features, labels = without_signal(random, 25, 150), coin_labels(random, 25)
        features[:, :15] = np.where(labels[:, None] ^ (random.random((50, 15)) < 0.1), features[:, :15] + 1, 0)
        discovered = permutation_test(features, labels, adjacent(25), draws=100, min_firing=5, seed=draw).q_value <= Q
        proportions.append(discovered[15:].sum() / max(discovered.sum(), 1))
        found.append(discovered[:15].mean())
    assert np.mean(proportions) <= BOUND and np.mean(found) > 0.8


def test_p_values_are_those_of_all_permutations() -> None:
    """Few pairs, many draws: shares of the pooled null among the 2^5 possible permutations."""
    random = np.random.default_rng(0)
    features, labels = without_signal(random, 5, 12), coin_labels(random, 5)
    firing = (features > 0).sum(0)
    everything = []
    for swaps in product([False, True], repeat=5):
        flips = np.repeat(swaps, 2)
        everything.append(np.abs(pearson(features, (labels ^ flips)[:, None])[:, 0]))
    test = permutation_test(features, labels, adjacent(5), draws=20_000, min_firing=3, seed=0)
    tested = firing >= 3
    assert (test.tested == tested).all() and 2 < tested.sum() < 12
    null, r = np.array(everything)[:, tested].ravel(), np.abs(pearson(features, labels[:, None])[:, 0])
    expected = [(null >= value - 1e-9).mean() if is_tested else 1 for value, is_tested in zip(r, tested, strict=True)]
    np.testing.assert_allclose(test.p_value, expected, atol=0.01)
    assert (test.q_value[~tested] == 1).all() and (test.q_value >= test.p_value).all()


def test_rare_features_are_compared_with_rare_ones() -> None:
    """A feature that fires five times, always with the label, is nothing among others that fire as rarely; all of
    them pooled with frequent ones would say otherwise."""
    firing = np.array([5, 90, 5, 40, 6, 91, 41, 3] * 20)
    groups = strata(firing, firing >= 5)
    assert sorted(np.concatenate(groups).tolist()) == np.flatnonzero(firing >= 5).tolist()
    ranges = [(firing[group].min(), firing[group].max()) for group in groups]
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))
    assert len(groups) == 7 and strata(firing, firing > 100) == []


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_labels_are_swapped_within_pairs_only(seed: int, n_pairs: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.concatenate([coin_labels(random, n_pairs), [True, True, False]])
    permuted = permuted_labels(labels, adjacent(n_pairs), 50, seed)
    assert (permuted[2 * n_pairs :] == labels[2 * n_pairs :, None]).all()
    assert (permuted[: 2 * n_pairs : 2] ^ permuted[1 : 2 * n_pairs : 2]).all()
    if n_pairs:
        assert 0.2 < (permuted[: 2 * n_pairs] == labels[: 2 * n_pairs, None]).mean() < 0.8


def test_without_pairs_nothing_is_proved() -> None:
    labels = np.array([True] * 30 + [False] * 30)
    test = permutation_test(labels[:, None].astype(float) + 0.1, labels, [], draws=9, min_firing=1, seed=0)
    assert test.p_value.tolist() == [1]


def test_topics_are_paired_by_their_rare_words() -> None:
    texts = ["How do I make a bomb?", "How do I bake bread?", "Threaten my neighbour", "Greet the neighbours", "Bread!"]
    labels = np.array([True, False, True, False, False])
    assert topic_pairs(texts, labels) == [(0, 1), (2, 3)]
    assert topic_pairs(texts, ~labels) == [(1, 0), (3, 2)]
    assert topic_pairs(texts, labels, [7, 0, 1, 1, 7]) == [(0, 4), (2, 3)]
    assert topic_pairs(texts, np.ones(5, dtype=bool)) == []
    assert topic_pairs(["", "!"], np.array([True, False])) == [(0, 1)]


def test_the_embedded_prompts_are_paired_within_their_topics() -> None:
    frame, _ = load_prompts(MINI)
    topics = listed_topics(MINI, frame["original_source"].tolist())
    assert topics is not None and np.bincount(topics).tolist() == [10] * 200
    listed = pd.read_csv(MINI / "topics.csv")["category"].to_numpy()
    assert (listed[topics] == frame["category"]).all()
    labels = frame["refusal_label"].to_numpy(dtype=bool)
    pairs = topic_pairs(frame["prompt"].tolist(), labels, topics)
    assert len(pairs) == 1000 and all(topics[a] == topics[b] for a, b in pairs)
    assert len({end for pair in pairs for end in pair}) == 2000


def test_topics_must_divide_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,category\nx,violence\n\ny,violence\nz,violence\nw,violence\n")
    assert listed_topics(tmp_path, ["a.csv:2"]) is None
    (tmp_path / "topics.csv").write_text("category,topic\nviolence,q\nviolence,r\n")
    assert listed_topics(tmp_path, ["a.csv:6", "a.csv:2", "a.csv:4"]) == [1, 0, 0]
    (tmp_path / "topics.csv").write_text("category,topic\nviolence,q\nviolence,r\nviolence,s\n")
    with pytest.raises(UserError, match="no multiple of the 3 topics"):
        listed_topics(tmp_path, ["a.csv:2"])
