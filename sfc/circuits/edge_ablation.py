"""A circuit of edges: the score when its nodes reach one another along these edges alone, and how faithful that is.

Sites run in their order. A node d of the circuit gets a run of its own: at the sites that write directly into its own,
the sources of its edges have the value that this very procedure gave them, and all other nodes their baseline. How
active d is, is then judged on what this run brings to the site that it reads; of an error node the value is what the
activation has beyond the features. Where no site writes into its own, a node has its clean value. The score is that of
a run in which, at the sites that write directly into the logits, the circuit's nodes have their values and all others
their baseline.

Law: with all edges between the circuit's nodes at sites that write into one another it is the score of the circuit's
nodes, since whatever else a site hears of others in use reaches it through those that write into it.

Runs are of the blocks between the sites only, one for all nodes that have the same sources, packed into batches; nodes
from which no edges lead to the logits get none. Errors follow the error mode: with `keep-current` every error is a node
that is joined to all, with `keep-clean` every run has the clean errors, with `ablate` none.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.edges import ways
from sfc.circuits.faithfulness import Scores, ablated_scores, full_scores, metrics_with_intervals
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.spaces import NodeSpace, left_over, sites_of, together
from sfc.core.errors import UserError
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.engine import PreparedPrompts
from sfc.models.interventions import Intervention, chained, recorder
from sfc.models.running import run_to
from sfc.models.score import score_batch
from sfc.saes.kernels import values_of


class _Group(NamedTuple):
    """Nodes of a site that have the same sources; nodes are numbered within their sites, parts after the features."""

    sources: dict[str, set[int]]
    """by site"""
    targets: list[int]


class _Values(NamedTuple):
    """How far the kept nodes of a site are from their baseline, at the tokens that may be touched."""

    features: list[int]
    of_features: Float[Tensor, "features tokens"]
    of_parts: Float[Tensor, "tokens d_parts"]


@torch.no_grad()
def edge_ablated_scores(
    problem: Problem,
    runs: PromptRuns,
    members: Sequence[int],
    edges: Sequence[tuple[int, int]],
    progress: Callable[[int], None] = lambda _steps: None,
) -> Float[np.ndarray, " prompts"]:
    """The score of every prompt when only these edges carry anything.

    Args:
        members: the circuit's nodes, by their numbers.
        edges: between members at sites of which one writes directly into the other.
        progress: called with the number of pairs of a batch and a site that are done since the last call.

    Raises:
        UserError: an edge joins other nodes than these.
    """
    nodes = problem.ablation.nodes
    reason = why_not_ablatable(nodes, members, edges)
    if reason is not None:
        raise UserError(reason)
    into, last = ways(nodes.sites)
    plan = _plan(problem.ablation, into, last, members, edges)
    scores = np.full(runs.n_prompts, np.nan)
    for batch, cached in runs:
        prepared = PreparedPrompts.of(problem.model, [batch], [cached])
        at = _Batch(problem, problem.ablation.for_batch(problem.model, batch, cached), prepared)
        for site in nodes.sites:
            at.find(site, into[site], plan[site])
            progress(1)
        scores[batch.prompts.cpu().numpy()] = at.scores(last).cpu().numpy()
    return scores


def why_not_ablatable(nodes: Nodes, members: Sequence[int], edges: Sequence[tuple[int, int]]) -> str | None:
    """What keeps these edges from being ablated; None where nothing does."""
    listed, (into, _) = set(members), ways(nodes.sites)
    for source, target in edges:
        if not {source, target} <= listed or _site(nodes, source) not in into[_site(nodes, target)]:
            names = f"{nodes.name(source)} -> {nodes.name(target)}"
            return f"the edge {names} does not join two of the circuit's nodes at sites that write into one another"
    return None


def random_edges(
    nodes: Nodes, members: Sequence[int], edges: Sequence[tuple[int, int]], seed: int
) -> list[tuple[int, int]]:
    """As many edges into every node from every site as these, from sources drawn at random among the members there."""
    random, of_members, site_of_node = np.random.default_rng(seed), np.sort(members), nodes.site_numbers
    drawn = []
    counts = Counter((target, int(site_of_node[source])) for source, target in edges)
    for (target, site), count in sorted(counts.items()):
        there = of_members[site_of_node[of_members] == site]
        drawn += [(int(source), target) for source in random.choice(there, count, replace=False)]
    return drawn


def _site(nodes: Nodes, node: int) -> str:
    return nodes.sites[nodes.site_numbers[node]]


def _plan(
    ablation: Ablation,
    into: Mapping[str, Sequence[str]],
    last: Sequence[str],
    members: Sequence[int],
    edges: Sequence[tuple[int, int]],
) -> dict[str, list[_Group]]:
    """For each site the groups of its nodes from which edges lead to the logits."""
    nodes, is_error = ablation.nodes, ablation.nodes.is_error
    kept = set(members)
    if ablation.error_mode in ("ablate", "keep-clean"):
        kept = {node for node in kept if not is_error[node]}
    if ablation.error_mode == "keep-current":
        kept |= set(np.flatnonzero(is_error).tolist())
    sources: dict[int, set[int]] = {node: set() for node in kept}
    for source, target in edges:
        if source in kept and target in kept:
            sources[target].add(source)
    of_site: dict[str, list[int]] = {site: [] for site in nodes.sites}
    for node in sorted(kept):
        of_site[_site(nodes, node)].append(node)
    if ablation.error_mode == "keep-current":
        for target in kept:
            before = (node for site in into[_site(nodes, target)] for node in of_site[site])
            sources[target] |= {node for node in before if is_error[node] or is_error[target]}
    leading = {node for site in last for node in of_site[site]}
    for site in reversed(nodes.sites):
        leading |= {source for node in of_site[site] if node in leading for source in sources[node]}
    return {site: _groups(nodes, [node for node in of_site[site] if node in leading], sources) for site in nodes.sites}


def _groups(nodes: Nodes, targets: Sequence[int], sources: Mapping[int, set[int]]) -> list[_Group]:
    groups: dict[frozenset[int], list[int]] = {}
    for target in targets:
        groups.setdefault(frozenset(sources[target]), []).append(target)
    return [_Group(_within(nodes, same), [*_within(nodes, of).popitem()[1]]) for same, of in groups.items()]


def _within(nodes: Nodes, numbers: Sequence[int] | frozenset[int]) -> dict[str, set[int]]:
    return {
        site: set(of_site.tolist()) for site, of_site in nodes.by_site(np.array(sorted(numbers), dtype=int)).items()
    }


class _Batch:
    """One batch, and what is known of its nodes so far."""

    def __init__(self, problem: Problem, ablation: Ablation, prepared: PreparedPrompts) -> None:
        self.problem, self.ablation, self.prepared = problem, ablation, prepared
        self.batch: Batch = prepared.batches[0]
        self.values: dict[str, _Values] = {}
        self.ablated: dict[str, Float[Tensor, "tokens d_in"]] = {}
        for site, space in ablation.dictionaries.items():
            self.ablated[site] = ablation.ablated_activation(site, self.batch)
            if ablation.clean_errors is not None:
                of_baseline = ablation.baseline.errors_at(space, self.batch)[:, : space.d_in]
                self.ablated[site] = (
                    self.ablated[site] + ablation.clean_errors[site][self.batch.touchable] - of_baseline
                )

    def find(self, site: str, into: Sequence[str], groups: Sequence[_Group]) -> None:
        """Find the values of a site's nodes, each from a run in which only its sources have theirs."""
        space = self.ablation.dictionaries[site]
        n_tokens = int(self.batch.touchable.sum())
        found = _Values(
            [], self.ablated[site].new_zeros(0, n_tokens), self.ablated[site].new_zeros(n_tokens, space.d_parts)
        )
        # Where nothing comes from other sites, one run is that of all nodes.
        at_once = self.batch.copies_in(PACKED_TOKENS)
        for first in range(0, len(groups), at_once):
            some = groups[first : first + at_once]
            acting = {u: self._put(u, [group.sources.get(u, set()) for group in some]) for u in into}
            seen: dict[str, Tensor] = {}
            for each in sites_of({site: space}):
                acting[each] = chained(acting.get(each), recorder(seen, each))
            start = self.prepared.start(0, into[0] if into else site)
            packed = self.batch.repeat(len(some))
            run_to(self.problem.model, packed, acting, site, start.repeat(len(some)) if start else None)
            where = self.batch.touchable
            read, x = (seen[each].unflatten(0, (len(some), -1))[:, where].float() for each in (space.reads, site))
            for copy, group in enumerate(some):
                found = self._with(found, space, read[copy], x[copy], group.targets)
        self.values[site] = found

    def scores(self, last: Sequence[str]) -> Float[Tensor, " batch"]:
        """The scores of a run in which all nodes of the sites that write into the logits have their values."""
        everything = {site: set(range(self.ablation.nodes.n_nodes)) for site in last}
        acting = {site: self._put(site, [all_nodes]) for site, all_nodes in everything.items()}
        start = self.prepared.start(0, last[0])
        return score_batch(self.problem.model, self.problem.score, self.batch, acting, start)

    def _put(self, site: str, kept: Sequence[set[int]]) -> Intervention:
        """Give a site the activation in which only these nodes, for each copy others, are at their values."""
        space, values = self.ablation.dictionaries[site], self.values[site]
        width, copies = space.d_parts // space.n_parts, []
        for nodes in kept:
            keeps = torch.tensor([feature in nodes for feature in values.features], dtype=values.of_features.dtype)
            of_features = (values.of_features * keeps.to(values.of_features.device)[:, None]).t()
            parts = torch.tensor([space.d_sae + part in nodes for part in range(space.n_parts)])
            of_parts = values.of_parts * parts.repeat_interleave(width).to(values.of_parts)
            copies.append(
                self.ablated[site] + of_features @ space.W_dec[values.features].float() + together(of_parts, space)
            )
        x = torch.cat(copies)

        def put(activation: Tensor) -> Tensor:
            where = self.batch.touchable.repeat(len(kept), 1)
            return activation.masked_scatter(where[..., None], x.to(activation.dtype))

        return put

    def _with(
        self,
        found: _Values,
        space: NodeSpace,
        read: Float[Tensor, "tokens d_read"],
        x: Float[Tensor, "tokens d_in"],
        targets: Sequence[int],
    ) -> _Values:
        """What is found, with the values of these nodes in one run."""
        baseline, width = self.ablation.baseline, space.d_parts // space.n_parts
        values, indices = space.encode_sparse(read)
        features = [node for node in targets if node < space.d_sae]
        numbers = torch.tensor(features, dtype=torch.long, device=x.device)
        f = values_of(numbers, values, indices, space.d_sae)
        moved = (f - baseline.features_at(space, self.batch, numbers)).t()
        of_parts = found.of_parts
        if parts := [node - space.d_sae for node in targets if node >= space.d_sae]:
            rest = left_over(space, read, x, values, indices) - baseline.errors_at(space, self.batch)
            is_target = torch.isin(
                torch.arange(space.d_parts, device=x.device) // width, torch.tensor(parts).to(x.device)
            )
            of_parts = torch.where(is_target, rest, of_parts)
        return _Values([*found.features, *features], torch.cat([found.of_features, moved]), of_parts)


