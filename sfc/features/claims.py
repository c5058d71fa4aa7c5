"""Claims about where a feature fires, made on some contexts and scored on others.

A *predicate* is a simple thing that holds of a context or not: its prompt is toxic, its token is “kill”. A *clause* is
a predicate, or several of one kind of which any may hold: “kill” or “stab”. A *claim* is at most three clauses of
different kinds; it says that the feature is the stronger, the more of them hold.

How well a claim tells where the feature fires is an AUROC, as in detection scoring (Paulo et al. 2024): how often it
ranks a context in which the feature is strong above one in which it is quiet, ties counted half. Features at template
tokens are rarely zero, and their weak values mean little. So nothing is called firing or not by a threshold: strong
contexts are drawn in proportion to how far the value is above the feature's mean, quiet ones in proportion to how far
it is below. For a feature that is zero nearly everywhere the former are those in which it fires, by its value, and the
latter all others, alike. The mean is that of the contexts that the claim is made on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

CLEAR = 0.7
"""the least score of a label that is not called unclear"""
_MOST_CLAUSES, _MOST_PREDICATES = 3, 4
_CLAUSE_GAIN, _PREDICATE_GAIN = 0.01, 0.008
"""what a further clause, and a further predicate in it, must add to the AUROC"""
_ALIKE = 0.002
"""predicates whose AUROCs differ by less are equally good: the first one is taken"""


class Predicates(NamedTuple):
    """What can be said of some contexts, what is to be preferred where it tells as much first."""

    kinds: list[str]
    texts: list[str]
    holds: sparse.csr_array
    """ones where a predicate (row) holds of a context (column)"""
    joined: frozenset[str]
    """the kinds of which a clause may name several predicates"""

    def at(self, contexts: Bool[np.ndarray, " contexts"]) -> "Predicates":
        """The predicates of some of the contexts."""
        return self._replace(holds=sparse.csr_array(self.holds[:, np.flatnonzero(contexts)]))


Clause = tuple[int, ...]
"""the numbers of its predicates"""
Claim = tuple[Clause, ...]
"""its clauses, the most telling first"""


def make_claims(values: Float[np.ndarray, "contexts features"], predicates: Predicates) -> list[Claim]:
    """The claim for each feature: clauses, and predicates within them, are added while each adds enough to the AUROC.

    A feature about which nothing can be said has an empty claim.
    """
    n_features = values.shape[1]
    claims: list[list[Clause]] = [[] for _ in range(n_features)]
    if not predicates.kinds or not len(values):
        return [() for _ in claims]
    kinds = np.array(predicates.kinds)
    joined = np.isin(kinds, list(predicates.joined))
    weights = _weights(values, values.mean(0))
    level = np.zeros(values.shape, dtype=np.int8)
    reached = np.full(n_features, 0.5)
    used = np.zeros((n_features, len(kinds)), dtype=bool)
    going = np.arange(n_features)
    for _ in range(_MOST_CLAUSES):
        gains = np.where(used[going], 0, _raised(weights, level, np.ones_like(level, dtype=bool), predicates, going))
        best, found = _best(gains)
        further = found >= reached[going] + _CLAUSE_GAIN
        going, best, found = going[further], best[further], found[further]
        if not len(going):
            break
        clauses = [[int(number)] for number in best]
        member = np.zeros(values.shape, dtype=bool)
        member[:, going] = _holding(predicates, best)
        growing = np.flatnonzero(joined[best])
        for _ in range(_MOST_PREDICATES - 1):
            features = going[growing]
            gains = _raised(weights, level + member, ~member, predicates, features)
            gains[kinds[None, :] != kinds[best[growing], None]] = 0
            number, value = _best(gains)
            further = value >= found[growing] + _PREDICATE_GAIN
            growing, number = growing[further], number[further]
            if not len(growing):
                break
            found[growing] = value[further]
            for place, added in zip(growing, number, strict=True):
                clauses[place].append(int(added))
            member[:, going[growing]] |= _holding(predicates, number)
        for feature, clause in zip(going, clauses, strict=True):
            claims[feature].append(tuple(clause))
        level += member
        reached[going] = found
        used[going] |= kinds[None, :] == kinds[best, None]
    return [tuple(claim) for claim in claims]


def levels(claim: Claim, predicates: Predicates) -> Int[np.ndarray, " contexts"]:
    """How many clauses of a claim hold of each context."""
    counts = np.zeros_like(predicates.holds.sum(0), dtype=np.int64)
    for clause in claim:
        counts += predicates.holds[list(clause)].sum(0) > 0
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


def _raised(
    weights: _Weights,
    level: Int[np.ndarray, "contexts features"],
    free: Bool[np.ndarray, "contexts features"],
    predicates: Predicates,
    features: Sequence[int] | np.ndarray,
) -> Float[np.ndarray, "chosen predicates"]:
    """For some features the AUROC of each predicate: of the levels, one higher where it holds of a free context."""
    level, free = level[:, features], free[:, features]
    n_levels = int(level.max(initial=0)) + 1
    mass = np.zeros((n_levels + 1, 2, len(features), len(predicates.kinds)))
    for number in range(n_levels):
        at = level == number
        for side, weight in enumerate(weights):
            here = weight[:, features] * at
            moved = (predicates.holds @ (here * free)).T
            mass[number, side] += here.sum(0)[:, None] - moved
            mass[number + 1, side] += moved
    strong, quiet = mass[:, 0], mass[:, 1]
    return (strong * (quiet.cumsum(0) - quiet / 2)).sum(0)


def _best(
    gains: Float[np.ndarray, "features predicates"],
) -> tuple[Int[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """For each feature the predicate to take, and its AUROC."""
    best = (gains > gains.max(1, keepdims=True) - _ALIKE).argmax(1)
    return best, np.take_along_axis(gains, best[:, None], 1)[:, 0]


def _holding(predicates: Predicates, numbers: np.ndarray) -> Bool[np.ndarray, "contexts numbers"]:
    return predicates.holds[numbers].toarray().T > 0
