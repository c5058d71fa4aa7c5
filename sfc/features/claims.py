"""Claims about where a feature fires, made on some contexts and scored on others.

A *predicate* is a simple thing that holds of a context or not: its prompt is toxic, its token is “kill”. A *claim* is
at most twelve of them, each of which speaks for the feature or against it: the feature is said to be the stronger,
the more of the former hold and the fewer of the latter.

How well a claim tells where the feature fires is an AUROC, as in detection scoring (Paulo et al. 2024): how often it
ranks a context in which the feature is strong above one in which it is quiet, ties counted half. Features at template
tokens are rarely zero, and their weak values mean little. So nothing is called firing or not by a threshold: strong
contexts are drawn in proportion to how far the value is above the feature's mean, quiet ones in proportion to how far
it is below. For a feature that is zero nearly everywhere the former are those in which it fires, by its value, and the
latter all others, alike. The mean is that of the contexts that the claim is made on.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

CLEAR = 0.7
"""the least score of a label that is not called unclear"""
_MOST_TERMS = 12
_GAIN = 0.003
"""what a further predicate must add to the AUROC"""
_ALIKE = 0.002
"""terms whose AUROCs differ by less are equally good: the first one is taken"""
_FEATURES_AT_ONCE = 64


class Predicates(NamedTuple):
    """What can be said of some contexts, what is to be preferred where it tells as much first."""

    kinds: list[str]
    texts: list[str]
    holds: sparse.csr_array
    """ones where a predicate (row) holds of a context (column)"""

    def at(self, contexts: Bool[np.ndarray, " contexts"]) -> "Predicates":
        """The predicates of some of the contexts."""
        return self._replace(holds=sparse.csr_array(self.holds[:, np.flatnonzero(contexts)]))


class Term(NamedTuple):
    """A predicate of a claim, by its number."""

    predicate: int
    sign: int
    """1 where it speaks for the feature, -1 where it speaks against it"""


Claim = tuple[Term, ...]
"""its terms, the most telling first"""


def make_claims(values: Float[np.ndarray, "contexts features"], predicates: Predicates) -> list[Claim]:
    """The claim for each feature: terms are added while each adds enough to the AUROC.

    A feature about which nothing can be said has an empty claim.
    """
    blocks = (values[:, first : first + _FEATURES_AT_ONCE] for first in range(0, values.shape[1], _FEATURES_AT_ONCE))
    return [claim for block in blocks for claim in _claims(block, predicates)]


def _claims(values: Float[np.ndarray, "contexts features"], predicates: Predicates) -> list[Claim]:
    n_features, n_predicates = values.shape[1], len(predicates.kinds)
    claims: list[list[Term]] = [[] for _ in range(n_features)]
    if not n_predicates or not len(values):
        return [() for _ in claims]
    weights = _weights(values, values.mean(0))
    level = np.zeros(values.shape, dtype=np.int8)
    reached = np.full(n_features, 0.5)
    used = np.zeros((n_features, 2 * n_predicates), dtype=bool)
    going = np.arange(n_features)
    for _ in range(_MOST_TERMS):
        best, found = _best(np.where(used[going], 0, _with_one_more(weights, level, predicates, going)))
        further = found >= reached[going] + _GAIN
        going, best, found = going[further], best[further], found[further]
        if not len(going):
            break
        against, numbers = np.divmod(best, n_predicates)
        signs = 1 - 2 * against
        for feature, number, sign in zip(going, numbers, signs, strict=True):
            claims[feature].append(Term(int(number), int(sign)))
            used[feature, [number, number + n_predicates]] = True
        level[:, going] += (signs * (predicates.holds[numbers].toarray().T > 0)).astype(np.int8)
        reached[going] = found
    return [tuple(claim) for claim in claims]


def levels(claim: Claim, predicates: Predicates) -> Int[np.ndarray, " contexts"]:
    """How many terms of a claim speak for the feature in each context, less those that speak against it."""
    counts = np.zeros_like(predicates.holds.sum(0), dtype=np.int64)
    for number, sign in claim:
        counts += sign * (predicates.holds[[number]].sum(0) > 0)
    return counts


def weighted_auroc(
    scores: Float[np.ndarray, " contexts"] | Int[np.ndarray, " contexts"],
    values: Float[np.ndarray, " contexts"],
    mean: float,
) -> float | None:
    """How often a score ranks a strong context above a quiet one, both drawn by how far their values are from `mean`.

    None where no value is above the mean, or none below.
    """
    order = np.unique(scores, return_inverse=True)[1]
    above, below = (np.bincount(order, np.maximum(sign * (values - mean), 0)) for sign in (1, -1))
    if not above.sum() or not below.sum():
        return None
    return float(above @ (below.cumsum() - below / 2) / (above.sum() * below.sum()))


class _Weights(NamedTuple):
    """How much contexts count, for each feature with a sum of 1, or of 0 where all its values are alike."""

    strong: Float[np.ndarray, "contexts features"]
    quiet: Float[np.ndarray, "contexts features"]


def _weights(values: Float[np.ndarray, "contexts features"], mean: Float[np.ndarray, " features"]) -> _Weights:
    away = np.asarray(values, dtype=np.float32) - mean.astype(np.float32)
    sides = np.maximum(away, 0), np.maximum(-away, 0)
    return _Weights(*(side / np.maximum(side.sum(0), np.finfo(np.float32).tiny) for side in sides))


def _with_one_more(
    weights: _Weights, level: Int[np.ndarray, "contexts features"], predicates: Predicates, features: np.ndarray
) -> Float[np.ndarray, "chosen terms"]:
    """For some features the AUROC of the levels with one more term: each predicate for the feature, then each against.

    Where the predicate holds, contexts move one level up or down.
    """
    level = level[:, features] - level[:, features].min()
    shape = int(level.max()) + 3, 2, len(features), len(predicates.kinds)  # no context is in the outermost levels yet
    there, moved = np.zeros((*shape[:3], 1), dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for number in range(shape[0] - 2):
        at = level == number
        for side, weight in enumerate(weights):
            here = weight[:, features] * at
            there[number + 1, side, :, 0] = here.sum(0)
            moved[number + 1, side] = (predicates.holds @ here).T
    return np.hstack([_auroc(there - moved + np.roll(moved, sign, axis=0)) for sign in (1, -1)])


def _auroc(mass: Float[np.ndarray, "levels 2 *any"]) -> Float[np.ndarray, "*any"]:
    """From how much of the strong contexts, and of the quiet ones, each level has."""
    strong, quiet = mass[:, 0], mass[:, 1]
    return (strong * (quiet.cumsum(0) - quiet / 2)).sum(0)


def _best(
    gains: Float[np.ndarray, "features terms"],
) -> tuple[Int[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """For each feature the term to take, and its AUROC."""
    best = (gains > gains.max(1, keepdims=True) - _ALIKE).argmax(1)
    return best, np.take_along_axis(gains, best[:, None], 1)[:, 0]
