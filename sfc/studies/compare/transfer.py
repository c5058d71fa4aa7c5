"""Do the circuits of categories decide, on their own category's test prompts and on those of the others?

Circuits that score high whatever they are asked overlap, and are faithful on each other's prompts. So what is compared
is what they lack: the share of the score that comes back in the worse direction, and what is left of the gap.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from sfc.stats import bootstrap_means

MEASURES = {
    "recovered": "recovered, in the direction in which less is",
    "agreement": "agreement",
    "gap_kept": "gap kept",
    "separation": "separation",
    "faithfulness": "faithfulness",
}
"""figures of `transfer.csv`; of these, a circuit that refuses whatever it is asked has the last alone"""
_DECIDING = ("recovered", "gap_kept")


class Transfer(NamedTuple):
    """A figure of circuits on test prompts, with the 95 % interval of its difference over categories of prompts."""

    own: float
    """mean over categories of the category's own circuit"""
    other: float
    """mean over categories of all others' circuits"""
    difference: float
    difference_low: float
    difference_high: float


def with_recovered(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `recovered`, the lesser of the two directions; missing where one of them is."""
    directions = rows[["recovered_toxic", "recovered_safe"]].astype(float)
    return rows.assign(recovered=directions.min(axis=1, skipna=False))


def by_category(transfer: pd.DataFrame, figure: str) -> pd.DataFrame:
    """A figure of each category's circuit (rows) on the test prompts of each category (columns)."""
    return with_recovered(transfer).pivot(index="circuit", columns="prompts", values=figure).astype(float)


def measured(transfer: pd.DataFrame, seed: int) -> dict[str, Transfer]:
    """Those of `MEASURES` that are known of every circuit on every category's prompts."""
    tables = {name: by_category(transfer, name) for name in MEASURES}
    return {name: _transfer(table.to_numpy(), seed) for name, table in tables.items() if table.notna().all(axis=None)}


def _transfer(table: Float[np.ndarray, "circuits prompts"], seed: int) -> Transfer:
    own = np.diag(table)
    other = (table.sum(0) - own) / (len(table) - 1)
    mean, low, high = (float(ends[0]) for ends in bootstrap_means((own - other)[:, None], seed))
    return Transfer(float(own.mean()), float(other.mean()), mean, low, high)


def in_words(found: Mapping[str, Transfer]) -> str:
    """What the figures allow to say."""
    from sfc.circuits.proof import SMALL  # where torch is imported; the tables above are read without it

    deciding = [name for name in _DECIDING if name in found]
    if not deciding:
        return (
            "Whether these circuits decide is not measurable here: prompts of the two sides score too much alike, so"
            " that nothing is said of what the overlap means."
        )
    told = "; ".join(
        f"{MEASURES[name]} {of.own:.2f} on their own category's test prompts and {of.other:.2f} on the others'"
        f" (difference {of.difference:.2f}, 95 % interval over categories {of.difference_low:.2f} to"
        f" {of.difference_high:.2f})"
        for name, of in found.items()
        if name in (*_DECIDING, "agreement")
    )
    if all(found[name].own < SMALL for name in deciding):
        return (
            "The circuits do not tell the two sides apart, so that their overlap says nothing of how the model does:"
            f" {told}."
        )
    return f"What the circuits restore, on both sides: {told}."
