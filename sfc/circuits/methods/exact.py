"""Exact effects: what setting one node to its baseline does, measured by doing it. Slow, but nothing is approximated.

`s(plain) - s(x - (f_i - f_ref_i) d_i)`, for an error node `s(plain) - s(x - (e - e_ref))`, at all positions that may be
touched; everything else stays plain and nothing is spliced in. Each node costs one run of the blocks after its site.

The approximation check, which every circuit carries, compares a method's effects with exact ones, on the nodes of
largest effect and on nodes drawn at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from sfc.circuits.gradients import SiteRun, site_runs
from sfc.circuits.methods import NATS, Effects, ExactOptions, attribution
from sfc.circuits.problem import Problem
from sfc.circuits.spaces import by_coordinate, left_over, together
from sfc.core.progress import progress_bar
from sfc.models.batches import PACKED_TOKENS


def rank(problem: Problem) -> Effects:
    """Exact effects of the nodes of largest |attribution|, as many as the settings say, and of no others.

    Only they are ranked: a run per node would take hours for all. The others' effects are not a number.
    """
    chosen = attribution.rank(problem).ranking[: ExactOptions.of(problem.experiment).nodes]
    with progress_bar("exact effects", len(chosen) * len(problem.runs.batches), "runs") as progress:
        per_prompt = exact_effects(problem, chosen.tolist(), progress=progress)
    effect, absolute = np.full((2, problem.ablation.nodes.n_nodes), np.nan)
    effect[chosen], absolute[chosen] = per_prompt.mean(1), np.abs(per_prompt).mean(1)
    by_prompt = np.full((per_prompt.shape[1], len(effect)), np.nan, dtype=np.float32)
    by_prompt[:, chosen] = per_prompt.T
    ranking = chosen[np.argsort(-np.abs(effect[chosen]), kind="stable")]
    return Effects(effect, absolute, ranking, {}, by_prompt=by_prompt)


@torch.no_grad()
def exact_effects(
    problem: Problem,
    nodes: Sequence[int],
    packed_tokens: int = PACKED_TOKENS,
    progress: Callable[[int], None] = lambda _steps: None,
) -> Float[np.ndarray, "nodes prompts"]:
    """The exact effect of each of these nodes on each prompt, in nats.

    Args:
        packed_tokens: several nodes go through in one batch, as many as keep it within so many tokens (at least one).
        progress: called with the number of node-and-batch pairs done since the last call.
    """
    numbers = np.asarray(nodes, dtype=int)
    all_nodes = problem.ablation.nodes
    effects = np.full((len(numbers), problem.runs.n_prompts), np.nan)
    site_of_node = all_nodes.site_numbers[numbers]
    within_sites = numbers - all_nodes.first_numbers[site_of_node]
    wanted = {all_nodes.sites[site]: np.flatnonzero(site_of_node == site) for site in np.unique(site_of_node)}
    for batch, cached in problem.runs:
        columns = batch.prompts.cpu().numpy()
        for run in site_runs(problem, list(wanted), batch, cached):
            plain = run.scores(run.x[None])
            rows, at_once = wanted[run.site], batch.copies_in(packed_tokens)
            for first in range(0, len(rows), at_once):
                some = rows[first : first + at_once]
                changed = plain - run.scores(_each_ablated(run, within_sites[some].tolist()))
                effects[some[:, None], columns] = changed.cpu().numpy()
                progress(len(some))
    return effects


def _each_ablated(run: SiteRun, within_site: Sequence[int]) -> Float[Tensor, "nodes batch pos d_in"]:
    """The activation at the site with each of these nodes of the site alone set to its baseline."""
    dictionary, baseline = run.problem.ablation.dictionaries[run.site], run.problem.ablation.baseline
    touchable = run.batch.touchable
    x, read = (values[touchable].float() for values in (run.x, run.read))
    values, indices = dictionary.encode_sparse(read)
    moved = left_over(dictionary, read, x, values, indices) - baseline.errors_at(dictionary, run.batch)
    parts = torch.eye(dictionary.n_parts, device=x.device)
    result = repeat(run.x.float(), "batch pos d_in -> nodes batch pos d_in", nodes=len(within_site)).clone()
    for copy, node in zip(result, within_site, strict=True):
        if node >= dictionary.d_sae:
            part = by_coordinate(parts[node - dictionary.d_sae][None], dictionary)
            copy[touchable] = x - together(part * moved, dictionary)
        else:
            f = torch.where(indices == node, values, 0).sum(-1)
            f_ref = baseline.features_at(dictionary, run.batch, torch.tensor([node], device=x.device))
            copy[touchable] = x - (f[:, None] - f_ref) * dictionary.W_dec[node]
    return result


NOISE_FLOOR = 1e-3
"""nats: signs of smaller exact effects are not compared; float32 leaves a score uncertain by about 1e-5"""
_WORST = 5


class Agreement(NamedTuple):
    """How well fast effects agree with exact ones on some nodes; None where that is not defined."""

    n_nodes: int
    rank_correlation: float | None
    """Spearman's, of the signed effects"""
    sign_agreement: float | None
    """share of equal signs among the `n_signed` nodes whose exact effect exceeds the noise floor"""
    n_signed: int


