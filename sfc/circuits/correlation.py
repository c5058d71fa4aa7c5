"""Pearson correlations of many features at once, and false discovery."""

import numpy as np
from jaxtyping import Float


def pearson(a: Float[np.ndarray, "n a"], b: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "a b"]:
    """Pearson's r of each column of `a` with each of `b`; 0 where a column is constant."""
    return np.clip(standardised(a).T @ standardised(b), -1, 1)


def standardised(columns: Float[np.ndarray, "n columns"]) -> Float[np.ndarray, "n columns"]:
    """Columns with mean 0 and length 1, whose inner products are correlations; 0 where a column is constant."""
    centred = columns.astype(np.float64) - columns.mean(0, dtype=np.float64)
    norm = np.linalg.norm(centred, axis=0)
    # A column that is constant but for rounding has no correlation with anything.
    constant = norm <= 1e-12 * np.sqrt(len(columns)) * np.abs(columns).max(0, initial=0)
    return np.where(constant, 0, centred / np.where(constant, 1, norm))


def benjamini_hochberg(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Adjusted p-values (q-values) that control the false discovery rate (Benjamini and Hochberg 1995)."""
    n = len(p_values)
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * n / np.arange(1, n + 1)
    q_values = np.empty(n)
    q_values[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return q_values
