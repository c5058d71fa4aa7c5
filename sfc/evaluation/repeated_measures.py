"""Tests for several measurements of the same subjects, by ranks: no distribution is assumed.

Friedman's test asks whether any of the conditions differs, Wilcoxon's signed-rank test with Holm's correction which do;
each with the effect size that belongs to it.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import friedmanchisquare, rankdata, wilcoxon


class Friedman(NamedTuple):
    """Friedman's test (1937) and Kendall's coefficient of concordance."""

    chi2: float
    degrees: int
    p_value: float
    kendall_w: float
    """chi2 / (n (k - 1)): 1 where all subjects order the conditions alike, 0 where their ranks cancel out"""


def friedman(values: Float[np.ndarray, "subjects conditions"]) -> Friedman:
    """Whether the conditions differ, corrected for ties. Where every subject ties all of them, they do not.

    Raises:
        ValueError: there are fewer than three conditions or two subjects.
    """
    subjects, conditions = values.shape
    if conditions < 3 or subjects < 2:
        raise ValueError(f"Friedman's test needs 3 conditions and 2 subjects, not {conditions} and {subjects}")
    if (values == values[:, :1]).all():
        return Friedman(0.0, conditions - 1, 1.0, 0.0)
    chi2, p_value = friedmanchisquare(*values.T)
    return Friedman(float(chi2), conditions - 1, float(p_value), float(chi2 / (subjects * (conditions - 1))))


def pairwise_wilcoxon(values: Float[np.ndarray, "subjects conditions"], names: Sequence[str]) -> pd.DataFrame:
    """Wilcoxon's signed-rank test, two-sided, of every pair of conditions; differences of zero are left out.

    Columns: `first`, `second`, `n` (subjects whose values differ), `mean_difference` and `median_difference`
    (first - second), `p_value`, `p_holm`, and `rank_biserial` (Kerby 2014): the share of the rank sum where the first
    is larger minus the share where the second is, from -1 to 1.
    """
    rows = []
    for i, j in combinations(range(len(names)), 2):
        differences = values[:, i] - values[:, j]
        p_value = float(wilcoxon(differences).pvalue) if differences.any() else 1.0  # pyright: ignore
        rows.append(
            {
                "first": names[i],
                "second": names[j],
                "n": int((differences != 0).sum()),
                "mean_difference": float(differences.mean()),
                "median_difference": float(np.median(differences)),
                "p_value": p_value,
                "rank_biserial": rank_biserial(differences),
            }
        )
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p_value") + 1, "p_holm", holm(table["p_value"].to_numpy()))  # pyright: ignore
    return table


def rank_biserial(differences: Float[np.ndarray, " n"]) -> float:
    """Matched-pairs rank-biserial correlation; 0 where nothing differs."""
    differences = differences[differences != 0]
    ranks = rankdata(np.abs(differences))
    return float((ranks * np.sign(differences)).sum() / ranks.sum()) if len(ranks) else 0.0


def holm(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values that control the chance of any false discovery (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return adjusted
