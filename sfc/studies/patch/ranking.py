"""What can be patched, one component or range of layers at a time, and how their effects are ranked.

The effect of a patch is a ratio of means, `mean(s_patched - s_base) / mean(s_source - s_base)`, not a mean of ratios: a
pair whose two scores lie close together has a ratio that may be anything, and would outweigh all others. The interval
comes from resampling pairs, numerator and denominator together. The p-value is that of a sign-flip permutation test of
the mean change: if the patch did nothing, a pair's change would have been as likely with the other sign. There is one
test per component; Benjamini and Hochberg's q-values control the false discovery rate over all components of a kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import false_discovery_control, rankdata

from sfc.core.sites import SiteKind, site_of
from sfc.stats import pearson, resampled_counts
from sfc.studies.patch import ComponentKind

_WHERE: dict[ComponentKind, SiteKind] = {
    "resid": "resid_post",
    "attn": "attn_out",
    "mlp": "mlp_out",
    "head": "hook_z",
}


class Patch(NamedTuple):
    """What one run replaces: a component of one layer, or of a range of layers at once."""

    kind: ComponentKind
    first_layer: int
    layer: int
    """the last of its layers, which is the first where the patch is a single component"""
    head: int | None = None

    @property
    def name(self) -> str:
        """`head.21.3`, `mlp.21`, and for a range `mlp.0-21`."""
        layers = f"{self.first_layer}-{self.layer}" if self.is_range else str(self.layer)
        return f"{self.kind}.{layers}" + ("" if self.head is None else f".{self.head}")

    @property
    def is_range(self) -> bool:
        return self.first_layer != self.layer

    @property
    def sites(self) -> list[str]:
        """The hook points where it acts, in the order in which the model passes them."""
        return [site_of(_WHERE[self.kind], layer) for layer in range(self.first_layer, self.layer + 1)]


def single_patches(kinds: Sequence[ComponentKind], layers: Sequence[int], n_heads: int) -> list[Patch]:
    """Every component of these kinds and layers by itself; `head` is every head of a layer."""
    return [
        Patch(kind, layer, layer, head)
        for kind in kinds
        for layer in layers
        for head in (range(n_heads) if kind == "head" else (None,))
    ]


def cumulative_patches(kinds: Sequence[ComponentKind], layers: Sequence[int]) -> list[Patch]:
    """For each layer but the first, everything of a kind from the first layer to it at once.

    Heads have no ranges of their own: all heads of a layer together make its attention output.
    """
    return [
        Patch(kind, min(layers), layer)
        for kind in kinds
        if kind != "head"
        for layer in sorted(layers)
        if layer > min(layers)
    ]


_BEST = 10
_FLIPS_AT_ONCE = 1000


class PatchRuns(NamedTuple):
    """The scores of one direction and one set of positions, in nats."""

    direction: str
    positions: str
    patches: Sequence[Patch]
    pairs: Sequence[int]
    """numbers of the pairs that could be aligned here"""
    base: Float[np.ndarray, " pairs"]
    source: Float[np.ndarray, " pairs"]
    patched: Float[np.ndarray, "patches pairs"]
    attribution: Float[np.ndarray, "patches pairs"]
    """by how much attribution patching says that the score changes; NaN where it says nothing"""


def effect_table(runs: Sequence[PatchRuns], draws: int, flips: int, min_denominator: float, seed: int) -> pd.DataFrame:
    """One row per direction, position set and patch, best first within direction and kind.

    Columns: `direction, kind, component, first_layer, layer, head, positions, n_pairs, effect, low, high` (95 %),
    `p_value, q_value, attribution, rank`. Effects have no unit; where the mean gap between base and source is smaller
    than `min_denominator` nats they are missing.
    """
    table = pd.concat([_rows(run, draws, flips, min_denominator, seed) for run in runs], ignore_index=True)
    family = ["direction", "kind", "is_range"]
    table["q_value"] = table.groupby(family)["p_value"].transform(lambda p: false_discovery_control(p.to_numpy()))
    table["rank"] = table["effect"].abs().groupby([table[column] for column in family]).rank("first", ascending=False)
    table = table.sort_values([*family, "rank"], kind="stable").reset_index(drop=True)
    table[["effect", "low", "high", "attribution"]] += 0.0  # no minus sign before a zero
    return table.astype({"head": "Int64", "rank": "Int64"})


def score_table(runs: Sequence[PatchRuns]) -> pd.DataFrame:
    """Every score that was measured, in nats: one row per direction, position set, component and pair.

    Columns: `direction, positions, component, pair, base, source, patched`, and `attribution`, the patched score that
    attribution patching predicts.
    """
    tables = [
        pd.DataFrame(
            {
                "direction": run.direction,
                "positions": run.positions,
                "component": patch.name,
                "pair": run.pairs,
                "base": run.base,
                "source": run.source,
                "patched": patched,
                "attribution": run.base + change,
            }
        )
        for run in runs
        for patch, patched, change in zip(run.patches, run.patched, run.attribution, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def sign_flip_test(changes: Float[np.ndarray, "n pairs"], flips: int, seed: int) -> Float[np.ndarray, " n"]:
    """Two-sided p-value that the mean of each row is 0, by flipping signs of whole columns at random.

    All sign patterns where there are no more than `flips` of them, which makes the test exact; else as many random
    ones, the observed one counted with them (Phipson and Smyth 2010). `scipy.stats.permutation_test` does the same for
    one row after another; here every pattern is one matrix product for thousands of rows.
    """
    n_pairs = changes.shape[1]
    observed = np.abs(changes.sum(1))
    # A flipped sum equals the observed one up to rounding for the observed pattern and its mirror image.
    observed -= 1e-9 * np.abs(changes).sum(1)
    if 2**n_pairs <= flips:
        patterns = (np.arange(2**n_pairs)[:, None] >> np.arange(n_pairs) & 1) * 2.0 - 1
        return (np.abs(patterns @ changes.T) >= observed).mean(0)
    random = np.random.default_rng(seed)
    at_least = np.ones(len(changes))
    for start in range(0, flips, _FLIPS_AT_ONCE):
        count = min(_FLIPS_AT_ONCE, flips - start)
        patterns = random.integers(0, 2, (count, n_pairs)) * 2.0 - 1
        at_least += (np.abs(patterns @ changes.T) >= observed).sum(0)
    return at_least / (flips + 1)


def ratio_interval(
    changes: Float[np.ndarray, "n pairs"], gaps: Float[np.ndarray, " pairs"], draws: int, seed: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Ends of the 95 % interval of each row's `mean(changes) / mean(gaps)`: percentiles over resampled pairs.

    One pair has no interval: NaN.
    """
    n_pairs = len(gaps)
    if n_pairs < 2:
        return np.full(len(changes), np.nan), np.full(len(changes), np.nan)
    weights = resampled_counts(n_pairs, draws, np.random.default_rng(seed)).astype(float)
    denominators = weights @ gaps
    # One row after another: every draw of thousands of components at once would not fit into memory.
    ends = [np.percentile(weights @ row / denominators, [2.5, 97.5]) for row in changes]
    low, high = np.array(ends).T
    return low, high


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well attribution patching agrees with the exact effects, per direction and kind, over single components.

    Columns: `direction, kind, n, pearson, spearman` (0 where one side is constant, missing below 3 components),
    `mean_difference` (of the absolute differences), `shared` of the `best` strongest of either.
    """
    rows = []
    for (direction, kind), group in table.dropna(subset=["effect", "attribution"]).groupby(["direction", "kind"]):
        both = group[["effect", "attribution"]].to_numpy(float)
        best = min(_BEST, len(group))
        strongest = [set(np.argsort(-np.abs(values), kind="stable")[:best].tolist()) for values in both.T]
        rows.append(
            {
                "direction": direction,
                "kind": kind,
                "n": len(group),
                "pearson": _correlation(both),
                "spearman": _correlation(rankdata(both, axis=0)),
                "mean_difference": float(np.abs(both[:, 0] - both[:, 1]).mean()),
                "best": best,
                "shared": len(strongest[0] & strongest[1]),
            }
        )
    return pd.DataFrame(rows)


def _correlation(both: Float[np.ndarray, "n 2"]) -> float | None:
    return float(pearson(both[:, :1], both[:, 1:])[0, 0]) if len(both) > 2 else None


def _rows(run: PatchRuns, draws: int, flips: int, min_denominator: float, seed: int) -> pd.DataFrame:
    gaps = run.source - run.base
    changes = run.patched - run.base
    measurable = abs(gaps.mean()) >= min_denominator
    scale = gaps.mean() if measurable else np.nan
    low, high = ratio_interval(changes, gaps, draws, seed)
    return pd.DataFrame(
        {
            "direction": run.direction,
            "kind": [patch.kind for patch in run.patches],
            "component": [patch.name for patch in run.patches],
            "first_layer": [patch.first_layer for patch in run.patches],
            "layer": [patch.layer for patch in run.patches],
            "is_range": [patch.is_range for patch in run.patches],
            "head": [patch.head for patch in run.patches],
            "positions": run.positions,
            "n_pairs": len(run.pairs),
            "effect": changes.mean(1) / scale,
            "low": low if measurable else np.nan,
            "high": high if measurable else np.nan,
            "p_value": sign_flip_test(changes, flips, seed),
            "attribution": run.attribution.mean(1) / scale,
        }
    )
