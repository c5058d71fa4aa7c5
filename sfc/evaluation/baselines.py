"""What the reported circuit is held against: random circuits of its size, and the best nodes of one site alone."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from sfc.circuits.problem import Problem, PromptRuns
from sfc.evaluation.ablated import ablated_scores
from sfc.evaluation.curve import faithfulness_of_sizes
from sfc.evaluation.random_circuits import matching_strata, random_circuits
from sfc.sites import short_site

Progress = Callable[[int], None]


def p_value(
    problem: Problem,
    runs: PromptRuns,
    circuit: Bool[np.ndarray, " nodes"],
    draws: int,
    seed: int,
    progress: Progress,
) -> float:
    """The share of circuits, among this one and random ones, whose mean score is at least as far from the empty one's.

    Random circuits have as many features per site and range of firing rates; `1 / (draws + 1)` is the least there is.
    """
    strata = matching_strata(problem.ablation.nodes, problem.firing_rates)
    random = random_circuits(circuit[None], strata, draws, seed)[:, 0]
    keep = np.concatenate([np.zeros_like(circuit)[None], circuit[None], random])
    f_empty, f_circuit, *f_random = ablated_scores(
        problem.model, problem.score, problem.ablation, runs, keep, progress
    ).mean(1)
    direction = np.sign(f_circuit - f_empty)
    as_good = direction * (np.array(f_random) - f_empty) >= direction * (f_circuit - f_empty)
    return float((1 + as_good.sum()) / (1 + draws))


def single_site_faithfulness(
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    size: int,
    min_denominator: float,
    progress: Progress,
) -> dict[str, float | None]:
    """Faithfulness of the `size` best nodes of each site alone; None where a site has not so many, or unmeasurable."""
    nodes, found = problem.ablation.nodes, {}
    for number, site in enumerate(nodes.sites):
        members = ranking[nodes.site_numbers[ranking] == number]
        enough = len(members) >= size
        values = faithfulness_of_sizes(problem, runs, members, [size], min_denominator, progress) if enough else [None]
        found[short_site(site)] = values[0]
    return found
