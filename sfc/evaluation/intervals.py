"""Confidence intervals of rates and of means."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import norm


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (Wilson 1927) of a binomial rate; [0, 1] where nothing was observed.

    Unlike the textbook interval it stays within [0, 1] and says something at rates of 0 and 1.

    Raises:
        ValueError: `successes` is not between 0 and n, or the confidence not between 0 and 1.
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise ValueError(f"no interval for {successes} of {n} at confidence {confidence}")
    if n == 0:
        return Interval(0.0, 1.0)
    z = float(norm.ppf((1 + confidence) / 2))
    rate, weight = successes / n, z * z / n
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / n + weight / (4 * n))
    # The ends at rates 0 and 1 are 0 and 1; rounding must not say otherwise, nor leave the rate outside.
    return Interval(min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate))


class MeanIntervals(NamedTuple):
    """Means of several quantities with the ends of their intervals."""

    mean: Float[np.ndarray, " quantities"]
    low: Float[np.ndarray, " quantities"]
    high: Float[np.ndarray, " quantities"]


def bootstrap_means(
    values: Float[np.ndarray, "n quantities"], seed: int, confidence: float = 0.95, draws: int = 2000
) -> MeanIntervals:
    """Means of the columns, with percentile intervals over rows drawn again with replacement (Efron 1979).

    All columns share the draws, so that what holds between them in every row holds between their means in every draw.

    Raises:
        ValueError: there are no rows.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_means(values, seed, draws), [tail, 1 - tail], axis=0)
    return MeanIntervals(values.mean(0), low, high)


def resampled_means(
    values: Float[np.ndarray, "n quantities"], seed: int, draws: int = 2000
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
