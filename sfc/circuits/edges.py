"""Edges between nodes of neighbouring sites, and which of them a circuit has.

A kind of edge is a function from a `Problem` and a circuit's nodes to edges, registered by name in `EDGES`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from sfc.ablation.nodes import Nodes
from sfc.circuits.correlation import pearson
from sfc.circuits.edge_attribution import Pair, edge_effects
from sfc.circuits.problem import Problem


class Edge(NamedTuple):
    """An edge between two nodes, given by their numbers."""

    source: int
    target: int
    weight: float
    """signed: nats of the score for attribution, Pearson's r for correlation"""
    absolute: float
    """mean over prompts of the absolute weight where there is a weight per prompt, else |weight|"""


class Weights(NamedTuple):
    """All edges from some nodes of one site to some of the next; nodes by their numbers, weights as in `Edge`."""

    sources: Int[np.ndarray, " sources"]
    targets: Int[np.ndarray, " targets"]
    weight: Float[np.ndarray, "sources targets"]
    absolute: Float[np.ndarray, "sources targets"]


def attribution_edges(problem: Problem, members: Sequence[int]) -> list[Edge]:
    """Edges by what passes along them to first order (see `sfc.circuits.edge_attribution`), errors included.

    Kept are edges whose |weight| is at least `edge_share` of the circuit's largest, and into each node the strongest
    `edges_per_node`.
    """
    weights = attribution_weights(problem, members)
    largest = max((np.abs(between.weight).max(initial=0) for between in weights), default=0)
    return strongest_edges(weights, problem.config.edge_share * largest, problem.config.edges_per_node)


def attribution_weights(problem: Problem, members: Sequence[int]) -> list[Weights]:
    """The weights by attribution between members at neighbouring sites: means over the discovery prompts."""
    nodes, device = problem.ablation.nodes, problem.model.device
    at_site = members_at_sites(nodes, members)
    offsets = np.cumsum([0, *nodes.sizes])
    within = [
        torch.from_numpy(numbers - offset).to(device) for numbers, offset in zip(at_site, offsets[:-1], strict=True)
    ]
    pairs = [Pair(*sites, *ends) for sites, ends in zip(pairwise(nodes.sites), pairwise(within), strict=True)]
    weights = [Weights(*ends, *np.zeros((2, *map(len, ends)))) for ends in pairwise(at_site)]
    for batch, prefix in problem.runs:
        effects = edge_effects(problem, batch, prefix, pairs, problem.config.edge_tokens)
        for between, effect in zip(weights, effects, strict=True):
            per_prompt = effect.double().cpu().numpy() / problem.runs.n_prompts
            between.weight[:] += per_prompt.sum(0)
            between.absolute[:] += np.abs(per_prompt).sum(0)
    return weights


def correlation_edges(problem: Problem, members: Sequence[int]) -> list[Edge]:
    """Edges between features whose aggregated values correlate over the discovery prompts.

    The weight is Pearson's r. Kept are edges with |r| of at least `edge_threshold`, and into each node the strongest
    `edges_per_node`. Error nodes have no value to correlate, and no edges.
    """
    nodes, config = problem.ablation.nodes, problem.config
    offsets = np.cumsum([0, *nodes.sizes])
    features = [node for node in members if not nodes.is_error[node]]
    weights = []
    for i, (sources, targets) in enumerate(pairwise(members_at_sites(nodes, features))):
        upstream = problem.features[nodes.sites[i]][:, sources - offsets[i]]
        downstream = problem.features[nodes.sites[i + 1]][:, targets - offsets[i + 1]]
        r = pearson(upstream, downstream)
        weights.append(Weights(sources, targets, r, np.abs(r)))
    return strongest_edges(weights, config.edge_threshold, config.edges_per_node)


def members_at_sites(nodes: Nodes, members: Sequence[int]) -> list[Int[np.ndarray, " members"]]:
    """The members at each site, in ascending order."""
    ascending = np.sort(np.asarray(members, dtype=int))
    return [ascending[nodes.site_numbers[ascending] == site] for site in range(len(nodes.sites))]


def strongest_edges(weights: Sequence[Weights], threshold: float, edges_per_node: int) -> list[Edge]:
    """Into each target the edges of largest |weight|, of those that reach the threshold and are not zero."""
    edges = []
    for sources, targets, weight, absolute in weights:
        for column, target in enumerate(targets):
            strength = np.abs(weight[:, column])
            strongest = np.argsort(-strength, kind="stable")[:edges_per_node]
            for row in strongest[(strength[strongest] >= threshold) & (strength[strongest] > 0)]:
                ends = int(sources[row]), int(target)
                edges.append(Edge(*ends, float(weight[row, column]), float(absolute[row, column])))
    return edges


def without_dead_ends(nodes: Nodes, members: Sequence[int], edges: Sequence[Edge]) -> tuple[list[int], list[Edge]]:
    """The members from which edges lead to the last site that has any, in their order, and the edges between them."""
    site_of = nodes.site_numbers
    last = max((site_of[node] for node in members), default=0)
    alive = {node for node in members if site_of[node] == last}
    # Edges join neighbouring sites, so that all edges out of a target are seen before those into it.
    for edge in sorted(edges, key=lambda edge: -site_of[edge.source]):
        if edge.target in alive:
            alive.add(edge.source)
    return [node for node in members if node in alive], [edge for edge in edges if edge.target in alive]


EDGES: dict[str, Callable[[Problem, Sequence[int]], list[Edge]]] = {
    "attribution": attribution_edges,
    "correlation": correlation_edges,
}
