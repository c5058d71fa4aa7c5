"""Which edges a circuit is drawn with, by what weight, and which of them are kept.

A kind of edge is a function from a `Problem` and a circuit's nodes to edges, registered by name in `EDGES`: what passes
along them to first order (see `sfc.circuits.edges`), or how far the values of features go together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.edges import Pair, Stops, all_tokens, downstream, edge_parts, ways
from sfc.circuits.nodes import Nodes, role_part
from sfc.circuits.problem import Problem
from sfc.models.batches import Batch, TemplateLayout
from sfc.stats import pearson


class Edge(NamedTuple):
    """An edge between two nodes, given by their numbers."""

    source: int
    target: int
    weight: float
    """signed: nats of the score for attribution, Pearson's r for correlation"""
    absolute: float
    """mean over prompts of the absolute weight where there is a weight per prompt, else |weight|"""
    by_role: Mapping[str, float] = {}
    """attribution: the parts of the weight that are not 0, by the roles between which they pass (see `role_part`)"""


class Weights(NamedTuple):
    """All edges from some nodes of one site to some of another; nodes by their numbers, weights as in `Edge`."""

    sources: Int[np.ndarray, " sources"]
    targets: Int[np.ndarray, " targets"]
    weight: Float[np.ndarray, "sources targets"]
    absolute: Float[np.ndarray, "sources targets"]
    parts: Float[np.ndarray, "source_groups target_groups sources targets"]
    """the weight by the groups of tokens between which it passes"""


def attribution_edges(problem: Problem, members: Sequence[int]) -> list[Edge]:
    """Edges by what passes along them to first order on `edge_prompts` of the discovery prompts, errors included.

    Kept are edges whose |weight| is at least `edge_share` of the circuit's largest, and into each node the strongest
    `edges_per_node`.
    """
    config = problem.config
    some = replace(problem, runs=problem.runs.sample(config.edge_prompts, problem.experiment.seed))
    layout = problem.ablation.baseline.layout
    weights = attribution_weights(some, members, partial(tokens_of_roles, layout=layout))
    largest = max((np.abs(between.weight).max(initial=0) for between in weights), default=0)
    return strongest_edges(weights, config.edge_share * largest, config.edges_per_node, layout.roles)


def tokens_of_roles(batch: Batch, layout: TemplateLayout) -> Bool[Tensor, "roles tokens"]:
    """The touchable tokens of each of the layout's roles."""
    place = batch.template_positions[batch.touchable] % layout.n_template_positions
    role = (place - layout.n_prefix + 1).clamp(min=0)
    return role == torch.arange(len(layout.roles), device=role.device)[:, None]


def attribution_weights(
    problem: Problem,
    members: Sequence[int],
    groups: Callable[[Batch], Bool[Tensor, "groups tokens"]] = all_tokens,
) -> list[Weights]:
    """The weights by attribution, means over the problem's prompts, for sites between which there are edges.

    Args:
        groups: the groups of a batch's tokens by which they are told apart, as `edge_parts` takes them.
    """
    nodes, device = problem.ablation.nodes, problem.model.device
    at_site = members_at_sites(nodes, members)
    within = [
        torch.from_numpy(numbers - first).to(device)
        for numbers, first in zip(at_site, nodes.first_numbers, strict=True)
    ]
    joined = site_pairs(nodes, problem.model.is_parallel)
    pairs = [Pair(nodes.sites[u], nodes.sites[d], within[u], within[d], stops) for u, d, stops in joined]
    ends = [(at_site[u], at_site[d]) for u, d, _ in joined]
    weights: list[Weights] = []
    for batch, cached in problem.runs:
        of_batch = edge_parts(problem, batch, cached, pairs, problem.config.edge_tokens, groups(batch))
        weights = weights or [
            Weights(*both, np.zeros(parts.shape[3:]), np.zeros(parts.shape[3:]), np.zeros(parts.shape[1:]))
            for both, parts in zip(ends, of_batch, strict=True)
        ]
        for between, parts in zip(weights, of_batch, strict=True):
            parts = parts.double() / problem.runs.n_prompts
            per_prompt = parts.sum((1, 2)).cpu().numpy()
            between.weight[:] += per_prompt.sum(0)
            between.absolute[:] += np.abs(per_prompt).sum(0)
            between.parts[:] += parts.sum(0).cpu().numpy()
    return weights


