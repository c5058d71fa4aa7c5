"""Stages whose studies are not declared yet. Each goes when its study lands: its figures become the study's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sfc.core.artifacts import Artifact
from sfc.run import Run
from sfc.studies.study import Finished


@dataclass(frozen=True, eq=False)
class Stage:
    """What a batch needs of a study."""

    ensure: Callable[[Run, str | None], Artifact]
    model_columns: Mapping[str, str]
    model_headline: Sequence[str]
    model_row: Callable[[Finished], dict[str, Any]]


def _ensure(module: str, name: str) -> Callable[..., Artifact]:
    return lambda *arguments: getattr(import_module(module), name)(*arguments)


def _circuit(finished: Finished) -> dict[str, Any]:
    return {name: finished.result[name] for name in ("n_nodes", "faithfulness", "completeness_normalised")}


def _steering(finished: Finished) -> dict[str, Any]:
    points, row = finished.result["operating_points"], {"steered_site": finished.result["site"]}
    for intent in ("force", "suppress"):
        if intent in points:
            row |= {f"{intent}_alpha": points[intent]["alpha"], f"{intent}_rate": points[intent]["changed_rate"]}
    return row


BRIDGE = {
    "steer": Stage(
        lambda run, _category: _ensure("sfc.pipeline_study", "ensure_steering")(run),
        {"steered_site": "steered at", "force_alpha": "alpha that forces", "force_rate": "forces refusal",
         "suppress_alpha": "alpha that suppresses", "suppress_rate": "suppresses refusal"},
        ("force_rate", "suppress_rate"),
        _steering,
    ),
    "discover": Stage(
        lambda run, category: _ensure("sfc.pipeline", "ensure_circuit")(run, category or "violence"),
        {"n_nodes": "nodes", "faithfulness": "faithfulness", "completeness_normalised": "completeness, normalised"},
        ("faithfulness",),
        _circuit,
    ),
}  # fmt: skip
