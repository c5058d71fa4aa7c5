"""What a batch's tables hold of each model's artifacts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from sfc.core.artifacts import Artifact
from sfc.core.config import Experiment
from sfc.studies.batch import depth
from sfc.studies.batch.depth import patched_components, relative_depth, written_components
from sfc.studies.logits.roles import COMPLIANCE, GUARDRAIL
from sfc.studies.study import Finished

Artifacts = Mapping[str, Artifact]
"""of one model, by stage"""

COLUMNS = (
    "model", "source", "failed", "n_layers", "refused_toxic", "refused_hard", "refused_safe", "score_auroc",
    "best_layer", "separation", "probe_accuracy", "probe_control", "n_heads", "n_guardrail", "n_compliance",
    "strongest_head", "n_pairs", "n_components", "n_critical", "strongest_denoise", "strongest_noise", "n_nodes",
    "faithfulness", "completeness_normalised",
)  # fmt: skip
"""of the table of models; what was not measured is None"""


def model_row(experiment: Experiment, artifacts: Artifacts, failed: Sequence[str]) -> dict[str, Any]:
    """One model's line of the table, with `COLUMNS`; `failed` names the stages that came to nothing."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"model": experiment.name, "source": experiment.model.source, "failed": ", ".join(failed)}
    for stage, artifact in artifacts.items():
        row |= _FIGURES[stage](artifact)
    return row


def critical_table(studied: Mapping[str, Artifacts]) -> tuple[pd.DataFrame, Mapping[str, list[str]]]:
    """The critical components of all models, and the models in which each kind of evidence was looked for."""
    tables, measured = [], {}
    for name, artifacts in studied.items():
        if patching := artifacts.get("patching"):
            effects = pd.read_csv(patching.folder / "effects.csv")
            tables.append(patched_components(name, effects, Finished(patching.folder).result["n_layers"]))
            for direction in effects["direction"].unique():
                measured.setdefault(str(direction), []).append(name)
        if logits := artifacts.get("logits"):
            tables.append(written_components(name, pd.read_csv(logits.folder / "components.csv")))
            for role in (GUARDRAIL, COMPLIANCE):
                measured.setdefault(role, []).append(name)
    found = [table for table in tables if len(table)]
    empty = pd.DataFrame(columns=list(depth.COLUMNS))
    return pd.concat(found, ignore_index=True) if found else empty, measured


def probe_table(studied: Mapping[str, Artifacts]) -> pd.DataFrame:
    """The probe's figures at every layer of all models, with `model` and `depth`; empty where none was probed."""
    tables = []
    for name, artifacts in studied.items():
        if probe := artifacts.get("probe"):
            layers = pd.read_csv(probe.folder / "layers.csv")
            tables.append(layers.assign(model=name, depth=relative_depth(layers["layer"], len(layers))))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _behaviour(artifact: Artifact) -> dict[str, Any]:
    result = artifact.manifest()["result"]
    groups = pd.DataFrame(result["groups"]).groupby("label")[["refusals", "n"]].sum()
    rates = (groups["refusals"] / groups["n"]).round(4).to_dict()
    auroc = result["auroc"]
    return {
        **{f"refused_{label}": rates.get(label) for label in ("toxic", "hard", "safe")},
        "score_auroc": None if auroc is None else round(auroc, 4),
    }


def _probe(artifact: Artifact) -> dict[str, Any]:
    layers = pd.read_csv(artifact.folder / "layers.csv")
    if layers["separation"].isna().all():
        return {"n_layers": len(layers)}
    best = layers.iloc[int(layers["separation"].argmax())]
    return {
        "n_layers": len(layers),
        "best_layer": int(best["layer"]),
        "separation": round(float(best["separation"]), 4),
        "probe_accuracy": round(float(best["accuracy"]), 4),
        "probe_control": round(float(best["control"]), 4),
    }


def _logits(artifact: Artifact) -> dict[str, Any]:
    result = Finished(artifact.folder).result
    counts = {f"n_{role}": len(result[role]) for role in ("guardrail", "compliance")}
    return {**counts, "n_heads": result["n_heads"], "strongest_head": result["heads"][0]["component"]}


def _patching(artifact: Artifact) -> dict[str, Any]:
    result = Finished(artifact.folder).result
    strongest = {f"strongest_{direction}": None for direction in ("denoise", "noise")}
    for row in result["critical"]:
        if row["kind"] == "head" and row["rank"] == 1:
            strongest[f"strongest_{row['direction']}"] = row["component"]
    counts = {name: result[name] for name in ("n_layers", "n_pairs", "n_components", "n_critical")}
    return {**counts, **strongest}


def _circuit(artifact: Artifact) -> dict[str, Any]:
    result = artifact.manifest()["result"]
    return {name: result[name] for name in ("n_nodes", "faithfulness", "completeness_normalised")}


_FIGURES: dict[str, Callable[[Artifact], dict[str, Any]]] = {
    "behaviour": _behaviour,
    "probe": _probe,
    "logits": _logits,
    "patching": _patching,
    "circuit": _circuit,
}
