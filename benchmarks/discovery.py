"""What discovery costs, in units of one full forward pass over the same prompts: node attribution, edges, learned mask.

All of it is measured in one run on the discovery prompts of one category, in turns with the full forward pass, so that
the units hardly depend on the machine. Edges are measured beside one backward pass to the embedding per downstream
node: on one node of each downstream layer, whose weights must agree with ours, and extrapolated to all.

Activations and SAEs are those of the root folder, made first where they are missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import category
import harness
import numpy as np
import torch
from jaxtyping import Float, Int

from sfc.circuits.baselines import tables_of
from sfc.circuits.edge_kinds import Weights, attribution_weights, members_at_sites
from sfc.circuits.methods import METHODS, LearnedMaskOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.models.batches import Batch
from sfc.models.interventions import leaf_recorder, recorder
from sfc.models.score import score_batch, score_prompts

EMBEDDING = "blocks.0.hook_resid_pre"
NODES = 200
TOLERANCE = 1e-3
"""of the largest weight: by how much the two ways to an edge may differ"""


class Effort(NamedTuple):
    """How much is measured."""

    rounds: int
    prompts: int
    mask_steps: int | None
    """None: as many as the preset has"""


MEANS = "discovery.baseline=safe-mean"
"""the other way to an edge, a backward pass for each node, is written for means"""
FULL, QUICK = Effort(3, 10_000, None), Effort(1, 12, 12)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and, with --json, the figures."""
    options = category.parser(__doc__).parse_args(arguments)
    effort = QUICK if options.quick else FULL
    options.set.insert(0, MEANS)
    problem, _ = category.prepared(options)
    problem = replace(problem, runs=problem.runs.sample(effort.prompts, seed=0))
    figures = measure(problem, effort, options.device)
    harness.emit(report(figures), {**figures, "machine": harness.machine(options.device)}, options.json)


def measure(problem: Problem, effort: Effort, device: str) -> dict[str, float]:
    """Seconds of everything, and units of a full forward pass where there is an aim for them.

    Raises:
        RuntimeError: the two ways to an edge do not agree.
    """
    runs, all_steps = problem.runs, LearnedMaskOptions.of(problem.experiment).steps
    strongest = strongest_everywhere(problem, NODES)
    members, targets = np.concatenate(strongest).tolist(), [here[0] for here in strongest[1:]]
    found: dict[str, list[Weights]] = {}
    seconds = harness.in_turns(
        {
            "full forward pass": lambda: score_prompts(problem.model, problem.score, runs.batches),
            "prefix cache": lambda: PromptRuns.of(problem.model, runs.batches, problem.ablation.nodes.sites[0]),
            "node attribution": lambda: METHODS["attribution"].rank(problem),
            "edges": lambda: found.update(ours=attribution_weights(problem, members)),
            "edges of the sample, naively": lambda: found.update(naive=naive_weights(problem, members, targets)),
        },
        effort.rounds,
        device,
    )
    disagreement = largest_difference(found["ours"], found["naive"])
    if not disagreement <= TOLERANCE:
        raise RuntimeError(f"the two ways to an edge differ by {disagreement:.2g} of the largest weight")
    steps = effort.mask_steps or all_steps
    quicker = {n: problem.with_settings(learned_mask={"steps": n}) for n in (1, steps)}
    learned = harness.in_turns(
        {str(n): lambda p=p: METHODS["learned-mask"].rank(p) for n, p in quicker.items()}, 1, device
    )
    (one,), (some,) = learned["1"], learned[str(steps)]

    n_targets = sum(len(weights.targets) for weights in found["ours"])
    unit = seconds["full forward pass"]
    naive = [s * n_targets / len(targets) for s in seconds["edges of the sample, naively"]]
    return {
        "attribution_units": harness.paired_ratio(seconds["node attribution"], unit),
        "prefix_cache_units": harness.paired_ratio(seconds["prefix cache"], unit),
        "edge_units": harness.paired_ratio(seconds["edges"], unit),
        "edge_speedup": harness.paired_ratio(naive, seconds["edges"]),
        "mask_seconds": one + (some - one) * (all_steps - 1) / (steps - 1),
        "unit_seconds": median(unit),
        "attribution_seconds": median(seconds["node attribution"]),
        "edge_seconds": median(seconds["edges"]),
        "naive_edge_seconds_extrapolated": median(naive),
        "sampled_targets": len(targets),
        "edge_targets": n_targets,
        "edge_nodes": len(members),
        "edge_disagreement": disagreement,
        "mask_steps_measured": steps,
        "mask_steps": all_steps,
        "prompts": runs.n_prompts,
        "tokens": sum(int(batch.lengths.sum()) for batch in runs.batches),
    }


def strongest_everywhere(problem: Problem, count: int) -> list[Int[np.ndarray, " members"]]:
    """Equally many nodes of each site, the strongest by attribution first: in no other spread do edges cost more."""
    ranking, nodes = METHODS["attribution"].rank(problem).ranking, problem.ablation.nodes
    shares = [len(share) for share in np.array_split(np.arange(count), len(nodes.sites))]
    return [ranking[nodes.site_numbers[ranking] == site][:share] for site, share in enumerate(shares)]


