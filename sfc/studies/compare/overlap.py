"""How far do the circuits of categories overlap, how much overlap could be expected, and what is it worth?

Two circuits of *one* category, each found on half of its prompts, do not overlap fully either; and two circuits found
on halves of a shuffled pool of two categories overlap as if categories did not matter. So the overlap between
categories is read between halves as well, and all three kinds of pairs are found on equally many prompts.

Circuits that score high whatever they are asked overlap, and are faithful on each other's prompts. So what circuits
transfer is compared by what those lack: the share of the score that comes back in the worse direction, and what is left
of the gap, on their own category's test prompts and on those of the others.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from sfc.stats import bootstrap_means

Weights = Mapping[str, float]
"""a circuit: its nodes, or edges, with the size of their effects"""

OVERLAP_MEASURES = {
    "jaccard": "nodes, Jaccard",
    "weighted": "nodes, weighted by their effects",
    "edge_jaccard": "edges, Jaccard",
    "edge_weighted": "edges, weighted by their effects",
}
DRAWS = 2000
CHANCES = 2.0
"""halves of one category must overlap by this many times what random circuits do, or nothing can be said"""
SHARED = 0.5
"""from this share of what halves of one category have in common, categories are said to share most of it"""


def jaccard(a: Weights, b: Weights) -> float:
    """Size of the intersection over size of the union; 1 for two empty circuits."""
    union = len(a.keys() | b.keys())
    return len(a.keys() & b.keys()) / union if union else 1.0


def weighted_overlap(a: Weights, b: Weights) -> float:
    """Jaccard's index of weights (Ruzicka 1958): the sum of the smaller ones over the sum of the larger, after each
    circuit's weights are scaled to sum to 1. 1 for two circuits without weight.
    """
    total_a, total_b = sum(a.values()), sum(b.values())
    if total_a == 0 or total_b == 0:
        return float(total_a == total_b)
    pairs = [(a.get(name, 0) / total_a, b.get(name, 0) / total_b) for name in sorted(a.keys() | b.keys())]
    return sum(min(pair) for pair in pairs) / sum(max(pair) for pair in pairs)


class Overlaps(NamedTuple):
    """Mean overlap of pairs of half-circuits, with 95 % intervals over categories (Efron 1979)."""

    within: Float[np.ndarray, " categories"]
    """of the two halves of each category"""
    between: Float[np.ndarray, "categories categories"]
    """of the halves of two categories, mean of the four pairs; on the diagonal `within`"""
    shuffled: Float[np.ndarray, " shuffles"]
    """of the halves of shuffled pools of two categories"""
    chance: float | None = None
    """what random circuits with as many nodes per site would give"""


class Verdict(NamedTuple):
    """The answer in numbers and in words."""

    within: float
    between: float
    shuffled: float | None
    chance: float | None
    difference: float
    """within - between: 0 where circuits of one category are as far apart as circuits of two"""
    difference_low: float
    difference_high: float
    words: str


def verdict(overlaps: Overlaps, seed: int) -> Verdict:
    """Is the overlap between categories that within one? Intervals are over categories, drawn again."""
    random = np.random.default_rng(seed)
    n = len(overlaps.within)
    draws = [_difference(overlaps, random.integers(0, n, n)) for _ in range(DRAWS)]
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    within, between = float(overlaps.within.mean()), float(overlaps.between[~np.eye(n, dtype=bool)].mean())
    shuffled = float(overlaps.shuffled.mean()) if len(overlaps.shuffled) else None
    figures = (within, between, shuffled, overlaps.chance, within - between, low, high)
    return Verdict(*figures, _words(*figures))


def overlap_in_words(verdicts: Mapping[str, Verdict]) -> str:
    """The answer by shared nodes, and beside it what the other measures say.

    Args:
        verdicts: by the measure's name in `OVERLAP_MEASURES`, the first that of shared nodes.
    """
    (_, first), *others = verdicts.items()
    beside = [
        f"{OVERLAP_MEASURES[name]} {other.within:.2f} and {other.between:.2f} (difference {other.difference_low:.2f} to"
        f" {other.difference_high:.2f})"
        for name, other in others
    ]
    return f"{first.words} The same by other measures: {'; '.join(beside)}." if beside else first.words


def _difference(overlaps: Overlaps, drawn: np.ndarray) -> float:
    pairs = overlaps.between[np.ix_(drawn, drawn)]
    different = drawn[:, None] != drawn[None]
    return float(overlaps.within[drawn].mean() - pairs[different].mean()) if different.any() else np.nan


def _words(
    within: float,
    between: float,
    shuffled: float | None,
    chance: float | None,
    difference: float,
    low: float,
    high: float,
) -> str:
    if chance is not None and within < CHANCES * chance:
        answer = "Not answerable here: circuits found on two halves of one category are hardly more alike than random."
    elif low <= 0:
        answer = "Nothing here tells the categories' circuits apart: those of two overlap as those of one do."
    elif between >= SHARED * within:
        answer = "The circuits of two categories share most of what those of one share; the latter are more alike."
    else:
        answer = "The circuits of two categories share less than half of what those of one share."
    pools = "" if shuffled is None else f"; two halves of shuffled pools of two categories {shuffled:.2f}"
    at_random = "" if chance is None else f", random ones by {chance:.3f}"
    return (
        f"{answer} Circuits found on two halves of one category overlap by {within:.2f}, on halves of two categories by"
        f" {between:.2f}{pools}{at_random}. The difference of the first two is {difference:.2f}"
        f" (95 % interval over categories {low:.2f} to {high:.2f})."
    )


def between_halves(table: pd.DataFrame, categories: Sequence[str]) -> Float[np.ndarray, "categories categories"]:
    """The overlaps of halves by Jaccard's index, from the rows of `overlap.csv`."""
    place = {category: number for number, category in enumerate(categories)}
    between = np.full((len(place), len(place)), np.nan)
    first, second = (table[side].map(place).to_numpy() for side in ("a", "b"))
    between[first, second] = between[second, first] = table["jaccard_halves"]
    return between