EDGE_FIGURES = ("f_edges", "edge_faithfulness", "edge_faithfulness_low", "edge_faithfulness_high")


def edge_faithfulness(
    problem: Problem,
    runs: PromptRuns,
    members: Sequence[int],
    edges: Sequence[tuple[int, int]],
    min_denominator: float,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, float | None]:
    """`f_edges` in nats, and `edge_faithfulness` with the ends of its 95 % interval.

    The ratio is `(F(edges) - F(0)) / (F(M) - F(0))`, F(edges) the mean score with these edges alone. All are
    None where there are no edges, or edges that cannot be ablated; the ratio also where it cannot be measured.

    Args:
        progress: called with the number of pairs of a batch and a site that are done since the last call.
    """
    if not edges or why_not_ablatable(problem.ablation.nodes, members, edges) is not None:
        return dict.fromkeys(EDGE_FIGURES)
    of_edges = edge_ablated_scores(problem, runs, members, edges, progress)
    full = full_scores(problem.model, problem.score, runs)
    nothing = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    empty = ablated_scores(problem.model, problem.score, problem.ablation, runs, nothing)[0]
    metrics = metrics_with_intervals(Scores(full, empty, of_edges, of_edges), min_denominator, seed)
    ratios = {f"edge_{name}": metrics[name] for name in ("faithfulness", "faithfulness_low", "faithfulness_high")}
    return {"f_edges": float(of_edges.mean()), **ratios}
