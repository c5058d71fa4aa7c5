"""Is a feature's correlation with the label more than chance? Against labels permuted within pairs of one topic.

The null is made of the data itself: in every draw the labels of each pair (a toxic and a safe prompt on the same topic)
are swapped or left, by a coin. So neither the distribution of feature values nor what pairs have in common is assumed
away, as it is by Student's t: a feature that fires on three prompts reaches a large r by chance much more often.

Features that fire about equally often have about the same null, so that it is pooled over them: p-values are then fine
enough for corrections over tens of thousands of features with a few hundred draws. Features that fire on too few
prompts could not be significant and are not tested.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control

from sfc.stats import standardised

STRATA = 10
"""groups of features with similar firing rates, of equal size; fewer where there are few features"""
_SMALLEST_STRATUM = 20


class PermutationTest(NamedTuple):
    """What chance says of each feature; 1 where a feature is not tested."""

    p_value: Float[np.ndarray, " features"]
    """share of the pooled null that is as large in size as r, r itself counted in"""
    q_value: Float[np.ndarray, " features"]
    """adjusted over the tested features (Benjamini and Hochberg 1995)"""
    tested: Bool[np.ndarray, " features"]


def permutation_test(
    features: Float[np.ndarray, "n features"],
    labels: Bool[np.ndarray, " n"],
    pairs: Sequence[tuple[int, int]],
    draws: int,
    min_firing: int,
    seed: int,
) -> PermutationTest:
    """Test Pearson's r of each feature with the labels.

    Args:
        features: not negative; 0 where a feature does not fire.
        pairs: rows whose labels are exchangeable; rows in no pair keep their labels in every draw.
        draws: how many permutations the null is made of.
        min_firing: a feature is tested if it fires on at least so many rows.
    """
    firing = (features > 0).sum(0)
    tested = firing >= min_firing
    p_value, q_value = np.ones((2, features.shape[1]))
    permuted = permuted_labels(labels, pairs, draws, seed)
    everything = standardised(np.concatenate([labels[:, None], permuted], axis=1).astype(float))
    for stratum in strata(firing, tested):
        r = np.abs(standardised(features[:, stratum]).T @ everything)
        null = np.sort(r[:, 1:], axis=None)
        # Values that are equal but for rounding count as equally large.
        smaller = np.searchsorted(null, r[:, 0] * (1 - 1e-6) - 1e-12)
        p_value[stratum] = (1 + len(null) - smaller) / (1 + len(null))
    q_value[tested] = false_discovery_control(p_value[tested])
    return PermutationTest(p_value, q_value, tested)


def permuted_labels(
    labels: Bool[np.ndarray, " n"], pairs: Sequence[tuple[int, int]], draws: int, seed: int
) -> Bool[np.ndarray, "n draws"]:
    """The labels with those of each pair swapped or not, by a coin for each pair and draw."""
    permuted = np.repeat(labels[:, None], draws, axis=1)
    if pairs:
        first, second = np.array(pairs).T
        swap = np.random.default_rng(seed).random((len(pairs), draws)) < 0.5
        permuted[first] = np.where(swap, labels[second, None], labels[first, None])
        permuted[second] = np.where(swap, labels[first, None], labels[second, None])
    return permuted


def strata(firing: Int[np.ndarray, " features"], tested: Bool[np.ndarray, " features"]) -> list[np.ndarray]:
    """The tested features in groups of similar firing counts."""
    numbers = np.flatnonzero(tested)
    by_rate = numbers[np.argsort(firing[numbers], kind="stable")]
    count = min(STRATA, len(numbers) // _SMALLEST_STRATUM)
    return [group for group in np.array_split(by_rate, max(count, 1)) if len(group)]