def correlation_edges(problem: Problem, members: Sequence[int]) -> list[Edge]:
    """Edges between features whose aggregated values correlate over the discovery prompts.

    The weight is Pearson's r. Kept are edges with |r| of at least `edge_threshold`, and into each node the strongest
    `edges_per_node`. Error nodes have no value to correlate, and no edges.
    """
    nodes, config = problem.ablation.nodes, problem.config
    at_site = members_at_sites(nodes, [node for node in members if nodes.is_feature[node]])
    values = [
        problem.features[site][:, numbers - first]
        for site, numbers, first in zip(nodes.sites, at_site, nodes.first_numbers, strict=True)
    ]
    weights = []
    for u, d, _ in site_pairs(nodes, problem.model.is_parallel):
        r = pearson(values[u], values[d])
        weights.append(Weights(at_site[u], at_site[d], r, np.abs(r), r[None, None]))
    return strongest_edges(weights, config.edge_threshold, config.edges_per_node)


def site_pairs(nodes: Nodes, is_parallel: bool = False) -> list[tuple[int, int, Stops]]:
    """Every site with each that it writes directly into, by their numbers, and where other ways between them stop.

    Args:
        is_parallel: see `Model.is_parallel`.
    """
    number, ways = {site: i for i, site in enumerate(nodes.sites)}, []
    for site, i in number.items():
        ways += [(i, number[other], stops) for other, stops in downstream(site, nodes.sites, is_parallel)]
    return ways


def members_at_sites(nodes: Nodes, members: Sequence[int]) -> list[Int[np.ndarray, " members"]]:
    """The members at each site, in ascending order."""
    ascending = np.sort(np.asarray(members, dtype=int))
    return [ascending[nodes.site_numbers[ascending] == site] for site in range(len(nodes.sites))]


def strongest_edges(
    weights: Sequence[Weights], threshold: float, edges_per_node: int, roles: Sequence[str] = ()
) -> list[Edge]:
    """Into each target the edges of largest |weight|, of those that reach the threshold and are not zero.

    Args:
        roles: the names of the groups of tokens; without names, edges have no parts.
    """
    into: dict[int, list[Edge]] = {}
    for sources, targets, weight, absolute, parts in weights:
        for column, target in enumerate(targets.tolist()):
            strength = np.abs(weight[:, column])
            strongest = np.argsort(-strength, kind="stable")[:edges_per_node]
            for row in strongest[(strength[strongest] >= threshold) & (strength[strongest] > 0)]:
                ends = int(sources[row]), target
                by_role = {
                    role_part(source, of_target): float(parts[i, j, row, column])
                    for i, source in enumerate(roles)
                    for j, of_target in enumerate(roles)
                    if parts[i, j, row, column]
                }
                edge = Edge(*ends, float(weight[row, column]), float(absolute[row, column]), by_role)
                into.setdefault(target, []).append(edge)
    # A node may have edges from several sites.
    by_strength = (sorted(edges, key=lambda edge: -abs(edge.weight)) for edges in into.values())
    return [edge for edges in by_strength for edge in edges[:edges_per_node]]


def without_dead_ends(nodes: Nodes, members: Sequence[int], edges: Sequence[Edge]) -> tuple[list[int], list[Edge]]:
    """The members from which edges lead to the logits, in their order, and the edges between them.

    Of the sites that have members, one writes directly into the logits, or several, as MLPs do past each other.
    """
    site_of = nodes.site_numbers
    _, last = ways([site for number, site in enumerate(nodes.sites) if number in set(site_of[list(members)])])
    alive = {node for node in members if nodes.sites[site_of[node]] in last}
    # Edges lead to later sites, so that all edges out of a target are seen before those into it.
    for edge in sorted(edges, key=lambda edge: -site_of[edge.source]):
        if edge.target in alive:
            alive.add(edge.source)
    return [node for node in members if node in alive], [edge for edge in edges if edge.target in alive]


EDGES: dict[str, Callable[[Problem, Sequence[int]], list[Edge]]] = {
    "attribution": attribution_edges,
    "correlation": correlation_edges,
}
