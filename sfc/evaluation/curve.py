"""The curve of a ranking: how good its best n nodes are as a circuit, for many n."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from sfc.circuits.problem import Problem, PromptRuns
from sfc.config import EvaluationConfig
from sfc.evaluation.ablated import ablated_scores, full_scores
from sfc.evaluation.metrics import Scores, circuit_metrics, metrics_with_intervals
from sfc.evaluation.random_circuits import matching_strata, random_circuits

Progress = Callable[[int], None]


def curve_sizes(wanted: Sequence[int], n_ranked: int) -> list[int]:
    """The wanted sizes that the ranking can fill, and the whole ranking."""
    return sorted({size for size in wanted if size < n_ranked} | {n_ranked})


def top_circuits(
    ranking: Int[np.ndarray, " ranked"], sizes: Sequence[int], n_nodes: int
) -> Bool[np.ndarray, "s nodes"]:
    """For each size, the circuit of the best nodes."""
    keep = np.zeros((len(sizes), n_nodes), dtype=bool)
    for row, size in enumerate(sizes):
        keep[row, ranking[:size]] = True
    return keep


def choose_size(curve: pd.DataFrame, target: float) -> int:
    """The smallest size whose `discovery_faithfulness` reaches the target, else the most faithful one.

    Where faithfulness is not measurable at any size, the smallest size.
    """
    by_size = dict(zip(curve["size"], curve["discovery_faithfulness"].astype(float), strict=True))
    measured = {size: value for size, value in by_size.items() if not np.isnan(value)}
    reached = [size for size, value in measured.items() if value >= target]
    if reached:
        return int(min(reached))
    return int(max(measured, key=lambda size: measured[size]) if measured else min(by_size))


def faithfulness_of_sizes(
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    sizes: Sequence[int],
    min_denominator: float,
    progress: Progress,
) -> list[float | None]:
    """Faithfulness of the best nodes, for each size: a curve without the rest. None where it cannot be measured."""
    circuits = top_circuits(ranking, sizes, problem.ablation.nodes.n_nodes)
    empty = np.zeros_like(circuits[:1])
    f_model = full_scores(problem.model, problem.score, runs).mean()
    f_empty, *f_circuits = _scores(problem, runs, np.concatenate([empty, circuits]), progress).mean(1)
    return [circuit_metrics(f_model, f_empty, f, f_empty, min_denominator).faithfulness for f in f_circuits]


def evaluation_curve(
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    sizes: Sequence[int],
    config: EvaluationConfig,
    seed: int,
    progress: Progress,
) -> pd.DataFrame:
    """One row per size: the four mean scores, the three ratios with 95 % intervals, and other circuits of that size.

    Columns: `size, faithfulness, completeness, completeness_normalised, f_model, f_circuit, f_complement, f_empty`, for
    each ratio its `…_low` and `…_high` (bootstrap over prompts), `random_faithfulness` (mean over the draws),
    `random_low, random_high` (their range), and `last_site_faithfulness`, of the best nodes of the last site alone
    (missing where it has not so many). Scores in nats, ratios without unit. A ratio whose denominator is small, or has
    zero within its interval, is missing.
    """
    nodes = problem.ablation.nodes
    circuits = top_circuits(ranking, sizes, nodes.n_nodes)
    empty = np.zeros_like(circuits[:1])
    random = random_circuits(circuits, matching_strata(nodes, problem.firing_rates), config.random_draws, seed)
    at_last_site = ranking[nodes.site_numbers[ranking] == len(nodes.sites) - 1]
    last_site = top_circuits(at_last_site, sizes, nodes.n_nodes)
    packed = np.concatenate([empty, circuits, ~circuits, last_site, *random])
    scores = _scores(problem, runs, packed, progress)
    full = full_scores(problem.model, problem.score, runs)
    of_empty, of_circuits, of_complements, of_last_site, of_random = np.split(
        scores, np.cumsum([1, len(sizes), len(sizes), len(sizes)])
    )
    f_model, f_empty = full.mean(), of_empty.mean()
    rows = []
    for i, size in enumerate(sizes):
        by_prompt = Scores(full, of_empty[0], of_circuits[i], of_complements[i])
        metrics = metrics_with_intervals(by_prompt, config.min_denominator, seed)
        measurable = metrics["faithfulness"] is not None
        span = f_model - f_empty if measurable else np.nan
        others = (np.stack([of_last_site[i], *of_random[i :: len(sizes)]]).mean(1) - f_empty) / span
        last, *draws = others.tolist()
        rows.append(
            {
                "size": size,
                **metrics,
                "f_model": f_model,
                "f_circuit": of_circuits[i].mean(),
                "f_complement": of_complements[i].mean(),
                "f_empty": f_empty,
                "random_faithfulness": np.mean(draws) if measurable else None,
                "random_low": min(draws) if measurable else None,
                "random_high": max(draws) if measurable else None,
                "last_site_faithfulness": last if measurable and size <= len(at_last_site) else None,
            }
        )
    return pd.DataFrame(rows)


def _scores(problem: Problem, runs: PromptRuns, keep: np.ndarray, progress: Progress) -> np.ndarray:
    return ablated_scores(problem.model, problem.score, problem.ablation, runs, keep, progress)
