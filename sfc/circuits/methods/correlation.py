"""Methods that look at stored feature values: correlation with the label of the prompts, and magnitude.

Pearson's correlation is compared with chance: with labels permuted within pairs of one topic. In every draw the labels
of each pair (a toxic and a safe prompt on the same topic) are swapped or left, by a coin. So neither the distribution
of feature values nor what pairs have in common is assumed away, as it is by Student's t: a feature that fires on three
prompts reaches a large r by chance much more often.

Features that fire about equally often have about the same null, so that it is pooled over them: p-values are then fine
enough for corrections over tens of thousands of features with a few hundred draws. (`scipy.stats.permutation_test`
permutes within pairs too, but for each feature by itself: it could not pool.) Features that fire on too few prompts
could not be significant and are not tested.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control

from sfc.circuits.methods import CorrelationOptions, Effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.stats import pearson, standardised

STRATA = 10
"""groups of features with similar firing rates, of equal size; fewer where there are few features"""
_SMALLEST_STRATUM = 20


def rank(problem: Problem) -> Effects:
    """Correlation of each feature, aggregated over the sequence, with the label of the prompts.

    Ranked are features with |r| of at least the threshold, or the strongest n of each layer. Other nodes have no value
    to correlate and are never ranked. Attributes: `p_value` against permuted labels, and `q_value` after Benjamini and
    Hochberg (1995).

    Raises:
        UserError: all prompts have the same label.
    """
    labels, nodes = problem.labels, problem.ablation.nodes
    options = CorrelationOptions.of(problem.experiment)
    if labels.all() or not labels.any():
        raise UserError("correlation needs toxic and safe prompts; where all labels agree use --method magnitude")
    features = np.concatenate(list(problem.features.values()), axis=1)
    test = permutation_test(features, labels, problem.pairs, options.permutations, options.min_firing, seed=0)
    r, (p_value, q_value) = np.zeros(nodes.n_nodes), np.ones((2, nodes.n_nodes))
    r[nodes.is_feature] = pearson(features, labels[:, None])[:, 0]
    p_value[nodes.is_feature], q_value[nodes.is_feature] = test.p_value, test.q_value
    by_strength = np.argsort(-np.abs(r), kind="stable")
    if options.top_per_layer:
        eligible = _strongest_per_site(np.abs(r), nodes, options.top_per_layer)
    else:
        eligible = (np.abs(r) >= options.threshold) & nodes.is_feature
    ranking = by_strength[eligible[by_strength]]
    if len(ranking) == 0:
        raise UserError("no node passes the threshold: lower --set correlation.threshold=…")
    return Effects(r, np.abs(r), ranking, {"p_value": p_value, "q_value": q_value}, unit="Pearson's r with the label")


def _strongest_per_site(strength: Float[np.ndarray, " nodes"], nodes: Nodes, count: int) -> Bool[np.ndarray, " nodes"]:
    eligible = np.zeros(nodes.n_nodes, dtype=bool)
    for site in range(len(nodes.sites)):
        members = np.flatnonzero((nodes.site_numbers == site) & nodes.is_feature & (strength > 0))
        eligible[members[np.argsort(-strength[members], kind="stable")[:count]]] = True
    return eligible


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


def rank_by_magnitude(problem: Problem) -> Effects:
    """The features that fire at all on the prompts explained, by `0.7 mean |f| + 0.3 variance`, as published.

    For prompts that all have the same label, where nothing can be correlated.
    """
    wanted = problem.labels == problem.config.explains_positives
    per_site = [0.7 * np.abs(f[wanted]).mean(0) + 0.3 * f[wanted].var(0) for f in problem.features.values()]
    effect = problem.ablation.nodes.of_features(per_site, elsewhere=0.0)
    ranking = np.argsort(-effect, kind="stable")
    return Effects(effect, effect, ranking[effect[ranking] > 0], {}, unit="magnitude")
