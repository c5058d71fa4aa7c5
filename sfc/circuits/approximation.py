"""The approximation check that every circuit carries: are a method's effects those that ablation really has?

They are compared with exact ones on the nodes of largest effect and on nodes drawn at random.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from sfc.circuits.methods import NATS, Effects
from sfc.circuits.methods.exact import exact_effects
from sfc.circuits.problem import Problem
from sfc.core.progress import progress_bar

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
