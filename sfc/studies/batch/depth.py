"""Critical components of several models, by how many models have one at the same relative depth.

Layer 21 of 30 and layer 8 of 12 are not the same layer, but they lie equally deep: layers are compared by their share
of the way from the first (0) to the last (1), in tenths. Heads have numbers that mean nothing in another model, so that
a model counts once per kind and tenth, however many of its heads are critical there.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from sfc.studies.logits import COMPLIANCE, GUARDRAIL, MOST_FALSE
from sfc.studies.study import Finished

COLUMNS = ("model", "evidence", "kind", "component", "layer", "depth", "tenth", "effect", "low", "high", "q_value")
TENTHS = 10
ByModel = Mapping[str, Mapping[str, Finished]]
"""finished artifacts, by model and study"""


def critical_table(studied: ByModel) -> tuple[pd.DataFrame, Mapping[str, list[str]]]:
    """The critical components of all models, and the models in which each kind of evidence was looked for."""
    tables, measured = [], {}
    for model, artifacts in studied.items():
        if patching := artifacts.get("patch"):
            effects = patching.table("effects.csv")
            tables.append(patched_components(model, effects, patching.result["n_layers"]))
            for direction in effects["direction"].unique():
                measured.setdefault(str(direction), []).append(model)
        if logits := artifacts.get("attribute-logits"):
            tables.append(written_components(model, logits.table("components.csv")))
            for role in (GUARDRAIL, COMPLIANCE):
                measured.setdefault(role, []).append(model)
    found = [table for table in tables if len(table)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=list(COLUMNS)), measured


def probe_table(studied: ByModel) -> pd.DataFrame:
    """The probe's figures at every layer of all models, with `model` and `depth`; empty where none was probed."""
    tables = []
    for model, artifacts in studied.items():
        if probe := artifacts.get("probe"):
            layers = probe.table("layers.csv")
            tables.append(layers.assign(model=model, depth=relative_depth(layers["layer"], len(layers))))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def patched_components(model: str, effects: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The components of an `effect_table` with q below 0.05, evidence `denoise` or `noise`, with `COLUMNS`.

    Of several position sets the strongest counts, so that every component is there once per direction. Effects have no
    unit.
    """
    critical = effects[~effects["is_range"] & (effects["q_value"] < MOST_FALSE)].dropna(subset=["effect"])
    critical = critical.sort_values("effect", key=lambda effect: -effect.abs(), kind="stable")
    critical = critical.drop_duplicates(["direction", "component"]).rename(columns={"direction": "evidence"})
    return _placed(model, critical, n_layers)


def written_components(model: str, components: pd.DataFrame) -> pd.DataFrame:
    """The guardrail and compliance heads of a `component_table`, with `COLUMNS`; effects are nats on toxic prompts."""
    heads = components[components["role"].isin((GUARDRAIL, COMPLIANCE))]
    renamed = {"role": "evidence", "toxic_mean": "effect", "toxic_low": "low", "toxic_high": "high"}
    return _placed(model, heads.rename(columns=renamed), int(components["layer"].max()) + 1)


def frequencies(critical: pd.DataFrame, measured: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """In how many models a kind is critical at a depth, most frequent first.

    Args:
        critical: rows with `COLUMNS` of all models.
        measured: for each kind of evidence the models in which it was looked for.

    Returns:
        Columns `evidence, kind, tenth, n_models, n_measured, share, n_components, strongest` (the component of largest
        effect in each model that has one).
    """
    rows = []
    for (evidence, kind, tenth), group in critical.groupby(["evidence", "kind", "tenth"], sort=True):  # pyright: ignore
        ordered = group.sort_values("effect", key=lambda effect: -effect.abs(), kind="stable")
        best = ordered.drop_duplicates("model").sort_values("model")
        n_measured = len(measured[str(evidence)])
        rows.append(
            {
                "evidence": evidence,
                "kind": kind,
                "tenth": tenth,
                "n_models": len(best),
                "n_measured": n_measured,
                "share": len(best) / n_measured,
                "n_components": len(group),
                "strongest": "; ".join(f"{model} {name}" for model, name in best[["model", "component"]].to_numpy()),
            }
        )
    names = ["evidence", "kind", "tenth", "n_models", "n_measured", "share", "n_components", "strongest"]
    table = pd.DataFrame(rows, columns=names)
    return table.sort_values(["share", "n_components"], ascending=False, kind="stable").reset_index(drop=True)


def relative_depth(layers: pd.Series, n_layers: int) -> pd.Series:
    """The share of the way from the first layer (0) to the last (1); a model of one layer is at 1."""
    return layers.astype(float) / (n_layers - 1) if n_layers > 1 else layers.astype(float) + 1.0


def _placed(model: str, rows: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    depth = relative_depth(rows["layer"], n_layers)
    # The small number keeps 0.3 x 10 from being 2.
    tenth = (depth * TENTHS + 1e-9).astype(int).clip(upper=TENTHS - 1)
    return rows.assign(model=model, depth=depth, tenth=tenth)[list(COLUMNS)].reset_index(drop=True)
