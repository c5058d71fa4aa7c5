"""Faithfulness and completeness of a circuit, from the scores of four models.

F(M) is the full model, F(C) has everything outside the circuit mean-ablated, F(M\\C) the circuit, F(0) everything.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sfc.evaluation.intervals import resampled_means

_TAILS = (0.025, 0.975)


class Metrics(NamedTuple):
    """Ratios without a unit; None where the denominator cannot be told from zero."""

    faithfulness: float | None
    """`(F(C) - F(0)) / (F(M) - F(0))`: 1 where the circuit alone does what the model does (Marks et al. 2024)"""
    completeness: float | None
    """`F(M\\C) / F(M)`, as the published pipeline defines it; depends on where the score's zero lies"""
    completeness_normalised: float | None
    """`(F(M\\C) - F(0)) / (F(M) - F(0))`: 0 where nothing is left without the circuit (Marks et al. 2024)"""


class Scores(NamedTuple):
    """The score of every prompt under the four models, in nats; or means of them, all of one shape."""

    model: Float[np.ndarray, " prompts"]
    empty: Float[np.ndarray, " prompts"]
    circuit: Float[np.ndarray, " prompts"]
    complement: Float[np.ndarray, " prompts"]


def circuit_metrics(
    f_model: float, f_empty: float, f_circuit: float, f_complement: float, min_denominator: float
) -> Metrics:
    """The three ratios; a denominator smaller in size than `min_denominator` makes None, never a huge number."""
    means = Scores(*(np.array(f) for f in (f_model, f_empty, f_circuit, f_complement)))
    return Metrics(
        *(
            float(numerator / denominator) if abs(denominator) >= min_denominator else None
            for numerator, denominator in _fractions(means)
        )
    )


def metrics_with_intervals(scores: Scores, min_denominator: float, seed: int) -> dict[str, float | None]:
    """The ratios of the mean scores, each with the ends of its 95 % interval as `…_low` and `…_high`.

    Prompts are drawn again with replacement, the same ones for numerator and denominator, so that both move together.
    A ratio and its interval are None where the denominator is smaller than `min_denominator`, or its own interval
    includes zero.
    """
    f_model, f_empty, f_circuit, f_complement = (float(values.mean()) for values in scores)
    plain = circuit_metrics(f_model, f_empty, f_circuit, f_complement, min_denominator)
    resampled = _fractions(Scores(*resampled_means(np.stack(scores, axis=1), seed).T))
    figures: dict[str, float | None] = {}
    for (name, value), (numerator, denominator) in zip(plain._asdict().items(), resampled, strict=True):
        low, high = np.quantile(denominator, _TAILS)
        measurable = value is not None and (low > 0 or high < 0)
        ends = np.quantile(numerator / denominator, _TAILS).tolist() if measurable else [None, None]
        figures |= {name: value if measurable else None, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return figures


def _fractions(f: Scores) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of each ratio, in the order of `Metrics`."""
    span = f.model - f.empty
    return [(f.circuit - f.empty, span), (f.complement, f.model), (f.complement - f.empty, span)]
