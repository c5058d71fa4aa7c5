"""Which features a repair ablates, and how many: chosen on discovery prompts alone.

Marks et al. 2024 (SHIFT) read a circuit and ablate by hand the features that should not matter. Here the rule is
automatic. With h and t the attribution effects of a feature on the refusal score of over-refused hard prompts and of
refused toxic ones, features qualify where h > 0 and t <= share * h, and those with the largest h come first.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from sfc.circuits.methods.attribution import attributed_effects
from sfc.circuits.problem import Problem, PromptRuns


def mean_effects(problem: Problem, runs: PromptRuns) -> Float[np.ndarray, " nodes"]:
    """The attribution effect of every node, mean over the prompts of the runs, in nats."""
    total = torch.zeros(problem.ablation.nodes.n_nodes, dtype=torch.float64)
    for batch, prefix in runs:
        total += attributed_effects(problem, batch, prefix).by_prompt.double().sum(0).cpu()
    return (total / runs.n_prompts).numpy()


def qualified(
    on_hard: Float[np.ndarray, " nodes"],
    on_toxic: Float[np.ndarray, " nodes"],
    is_error: Bool[np.ndarray, " nodes"],
    share: float,
) -> Int[np.ndarray, " qualified"]:
    """The features that matter for hard prompts and not for toxic ones, the best first.

    Args:
        share: of its effect on hard prompts that a feature may have on toxic ones.
    """
    fits = (on_hard > 0) & (on_toxic <= share * on_hard) & ~is_error
    ranking = np.argsort(-on_hard, kind="stable")
    return ranking[fits[ranking]]


def best_size(tried: pd.DataFrame, most_lost: float) -> int | None:
    """The number of features whose ablation refuses fewest hard prompts among those that spare the toxic ones.

    Toxic prompts are spared where the share refused falls by at most `most_lost`; of equals, the one with the lowest
    mean score of hard prompts counts. None where no size spares them and lowers that score.

    Args:
        tried: a row per `size`, 0 being the model as it is: `hard` and `toxic`, shares refused, and `hard_score`.
    """
    plain = tried[tried["size"] == 0].iloc[0]
    edited = tried[(tried["size"] > 0) & (tried["hard_score"] < plain["hard_score"])]
    spared = edited[plain["toxic"] - edited["toxic"] <= most_lost + 1e-9]
    if spared.empty:
        return None
    return int(spared.sort_values(["hard", "hard_score"])["size"].iloc[0])


def shares_refused(scores: Mapping[str, Float[np.ndarray, " prompts"]], above: float) -> dict[str, float]:
    """By group of prompts, the share whose score is above a threshold, and the mean as `GROUP_score`."""
    shares = {group: float((values > above).mean()) for group, values in scores.items()}
    return shares | {f"{group}_score": float(values.mean()) for group, values in scores.items()}
