"""A circuit of edges: the score when its nodes reach one another along these edges alone, and how faithful that is.

Sites run in their order. A node d of the circuit gets a run of its own from the site before its own: there the sources
of its edges have the value that this very procedure gave them, and all other nodes their baseline. Whether d is
active, and how strongly, is then judged on the activation that this run brings to d's site; of an error node the value
is the error of that activation. Nodes of the first site have their clean values. The score is that of a run from the
last site, where the circuit's nodes have their values and all others their baseline.

Law: with all edges between the circuit's nodes at neighbouring sites it is the score of the circuit's nodes.

Runs are of the blocks between two sites only, one for all nodes that have the same sources, packed into batches; nodes
from which no edges lead to the last site get none. Errors follow the error mode: with `keep-current` every error is a
node that is joined to all, with `keep-clean` every run has the clean errors, with `ablate` none.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.faithfulness import Scores, ablated_scores, full_scores, metrics_with_intervals
from sfc.circuits.gradients import SiteRun, site_runs
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.errors import UserError
from sfc.core.sites import kind_of
from sfc.models.batches import PACKED_TOKENS

WHOLE_STREAM = ("resid_pre", "resid_post")
"""kinds of sites through which everything passes that reaches later ones; other sites can be bypassed"""


class _Group(NamedTuple):
    """Nodes of a site that have the same sources; nodes are numbered within their site, the error last."""

    sources: list[int]
    targets: list[int]


class _Values(NamedTuple):
    """How far the kept nodes of a site are from their baseline, at the tokens that may be touched."""

    features: list[int]
    of_features: Float[Tensor, "features tokens"]
    of_error: Float[Tensor, "tokens d_in"]


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
        edges: between members at neighbouring sites.
        progress: called with the number of pairs of a batch and a site that are done since the last call.

    Raises:
        UserError: the sites are not points of the residual stream, or an edge joins other nodes than these.
    """
    reason = why_not_ablatable(problem.ablation.nodes, members, edges)
    if reason is not None:
        raise UserError(reason)
    plan = _plan(problem.ablation, members, edges)
    scores = np.full(runs.n_prompts, np.nan)
    for batch, cached in runs:
        ablation = problem.ablation.for_batch(problem.model, batch, cached)
        at_sites = zip(site_runs(problem, problem.ablation.nodes.sites, batch, cached), plan, strict=True)
        run, groups = next(at_sites)
        values = _values(ablation, run, run.x[None], groups)
        for next_run, groups in at_sites:
            run, values = next_run, _next_values(ablation, run, values, next_run, groups)
            progress(1)
        everything = [*values.features, ablation.dictionaries[run.site].d_sae]
        last = _activation(ablation, run, values, [everything])
        scores[batch.prompts.cpu().numpy()] = run.scores(last)[0].cpu().numpy()
        progress(1)
    return scores


def why_not_ablatable(nodes: Nodes, members: Sequence[int], edges: Sequence[tuple[int, int]]) -> str | None:
    """What keeps these edges from being ablated; None where nothing does."""
    if not all(kind_of(site) in WHOLE_STREAM for site in nodes.sites):
        return f"edges can be ablated between points of the residual stream only ({', '.join(WHOLE_STREAM)})"
    listed, site_of = set(members), nodes.site_numbers
    for source, target in edges:
        if not {source, target} <= listed or site_of[target] != site_of[source] + 1:
            names = f"{nodes.name(source)} -> {nodes.name(target)}"
            return f"the edge {names} does not join two of the circuit's nodes at neighbouring sites"
    return None


def random_edges(
    nodes: Nodes, members: Sequence[int], edges: Sequence[tuple[int, int]], seed: int
) -> list[tuple[int, int]]:
    """As many edges into every node as these, from sources drawn at random among the members at the site before."""
    random, of_members, site_of = np.random.default_rng(seed), np.sort(members), nodes.site_numbers
    drawn = []
    for target, count in sorted(Counter(target for _, target in edges).items()):
        before = of_members[site_of[of_members] == site_of[target] - 1]
        drawn += [(int(source), target) for source in random.choice(before, count, replace=False)]
    return drawn