def approximation_check(problem: Problem, effects: Effects, seed: int) -> dict[str, Any]:
    """Exact effects of the strongest nodes and of random ones, on discovery prompts, beside those of the method.

    Random nodes are drawn from the others that differ from their baseline on some prompt. Where there are more
    discovery prompts than `checked_prompts`, the exact effects are means over a sample of them.

    Returns:
        A JSON object: `top` and `random` (as `Agreement`), `worst_misses` (of both, by |fast - exact|: `node`, `fast`,
        `exact`; empty where the method's effects are not in nats), `noise_floor` in nats, `n_prompts`.
    """
    config = problem.config
    top, others = _checked_nodes(effects, config.checked_nodes, seed)
    runs = problem.runs.sample(config.checked_prompts, seed)
    checked = np.concatenate([top, others])
    with progress_bar("approximation check", len(checked) * len(runs.batches), "runs") as progress:
        exact = exact_effects(replace(problem, runs=runs), checked.tolist(), progress=progress).mean(1)
    fast = effects.effect[checked]
    is_top = np.arange(len(checked)) < len(top)
    misses = np.argsort(-np.abs(fast - exact), kind="stable")[: _WORST if effects.unit == NATS else 0]
    return {
        "top": agreement(fast[is_top], exact[is_top])._asdict(),
        "random": agreement(fast[~is_top], exact[~is_top])._asdict(),
        "worst_misses": [
            {
                "node": problem.ablation.nodes.name(int(checked[i])),
                "fast": round(float(fast[i]), 6),
                "exact": round(float(exact[i]), 6),
            }
            for i in misses
        ],
        "noise_floor": NOISE_FLOOR,
        "n_prompts": runs.n_prompts,
    }


def agreement(fast: Float[np.ndarray, " nodes"], exact: Float[np.ndarray, " nodes"]) -> Agreement:
    """Rank correlation and sign agreement of two measures of the same nodes."""
    varied = len(fast) > 1 and np.ptp(fast) > 0 and np.ptp(exact) > 0
    signed = np.abs(exact) > NOISE_FLOOR
    same = np.sign(fast[signed]) == np.sign(exact[signed])
    return Agreement(
        len(fast),
        round(float(spearmanr(fast, exact).statistic), 4) if varied else None,  # pyright: ignore
        round(float(same.mean()), 4) if len(same) else None,
        len(same),
    )


def _checked_nodes(
    effects: Effects, count: int, seed: int
) -> tuple[Int[np.ndarray, " top"], Int[np.ndarray, " others"]]:
    """The nodes of largest effect, and as many random ones of the others that have any effect."""
    active = np.flatnonzero(np.nan_to_num(effects.absolute) > 0)
    by_size = active[np.argsort(-np.abs(effects.effect[active]), kind="stable")]
    top, others = np.split(by_size, [min(count, len(by_size))])
    return top, np.sort(np.random.default_rng(seed).permutation(np.sort(others))[:count])
