"""Intervals, rank tests and correlations: scipy's where it has them, and what it lacks.

- Intervals of rates (Wilson), of few draws (Student), and of means, ratios, gaps and separations (bootstrap).
- Several measurements of the same subjects: Friedman's test asks whether any condition differs, Wilcoxon's signed-rank
  test with Holm's correction which do, each with its effect size. They go by ranks and assume no distribution.
- Pearson correlations of many columns at once.
"""

import warnings
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, friedmanchisquare, rankdata, ttest_ind, wilcoxon
from scipy.stats import t as student

_TAILS = (0.025, 0.975)
DRAWS = 2000
"""of what is drawn again with replacement"""


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (Wilson 1927) of a binomial rate; [0, 1] where nothing was observed.

    Unlike the textbook interval it stays within [0, 1] and is not empty at rates of 0 and 1.

    Raises:
        ValueError: `successes` is not between 0 and n.
    """
    if n == 0 and successes == 0:
        return Interval(0.0, 1.0)
    ends = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(float(ends.low), float(ends.high))


def judged_rate(refused: Iterable[bool]) -> dict[str, float]:
    """How many of some judged replies show the behavior: `n`, `refusals`, `rate`, and `low` and `high` after Wilson."""
    verdicts = list(refused)
    n, refusals = len(verdicts), int(sum(verdicts))
    return {"n": n, "refusals": refusals, "rate": refusals / n, **wilson(refusals, n)._asdict()}


def judged_rates(replies: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """As `judged_rate`, a row per group of judged replies: the columns of `by`, and those figures of `refused`."""
    groups = replies.groupby(by, sort=False)["refused"]
    return pd.DataFrame(
        [dict(zip(by, key, strict=True)) | judged_rate(group) for key, group in groups]  # pyright: ignore
    )


def mean_of_draws(values: Sequence[float]) -> tuple[float, float, float]:
    """Low end, mean, high end of Student's 95 % interval of the mean of independent draws; one draw has no interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return np.nan, mean, np.nan
    half = float(student.ppf(_TAILS[1], len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean - half, mean, mean + half


class MeanIntervals(NamedTuple):
    """Means of several quantities with the ends of their intervals."""

    mean: Float[np.ndarray, " quantities"]
    low: Float[np.ndarray, " quantities"]
    high: Float[np.ndarray, " quantities"]


def bootstrap_means(
    values: Float[np.ndarray, "n quantities"], seed: int, confidence: float = 0.95, draws: int = DRAWS
) -> MeanIntervals:
    """Means of the columns, with percentile intervals over rows drawn again with replacement (Efron 1979).

    All columns share the draws, so that what holds between them in every row holds between their means in every draw.
    `scipy.stats.bootstrap` gathers every drawn row; here a draw is a row of counts, and all means are one product.

    Raises:
        ValueError: there are no rows.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_means(values, seed, draws), [tail, 1 - tail], axis=0)
    return MeanIntervals(values.mean(0), low, high)


def resampled_means(
    values: Float[np.ndarray, "n quantities"], seed: int, draws: int = DRAWS
) -> Float[np.ndarray, "draws quantities"]:
    """The means of the columns over as many rows, drawn with replacement, again and again.

    Raises:
        ValueError: there are no rows.
    """
    if len(values) == 0:
        raise ValueError("no rows to draw from")
    return resampled_counts(len(values), draws, np.random.default_rng(seed)) @ values / len(values)


def resampled_counts(n: int, draws: int, random: np.random.Generator) -> Int[np.ndarray, "draws n"]:
    """How often each of n rows comes up where n rows are drawn with replacement, again and again."""
    return random.multinomial(n, np.full(n, 1 / n), size=draws)


class Estimate(NamedTuple):
    """A figure with the ends of its 95 % interval; None where it cannot be measured."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def complement(self) -> "Estimate":
        """`1 - figure`, ends in order."""
        if self.value is None or self.low is None or self.high is None:
            return self
        return Estimate(1 - self.value, 1 - self.high, 1 - self.low)


UNMEASURABLE = Estimate(None, None, None)


def reported(value: float | None) -> float | None:
    """A figure as results have it: rounded to four decimals; None where it is missing or not a number."""
    return None if value is None or np.isnan(value) else round(float(value), 4)


def bootstrap_ratio(
    numerator: Float[np.ndarray, " n"],
    denominator: Float[np.ndarray, " n"],
    subjects: Int[np.ndarray, " n"],
    seed: int,
    smallest: float = 0.0,
) -> Estimate:
    """`sum(numerator) / sum(denominator)`, with a percentile interval over subjects drawn again with replacement.

    Rows of one subject are not independent: they are drawn together. Numerator and denominator share the draws. Where
    the mean denominator is not above `smallest` in size, or its own interval includes zero, there is no ratio.

    Args:
        subjects: which subject each row is of.
    """
    if len(numerator) == 0:
        return UNMEASURABLE
    names, of_row = np.unique(subjects, return_inverse=True)
    sums = np.stack([np.bincount(of_row, values) for values in (numerator, denominator)], axis=1)
    above, below = (resampled_counts(len(names), DRAWS, np.random.default_rng(seed)) @ sums).T
    if abs(denominator.mean()) <= smallest:
        return UNMEASURABLE
    return _quotient(numerator.sum(), denominator.sum(), above, below)


def bootstrap_gap(
    values: Float[np.ndarray, " n"],
    reference: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    seed: int,
    smallest: float = 0.0,
) -> Estimate:
    """The difference of the two sides' means of `values`, over that of `reference`; each side is drawn by itself.

    No ratio where the reference's gap is not above `smallest`, or its interval includes zero.
    """
    if positive.all() or not positive.any():
        return UNMEASURABLE
    both = np.stack([values, reference], axis=1)
    drawn = [resampled_means(both[side], seed + number) for number, side in enumerate((positive, ~positive))]
    gap, of_reference = both[positive].mean(0) - both[~positive].mean(0)
    above, below = (drawn[0] - drawn[1]).T
    if abs(of_reference) <= smallest:
        return UNMEASURABLE
    return _quotient(gap, of_reference, above, below)


def _quotient(
    numerator: float, denominator: float, above: Float[np.ndarray, " draws"], below: Float[np.ndarray, " draws"]
) -> Estimate:
    """A ratio with the interval of its draws; none where the interval of the denominator's draws includes zero."""
    low, high = np.quantile(below, _TAILS)
    if low <= 0 <= high:
        return UNMEASURABLE
    return Estimate(float(numerator / denominator), *np.quantile(above / below, _TAILS).tolist())


def bootstrap_auroc(values: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], seed: int) -> Estimate:
    """The chance that a positive is above a negative, ties counted half; each side is drawn by itself."""
    if positive.all() or not positive.any():
        return UNMEASURABLE
    above = values[positive][:, None] - values[~positive]
    wins = (above > 0) + 0.5 * (above == 0)
    random = np.random.default_rng(seed)
    rows, columns = (resampled_counts(n, DRAWS, random) / n for n in wins.shape)
    drawn = ((rows @ wins) * columns).sum(1)
    return Estimate(float(wins.mean()), *np.quantile(drawn, _TAILS).tolist())


def welch(a: Float[np.ndarray, "a n"], b: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " n"]:
    """p-values, two-sided, of equal means of each column; 1 where there is nothing to tell: constants, or one row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's words for those columns
        p_values = np.asarray(ttest_ind(a, b, equal_var=False)[1])
    return np.nan_to_num(p_values, nan=1.0)


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
    """Adjusted p-values that control the chance of any false discovery (Holm 1979), which scipy lacks."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return adjusted


def pearson(a: Float[np.ndarray, "n a"], b: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "a b"]:
    """Pearson's r of each column of `a` with each of `b`; 0 where a column is constant.

    One matrix product: `scipy.stats.pearsonr` takes pairs of columns and tests each of them.
    """
    return np.clip(standardised(a).T @ standardised(b), -1, 1)


def standardised(columns: Float[np.ndarray, "n columns"]) -> Float[np.ndarray, "n columns"]:
    """Columns with mean 0 and length 1, whose inner products are correlations; 0 where a column is constant."""
    centred = columns.astype(np.float64) - columns.mean(0, dtype=np.float64)
    norm = np.linalg.norm(centred, axis=0)
    # A column that is constant but for rounding has no correlation with anything.
    constant = norm <= 1e-12 * np.sqrt(len(columns)) * np.abs(columns).max(0, initial=0)
    return np.where(constant, 0, centred / np.where(constant, 1, norm))
