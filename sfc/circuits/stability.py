"""Would other discovery prompts have given the same circuit? A bootstrap over prompts, and two halves of them.

The bootstrap costs no run of the model: effects that are means over prompts are averaged over prompts drawn with
replacement, the same draws for all nodes. The baseline and the number of nodes are taken as given.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sfc.circuits.methods import METHODS, Effects
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.stats import bootstrap_means, resampled_counts

DRAWS = 1000
_ENTRIES = 1 << 23
"""draws times nodes that are in memory at once"""


class NodeSets(NamedTuple):
    """What becomes of a circuit of n nodes where its prompts are drawn again."""

    share: Float[np.ndarray, " members"]
    """of draws in which the node is among the n of largest |effect|"""
    jaccard: float
    """mean over draws of the overlap of those n with the circuit"""


class Halves(NamedTuple):
    """Circuits found on two halves of the prompts."""

    jaccard: float
    """their overlap"""
    chance: float
    """what random circuits with as many nodes per site would have"""


def resampled_node_sets(
    by_prompt: Float[np.ndarray, "prompts nodes"],
    ranking: Int[np.ndarray, " ranked"],
    members: Sequence[int],
    seed: int,
    draws: int = DRAWS,
) -> NodeSets:
    """In every draw of the prompts, rank the nodes by |mean effect| again and see which of the members stay.

    Args:
        ranking: the nodes that may be in a circuit, best first, which also decides between equal effects.
        members: the circuit's nodes, all of them ranked.
    """
    effects, n = by_prompt[:, ranking], len(members)
    is_member = np.isin(ranking, members)
    counts = resampled_counts(len(effects), draws, np.random.default_rng(seed)).astype(effects.dtype)
    kept, overlaps = np.zeros(len(ranking)), []
    for block in np.array_split(counts, -(-counts.shape[0] * len(ranking) // _ENTRIES)):
        best = _largest(np.abs(block @ effects), n)
        kept += best.sum(0)
        shared = best[:, is_member].sum(1)
        overlaps.append(shared / (2 * n - shared))
    place = {node: place for place, node in enumerate(ranking.tolist())}
    return NodeSets(kept[[place[node] for node in members]] / draws, float(np.concatenate(overlaps).mean()))


def with_intervals(effects: Effects, members: Sequence[int], seed: int) -> Effects:
    """The effects with the ends of the members' 95 % intervals as attributes `effect_low` and `effect_high`.

    The members are the same in each draw: an interval is that of one node's effect, whatever its rank.
    """
    if effects.by_prompt is None:
        return effects
    blocks = np.array_split(members, -(-len(members) * DRAWS // _ENTRIES))
    intervals = [bootstrap_means(effects.by_prompt[:, block], seed, draws=DRAWS) for block in blocks]
    low, high = (np.concatenate(ends) for ends in zip(*((i.low, i.high) for i in intervals), strict=True))
    ends = {"effect_low": low, "effect_high": high}
    return _with_attributes(effects, members, ends)


def with_stability(
    effects: Effects, members: Sequence[int], method: str, seed: int
) -> tuple[Effects, dict[str, float | None]]:
    """The effects with `stability` of the members as an attribute, and the circuit's figures: mean `stability` and
    `stability_jaccard`. No attribute, and figures that are None, where the node set is not made by |effects| alone.
    """
    n = len(members)
    # Where dead ends have been dropped, the members are not the best nodes of the ranking by effect.
    by_effect = METHODS[method].ranked_by_effect and set(members) == set(effects.ranking[:n].tolist())
    if effects.by_prompt is None or not by_effect:
        return effects, {"stability": None, "stability_jaccard": None}
    sets = resampled_node_sets(effects.by_prompt, effects.ranking, members, seed)
    figures: dict[str, float | None] = {"stability": float(sets.share.mean()), "stability_jaccard": sets.jaccard}
    return _with_attributes(effects, members, {"stability": sets.share}), figures


def agreement_of_halves(problem: Problem, size: int, seed: int) -> Halves:
    """Discover a circuit of `size` nodes on each of two random halves of the prompts.

    Raises:
        UserError: there is only one prompt.
    """
    if problem.runs.n_prompts < 2:
        raise UserError("discovery.halves: one discovery prompt has no halves; leave it out, or take more prompts")
    nodes = problem.ablation.nodes
    rank = METHODS[problem.config.method].rank
    # From their own prompts alone: what both halves learned from would make them alike.
    found = [rank(replace(problem, runs=half, pooled=None)).ranking for half in problem.runs.halves(seed)]
    a, b = (set(ranking[:size].tolist()) for ranking in found)
    counts = np.bincount(nodes.site_numbers[[*a, *b]], minlength=len(nodes.sites)) / 2
    return Halves(len(a & b) / len(a | b), chance_overlap(counts, np.array(nodes.sizes)))


def _largest(values: Float[np.ndarray, "rows columns"], n: int) -> np.ndarray:
    """For each row, which n columns are largest; of equals the first."""
    threshold = np.partition(values, -n, axis=1)[:, -n, None]
    above, equal = values > threshold, values == threshold
    return above | (equal & (equal.cumsum(1) <= n - above.sum(1, keepdims=True)))


def _with_attributes(effects: Effects, members: Sequence[int], of_members: dict[str, np.ndarray]) -> Effects:
    attributes = dict(effects.attributes)
    for name, values in of_members.items():
        attributes[name] = np.full(len(effects.effect), np.nan)
        attributes[name][list(members)] = values
    return effects._replace(attributes=attributes)


def chance_overlap(counts: Float[np.ndarray, " sites"], widths: Float[np.ndarray, " sites"]) -> float:
    """Jaccard's index to be expected of two random circuits with so many nodes at each site, of so many there are."""
    shared = float((counts**2 / widths).sum())
    return shared / (2 * float(counts.sum()) - shared)
