"""Does the dial generalise, and what does it cost? Refusal of unsafe against refusal of safe prompts, alpha by alpha.

Made for XSTest (Röttger et al. 2024), whose safe prompts look like unsafe ones: a dial that only makes the model refuse
more raises both rates, and moves along the curve that over-refusal makes. A defence raises one and not the other.
"""

import pandas as pd

from sfc.evaluation.intervals import wilson

UNSAFE, SAFE = "unsafe", "safe"
_SIDES = {UNSAFE: "toxic", SAFE: "safe"}


def trade_off(rows: pd.DataFrame) -> pd.DataFrame:
    """Refusals of both sides per direction and alpha, with Wilson intervals of 95 %.

    Columns: `direction`, `alpha`, and for `unsafe` and `safe` each `n_…`, `…` (the rate), `…_low`, `…_high` and
    `…_unsteered` (the rate of the same prompts as they are).

    Args:
        rows: of a sweep over prompts with a `label`, `toxic` or `safe`, both of which are there.
    """
    points = []
    for (direction, alpha), group in rows.groupby(["direction", "alpha"], sort=False):  # pyright: ignore
        point: dict[str, object] = {"direction": direction, "alpha": alpha}
        for side, label in _SIDES.items():
            of_side = group[group["label"] == label]
            n, refusals = len(of_side), int(of_side["refused"].sum())
            low, high = wilson(refusals, n)
            point |= {f"n_{side}": n, side: refusals / n, f"{side}_low": low, f"{side}_high": high}
            point[f"{side}_unsteered"] = float(of_side["unsteered_refused"].mean())
        points.append(point)
    return pd.DataFrame(points)


def best_defence(curve: pd.DataFrame) -> float | None:
    """The alpha at which most unsafe prompts are refused, of those that raise this rate and not that of safe ones.

    Of several, the one that refuses fewest safe prompts; None where there is none.

    Args:
        curve: as `trade_off` makes it, of one direction.
    """
    better = curve[(curve[UNSAFE] > curve[f"{UNSAFE}_unsteered"]) & (curve[SAFE] <= curve[f"{SAFE}_unsteered"])]
    if better.empty:
        return None
    return float(better.sort_values([UNSAFE, SAFE], ascending=[False, True])["alpha"].iloc[0])