def _plan(ablation: Ablation, members: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[list[_Group]]:
    """For each site the groups of its nodes from which edges lead to the last site."""
    nodes = ablation.nodes
    site_of, is_error = nodes.site_numbers, nodes.is_error
    kept = set(members)
    if ablation.error_mode in ("ablate", "keep-clean"):
        kept = {node for node in kept if not is_error[node]}
    if ablation.error_mode == "keep-current":
        kept |= set(np.flatnonzero(is_error).tolist())
    sources: dict[int, set[int]] = {node: set() for node in kept}
    for source, target in edges:
        if source in kept and target in kept:
            sources[target].add(source)
    if ablation.error_mode == "keep-current":
        for target in kept:
            before = (node for node in kept if site_of[node] == site_of[target] - 1)
            sources[target] |= {node for node in before if is_error[node] or is_error[target]}
    leading = {node for node in kept if site_of[node] == len(nodes.sites) - 1}
    for site in reversed(range(1, len(nodes.sites))):
        leading |= {source for node in leading if site_of[node] == site for source in sources[node]}
    return [
        _groups(nodes.sizes, site, sorted(node for node in leading if site_of[node] == site), sources)
        for site in range(len(nodes.sites))
    ]


def _groups(sizes: Sequence[int], site: int, targets: Sequence[int], sources: dict[int, set[int]]) -> list[_Group]:
    own, before = sum(sizes[:site]), sum(sizes[: max(site - 1, 0)])
    groups: dict[frozenset[int], list[int]] = {}
    for target in targets:
        groups.setdefault(frozenset(sources[target]), []).append(target - own)
    return [_Group(sorted(source - before for source in same), of) for same, of in groups.items()]


def _next_values(ablation: Ablation, run: SiteRun, values: _Values, next_run: SiteRun, groups: list[_Group]) -> _Values:
    """The values of the next site's nodes, each from a run in which only its sources have theirs."""
    at_once = run.batch.copies_in(PACKED_TOKENS)
    parts = []
    for first in range(0, len(groups), at_once):
        some = groups[first : first + at_once]
        x = _activation(ablation, run, values, [group.sources for group in some])
        parts.append(_values(ablation, next_run, run.activations(x, next_run.site), some))
    if not parts:
        return _values(ablation, next_run, next_run.x[None], [])
    return _Values(
        [feature for part in parts for feature in part.features],
        torch.cat([part.of_features for part in parts]),
        torch.stack([part.of_error for part in parts]).sum(0),
    )


def _activation(
    ablation: Ablation, run: SiteRun, values: _Values, kept: Sequence[Sequence[int]]
) -> Float[Tensor, "copies batch pos d_in"]:
    """The activation at a site with only these nodes, for each copy others, at their values."""
    dictionary, touchable = ablation.dictionaries[run.site], run.batch.touchable
    x = ablation.ablated_activation(run.site, run.batch)
    if ablation.clean_errors is not None:
        x = x + ablation.clean_errors[run.site][touchable] - ablation.baseline.errors_at(dictionary, run.batch)
    result = repeat(run.x.float(), "batch pos d_in -> copies batch pos d_in", copies=len(kept)).clone()
    for copy, nodes in zip(result, kept, strict=True):
        keeps = torch.tensor([feature in nodes for feature in values.features], device=x.device, dtype=x.dtype)
        of_features = (values.of_features * keeps[:, None]).t() @ dictionary.W_dec[values.features].float()
        copy[touchable] = x + of_features + float(dictionary.d_sae in nodes) * values.of_error
    return result


def _values(
    ablation: Ablation, run: SiteRun, x: Float[Tensor, "copies batch pos d_in"], groups: Sequence[_Group]
) -> _Values:
    """The values of each group's targets in its own copy of the activation."""
    dictionary, baseline = ablation.dictionaries[run.site], ablation.baseline
    touchable = run.batch.touchable
    n_tokens = int(touchable.sum())
    features, moved = [], [x.new_zeros(0, n_tokens, dtype=torch.float32)]
    of_error = x.new_zeros(n_tokens, dictionary.d_in, dtype=torch.float32)
    for copy, group in zip(x[: len(groups)], groups, strict=True):
        rows = copy[touchable].float()
        values, indices = dictionary.encode_sparse(rows)
        for node in group.targets:
            if node == dictionary.d_sae:
                of_error = rows - dictionary.decode_sparse(values, indices) - baseline.errors_at(dictionary, run.batch)
            else:
                f = torch.where(indices == node, values, 0).sum(-1)
                features.append(node)
                f_ref = baseline.features_at(dictionary, run.batch, torch.tensor([node], device=f.device))
                moved.append((f - f_ref[:, 0])[None])
    return _Values(features, torch.cat(moved), of_error)


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
        return dict.fromkeys(("f_edges", "edge_faithfulness", "edge_faithfulness_low", "edge_faithfulness_high"))
    of_edges = edge_ablated_scores(problem, runs, members, edges, progress)
    full = full_scores(problem.model, problem.score, runs)
    nothing = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    empty = ablated_scores(problem.model, problem.score, problem.ablation, runs, nothing)[0]
    metrics = metrics_with_intervals(Scores(full, empty, of_edges, of_edges), min_denominator, seed)
    ratios = {f"edge_{name}": metrics[name] for name in ("faithfulness", "faithfulness_low", "faithfulness_high")}
    return {"f_edges": float(of_edges.mean()), **ratios}
