"""How far do the circuits of categories overlap, how much overlap could be expected, and what is it worth?

Two circuits of *one* category, each found on half of its prompts, do not overlap fully either; and two circuits found
on halves of a shuffled pool of two categories overlap as if categories did not matter. So the overlap between
categories is read between halves as well, and all three kinds of pairs are found on equally many prompts.

Circuits that score high whatever they are asked overlap, and are faithful on each other's prompts. So what circuits
transfer is compared by what those lack: the share of the score that comes back in the worse direction, and what is left
of the gap, on their own category's test prompts and on those of the others.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from sfc.stats import DRAWS, bootstrap_means

Weights = Mapping[str, float]
"""a circuit: its nodes, or edges, with the size of their effects"""

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


class Measure(NamedTuple):
    """A measure of overlap."""

    title: str
    part: str
    """of circuits: `nodes` or `edges`"""
    overlap: Callable[[Weights, Weights], float]


OVERLAP_MEASURES = {
    "jaccard": Measure("nodes, Jaccard", "nodes", jaccard),
    "weighted": Measure("nodes, weighted by their effects", "nodes", weighted_overlap),
    "edge_jaccard": Measure("edges, Jaccard", "edges", jaccard),
    "edge_weighted": Measure("edges, weighted by their effects", "edges", weighted_overlap),
}


class Found(NamedTuple):
    """The circuits of a comparison: of each its nodes, or its edges, with the sizes of their effects."""

    whole: dict[str, Weights]
    halves: dict[str, list[Weights]]
    shuffled: list[list[Weights]]


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


def overlaps_of(found: Found, categories: Sequence[str], measure: Callable[[Weights, Weights], float]) -> Overlaps:
    """What pairs of halves have in common, and pairs of halves of shuffled pools."""
    halves = [found.halves[category] for category in categories]
    within = np.array([measure(*pair) for pair in halves])
    between = np.diag(within)
    for i, j in itertools.permutations(range(len(categories)), 2):
        between[i, j] = np.mean([measure(a, b) for a in halves[i] for b in halves[j]])
    return Overlaps(within, between, np.array([measure(*pair) for pair in found.shuffled]))


def overlap_table(
    tables: Mapping[str, Overlaps],
    found: Mapping[str, Found],
    measures: Mapping[str, Measure],
    categories: Sequence[str],
) -> pd.DataFrame:
    """One row per pair of categories: overlaps of halves (`…_halves`) and of the whole circuits."""
    rows = []
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(categories), 2):
        row: dict[str, Any] = {"a": a, "b": b}
        for name, (_, part, overlap) in measures.items():
            row[f"{name}_halves"] = tables[name].between[i, j]
            row[name] = overlap(found[part].whole[a], found[part].whole[b])
        rows.append(row)
    return pd.DataFrame(rows)


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
    words: str = ""


def verdict(overlaps: Overlaps, seed: int) -> Verdict:
    """Is the overlap between categories that within one? Intervals are over categories, drawn again."""
    random = np.random.default_rng(seed)
    n = len(overlaps.within)
    draws = [_difference(overlaps, random.integers(0, n, n)) for _ in range(DRAWS)]
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    within, between = float(overlaps.within.mean()), float(overlaps.between[~np.eye(n, dtype=bool)].mean())
    shuffled = float(overlaps.shuffled.mean()) if len(overlaps.shuffled) else None
    found = Verdict(within, between, shuffled, overlaps.chance, within - between, low, high)
    return found._replace(words=_words(found))


def overlap_in_words(verdicts: Mapping[str, Verdict]) -> str:
    """The answer by shared nodes, and beside it what the other measures say.

    Args:
        verdicts: by the measure's name in `OVERLAP_MEASURES`, the first that of shared nodes.
    """
    (_, first), *others = verdicts.items()
    beside = [
        f"{OVERLAP_MEASURES[name].title} {other.within:.2f} and {other.between:.2f} (difference"
        f" {other.difference_low:.2f} to {other.difference_high:.2f})"
        for name, other in others
    ]
    return f"{first.words} The same by other measures: {'; '.join(beside)}." if beside else first.words


def _difference(overlaps: Overlaps, drawn: np.ndarray) -> float:
    pairs = overlaps.between[np.ix_(drawn, drawn)]
    different = drawn[:, None] != drawn[None]
    return float(overlaps.within[drawn].mean() - pairs[different].mean()) if different.any() else np.nan


def _words(of: Verdict) -> str:
    if of.chance is not None and of.within < CHANCES * of.chance:
        answer = "Not answerable here: circuits found on two halves of one category are hardly more alike than random."
    elif of.difference_low <= 0:
        answer = "Nothing here tells the categories' circuits apart: those of two overlap as those of one do."
    elif of.between >= SHARED * of.within:
        answer = "The circuits of two categories share most of what those of one share; the latter are more alike."
    else:
        answer = "The circuits of two categories share less than half of what those of one share."
    pools = "" if of.shuffled is None else f"; two halves of shuffled pools of two categories {of.shuffled:.2f}"
    at_random = "" if of.chance is None else f", random ones by {of.chance:.3f}"
    return (
        f"{answer} Circuits found on two halves of one category overlap by {of.within:.2f}, on halves of two categories"
        f" by {of.between:.2f}{pools}{at_random}. The difference of the first two is {of.difference:.2f}"
        f" (95 % interval over categories {of.difference_low:.2f} to {of.difference_high:.2f})."
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
    counts = Counter(itertools.chain.from_iterable(circuits))
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
