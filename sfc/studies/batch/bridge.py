"""Steering as a stage of batches, until its study is declared: then its figures become the study's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfc.core.artifacts import Artifact
from sfc.pipeline_study import ensure_steering
from sfc.run import Run
from sfc.studies.study import Finished


@dataclass(frozen=True, eq=False)
class Stage:
    """What a batch needs of a study."""

    ensure: Callable[[Run], Artifact]
    model_columns: Mapping[str, str]
    model_headline: Sequence[str]
    model_row: Callable[[Finished], dict[str, Any]]


def _steering(finished: Finished) -> dict[str, Any]:
    points, row = finished.result["operating_points"], {"steered_site": finished.result["site"]}
    for intent in ("force", "suppress"):
        if intent in points:
            row |= {f"{intent}_alpha": points[intent]["alpha"], f"{intent}_rate": points[intent]["changed_rate"]}
    return row


BRIDGE = {
    "steer": Stage(
        ensure_steering,
        {
            "steered_site": "steered at",
            "force_alpha": "alpha that forces",
            "force_rate": "forces refusal",
            "suppress_alpha": "alpha that suppresses",
            "suppress_rate": "suppresses refusal",
        },
        ("force_rate", "suppress_rate"),
        _steering,
    )
}
