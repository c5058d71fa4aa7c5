"""Which components write refusal on the prompts that call for it, and which heads are guardrails.

A head is a *guardrail* head if it pushes toxic prompts towards refusal (the interval of its mean contribution lies
above zero) and more so than safe ones (the difference toxic - safe is positive with q < 0.05). A *compliance* head is
its mirror image: below zero on toxic prompts, and lower there than on safe ones. All others are neither, among them
those that push every prompt alike. q-values control the false discovery rate over all heads of the model.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control, ttest_ind

from sfc.stats import bootstrap_means

if TYPE_CHECKING:
    from sfc.studies.logits.attribution import LogitAttribution

GUARDRAIL, COMPLIANCE, NEITHER = "guardrail", "compliance", "neither"
MOST_FALSE = 0.05


def component_table(attribution: "LogitAttribution", toxic: Bool[np.ndarray, " prompts"], seed: int) -> pd.DataFrame:
    """One row per component, in the order of `attribution.components`, contributions in nats.

    Columns: `component`, `kind`, `layer`, `head` (missing where it has none), `toxic_mean`, `toxic_low`, `toxic_high`,
    `safe_mean`, `safe_low`, `safe_high` (95 % bootstrap intervals), `difference` (toxic - safe), and for heads
    `p_value` (Welch's t-test, two-sided), `q_value` and `role`.

    Raises:
        ValueError: there are no toxic or no safe prompts.
    """
    table = pd.DataFrame(attribution.components).rename(columns={"name": "component"})
    table = table.astype({"layer": "Int64", "head": "Int64"})
    sides = {"toxic": attribution.contributions[toxic], "safe": attribution.contributions[~toxic]}
    for side, contributions in sides.items():
        for name, values in bootstrap_means(contributions, seed)._asdict().items():
            table[f"{side}_{name}"] = values
    table["difference"] = table["toxic_mean"] - table["safe_mean"]
    is_head = (table["kind"] == "head").to_numpy(dtype=bool)
    p_values = _welch(sides["toxic"][:, is_head], sides["safe"][:, is_head])
    table.loc[is_head, "p_value"] = p_values
    table.loc[is_head, "q_value"] = false_discovery_control(p_values)
    table.loc[is_head, "role"] = _roles(table[is_head])
    return table


def strongest(components: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `component_table`, those first whose contributions differ most between toxic and safe prompts."""
    return components.sort_values("difference", key=lambda values: -values.abs(), kind="stable")


def group_table(attribution: "LogitAttribution", prompts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean contributions of each category and label (columns `category` and `label` of `prompts`, one row a prompt).

    Columns: `category`, `label`, `n`, `component`, `mean`, `low`, `high` (95 % bootstrap intervals), in nats.
    """
    names = [component.name for component in attribution.components]
    tables = []
    for (category, label), rows in prompts.groupby(["category", "label"]).indices.items():  # pyright: ignore
        means = bootstrap_means(attribution.contributions[rows], seed)
        facts = {"category": category, "label": label, "n": len(rows), "component": names}
        tables.append(pd.DataFrame(facts | means._asdict()))
    return pd.concat(tables, ignore_index=True)


def _welch(toxic: Float[np.ndarray, "t heads"], safe: Float[np.ndarray, "s heads"]) -> Float[np.ndarray, " heads"]:
    """p-values of equal means; 1 where there is nothing to tell, as for a head that never writes or a lone prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's words for those heads
        p_values = np.asarray(ttest_ind(toxic, safe, equal_var=False)[1])
    return np.nan_to_num(p_values, nan=1.0)


def _roles(heads: pd.DataFrame) -> list[str]:
    discovered = heads["q_value"] < MOST_FALSE
    guardrail = discovered & (heads["toxic_low"] > 0) & (heads["difference"] > 0)
    compliance = discovered & (heads["toxic_high"] < 0) & (heads["difference"] < 0)
    return np.select([guardrail, compliance], [GUARDRAIL, COMPLIANCE], NEITHER).tolist()