def cluster(overlap: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "merges 4"]:
    """Average linkage of the distances 1 - overlap, as scipy writes it; the diagonal does not count."""
    distance = 1 - (overlap + overlap.T) / 2
    np.fill_diagonal(distance, 0)
    return linkage(squareform(np.clip(distance, 0, None), checks=False), "average")


def shared_core(circuits: Sequence[Weights]) -> list[str]:
    """Nodes of more than half of the circuits, most shared first."""
    counts: dict[str, int] = {}
    for circuit in circuits:
        for name in circuit:
            counts[name] = counts.get(name, 0) + 1
    core = [name for name, count in counts.items() if 2 * count > len(circuits)]
    return sorted(core, key=lambda name: (-counts[name], name))


TRANSFER_MEASURES = {
    "recovered": "recovered, in the direction in which less is",
    "agreement": "agreement",
    "gap_kept": "gap kept",
    "separation": "separation",
    "faithfulness": "faithfulness",
}
"""figures of `transfer.csv`; of these, a circuit that refuses whatever it is asked has the last alone"""
_DECIDING = ("recovered", "gap_kept")


class Transfer(NamedTuple):
    """A figure of circuits on test prompts, with the 95 % interval of its difference over categories of prompts."""

    own: float
    """mean over categories of the category's own circuit"""
    other: float
    """mean over categories of all others' circuits"""
    difference: float
    difference_low: float
    difference_high: float


def with_recovered(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `recovered`, the lesser of the two directions; missing where one of them is."""
    directions = rows[["recovered_toxic", "recovered_safe"]].astype(float)
    return rows.assign(recovered=directions.min(axis=1, skipna=False))


def by_category(transfer: pd.DataFrame, figure: str) -> pd.DataFrame:
    """A figure of each category's circuit (rows) on the test prompts of each category (columns)."""
    return with_recovered(transfer).pivot(index="circuit", columns="prompts", values=figure).astype(float)


def measured_transfer(transfer: pd.DataFrame, seed: int) -> dict[str, Transfer]:
    """Those of `TRANSFER_MEASURES` that are known of every circuit on every category's prompts."""
    tables = {name: by_category(transfer, name) for name in TRANSFER_MEASURES}
    return {name: _transfer(table.to_numpy(), seed) for name, table in tables.items() if table.notna().all(axis=None)}


def _transfer(table: Float[np.ndarray, "circuits prompts"], seed: int) -> Transfer:
    own = np.diag(table)
    other = (table.sum(0) - own) / (len(table) - 1)
    mean, low, high = (float(ends[0]) for ends in bootstrap_means((own - other)[:, None], seed))
    return Transfer(float(own.mean()), float(other.mean()), mean, low, high)


def transfer_in_words(found: Mapping[str, Transfer]) -> str:
    """What the figures allow to say."""
    from sfc.circuits.proof import SMALL  # where torch is imported; the tables above are read without it

    deciding = [name for name in _DECIDING if name in found]
    if not deciding:
        return (
            "Whether these circuits decide is not measurable here: prompts of the two sides score too much alike, so"
            " that nothing is said of what the overlap means."
        )
    told = "; ".join(
        f"{TRANSFER_MEASURES[name]} {of.own:.2f} on their own category's test prompts and {of.other:.2f} on the others'"
        f" (difference {of.difference:.2f}, 95 % interval over categories {of.difference_low:.2f} to"
        f" {of.difference_high:.2f})"
        for name, of in found.items()
        if name in (*_DECIDING, "agreement")
    )
    if all(found[name].own < SMALL for name in deciding):
        return (
            "The circuits do not tell the two sides apart, so that their overlap says nothing of how the model does:"
            f" {told}."
        )
    return f"What the circuits restore, on both sides: {told}."