def naive_weights(problem: Problem, members: Sequence[int], targets: Sequence[int]) -> list[Weights]:
    """The weights into some targets, one at each site but the first, by a backward pass to the embedding for each."""
    nodes = problem.ablation.nodes
    at_site = members_at_sites(nodes, members)
    totals = [np.zeros((len(sources), 1)) for sources in at_site[:-1]]
    offsets = np.cumsum([0, *nodes.sizes])
    for batch in problem.runs.batches:
        seen: dict[str, torch.Tensor] = {}
        interventions = {EMBEDDING: leaf_recorder(seen, EMBEDDING)} | {s: recorder(seen, s) for s in nodes.sites}
        with torch.enable_grad():
            total = score_batch(problem.model, problem.score, batch, interventions).sum()
        gradients = torch.autograd.grad(total, [seen[site] for site in nodes.sites], retain_graph=True)
        for i, (above, below) in enumerate(pairwise(nodes.sites)):
            moved = _passed(problem, batch, below, int(targets[i] - offsets[i + 1]), seen[below], gradients[i + 1])
            _, v = torch.autograd.grad(moved, [seen[EMBEDDING], seen[above]], retain_graph=True)
            totals[i][:, 0] += _along(problem, batch, above, at_site[i] - offsets[i], seen[above].detach(), v)
    return [
        Weights(
            sources, np.array([target]), (mean := weight / problem.runs.n_prompts), np.abs(weight), mean[None, None]
        )
        for sources, target, weight in zip(at_site[:-1], targets, totals, strict=True)
    ]


def largest_difference(ours: Sequence[Weights], naive: Sequence[Weights]) -> float:
    """The largest difference on the naive one's targets, as a share of the largest weight."""
    pairs = [(a.weight[:, np.isin(a.targets, b.targets)], b.weight) for a, b in zip(ours, naive, strict=True)]
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)


def _passed(
    problem: Problem, batch: Batch, site: str, node: int, x: torch.Tensor, g: torch.Tensor
) -> Float[torch.Tensor, ""]:
    """The score as a function of x at this site by way of one node of it, to first order."""
    dictionary = problem.ablation.dictionaries[site]
    x, g = x[batch.touchable], g[batch.touchable]
    with torch.enable_grad():
        f = dictionary.encode(x)
        if node == dictionary.d_sae:
            return (g * (x - dictionary.decode(f))).sum()
        return ((g @ dictionary.W_dec[node]) * f[:, node]).sum()


def _along(
    problem: Problem, batch: Batch, site: str, nodes: Int[np.ndarray, " n"], x: torch.Tensor, v: torch.Tensor
) -> Float[np.ndarray, " n"]:
    """`v . displacement` of each node, over all prompts: what ablating it would change."""
    dictionary, baseline = problem.ablation.dictionaries[site], tables_of(problem.ablation.baseline)
    x, v, template_positions = x[batch.touchable], v[batch.touchable], batch.template_positions[batch.touchable]
    f = dictionary.encode(x)
    features = torch.from_numpy(nodes[nodes < dictionary.d_sae]).to(x.device)
    moved = f[:, features] - baseline.features[site][:, features][template_positions]
    weights = (moved * (v @ dictionary.W_dec[features].T)).sum(0)
    of_error = (v * (x - dictionary.decode(f) - baseline.errors[site][template_positions])).sum()
    return torch.cat([weights, of_error[None]])[: len(nodes)].cpu().numpy()


def report(figures: Mapping[str, float]) -> str:
    """The table, and what it was measured on."""
    rows = [
        ("full forward pass", figures["unit_seconds"], 1.0, None),
        ("prefix cache", None, figures["prefix_cache_units"], None),
        ("node attribution", figures["attribution_seconds"], figures["attribution_units"], "at most 2.5 units"),
        (
            f"edges among {figures['edge_nodes']} nodes",
            figures["edge_seconds"],
            figures["edge_units"],
            "at most 12 units",
        ),
        (
            "the same by a backward pass per node (extrapolated)",
            figures["naive_edge_seconds_extrapolated"],
            figures["edge_units"] * figures["edge_speedup"],
            f"{figures['edge_speedup']:.1f} times ours; at least 10",
        ),
        (f"learned mask, {figures['mask_steps']} steps", figures["mask_seconds"], None, "at most 180 s"),
    ]
    table = harness.markdown_table(("what", "seconds", "full forward passes", "wanted"), rows)
    mask = (
        "" if (n := figures["mask_steps_measured"]) == figures["mask_steps"] else f"; mask extrapolated from {n} steps"
    )
    sample = f"{figures['sampled_targets']} of {figures['edge_targets']} downstream nodes measured"
    return f"{table}\n\n{figures['prompts']} prompts, {figures['tokens']:,} tokens; {sample}{mask}"


if __name__ == "__main__":
    main()
