"""Random circuits to hold a circuit against: as many features at each site, and as often active."""

import numpy as np
from jaxtyping import Bool, Float, Int

from sfc.ablation.nodes import Nodes

FIRING_RATES = (0.0, 0.01, 0.05, 0.2, 0.5)
"""lower ends, but for the first, of the strata within which features are exchanged"""


def random_circuits(
    circuits: Bool[np.ndarray, "circuits nodes"], strata: Int[np.ndarray, " nodes"], draws: int, seed: int
) -> Bool[np.ndarray, "draws circuits nodes"]:
    """For each circuit, random ones with as many nodes of every stratum; nodes of stratum -1 stay as they are."""
    random = np.random.default_rng(seed)
    result = np.zeros((draws, *circuits.shape), dtype=bool)
    result[..., strata < 0] = circuits[:, strata < 0]
    for stratum in range(strata.max() + 1):
        members = np.flatnonzero(strata == stratum)
        for draw, row in np.ndindex(result.shape[:2]):
            count = int(circuits[row, members].sum())
            result[draw, row, random.choice(members, count, replace=False)] = True
    return result


def matching_strata(nodes: Nodes, firing_rates: Float[np.ndarray, " nodes"] | None = None) -> Int[np.ndarray, " nodes"]:
    """A stratum per site and, where rates are given, per range of firing rates; -1 for error nodes.

    Args:
        firing_rates: share of prompts in which a feature is active; error nodes have any value.
    """
    rates = np.zeros(nodes.n_nodes) if firing_rates is None else firing_rates
    within = np.searchsorted(FIRING_RATES, rates, side="left")
    strata = nodes.site_numbers * (len(FIRING_RATES) + 1) + within
    return np.where(nodes.is_error, -1, strata)
