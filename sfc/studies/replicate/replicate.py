"""Stage: one category's circuit held against that of SAEs trained anew from another seed."""

import time
from typing import Any

import numpy as np

from sfc.circuits.files import load_circuit
from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import Artifact, read_json, write_csv, write_json
from sfc.core.progress import progress_bar
from sfc.models.loading import choose_device
from sfc.pipeline import circuit_artifact
from sfc.run import Run
from sfc.saes.format import load_dictionary
from sfc.studies.replicate.matching import (
    ORIGINAL,
    REPLICATION,
    SAME,
    Matchings,
    circuit_agreement,
    match_features,
    matched_nodes,
    share_with_partner,
    site_counts,
)
from sfc.studies.replicate.page import write_replication_page

FILES = {"page": "replication.html", "nodes": "nodes.csv", "result": "result.json"}
_MEASURED = ("faithfulness", "completeness", "completeness_normalised")
_FIGURES = ("n_nodes", *(f"{name}{end}" for name in _MEASURED for end in ("", "_low", "_high")), "random_faithfulness")


def make_replication(run: Run, other: Run, artifact: Artifact, category: str, rebuild: bool = False) -> None:
    """Match the features of two runs' dictionaries and their finished circuits, and write tables and page.

    Args:
        other: the same run with SAEs from another seed.

    Raises:
        UserError: a circuit or a dictionary is corrupt.
    """
    began = time.perf_counter()
    with artifact.being_made(rebuild) as folder:
        matchings = _matchings(run, other)
        original, replication = (
            load_circuit(circuit_artifact(each, category).folder / "circuit.json") for each in (run, other)
        )
        nodes = matched_nodes(original, replication, matchings)
        sites = site_counts(nodes, matchings)
        result = {
            "preset": run.experiment.name,
            "category": category,
            "method": DiscoveryOptions.of(run.experiment).method,
            "effect_unit": original.graph["effect_unit"],
            "same_from_cosine": SAME,
            **_rounded(circuit_agreement(nodes, sites)),
            **{
                name: {
                    "sae_seed": each.experiment.sae_seed,
                    **_figures(each, category),
                    **_rounded({"share_with_partner": share_with_partner(nodes, name)}),
                }
                for name, each in ((ORIGINAL, run), (REPLICATION, other))
            },
            "sites": sites.round(4).rename_axis("site").reset_index().to_dict("records"),
            "files": FILES,
        }
        write_csv(folder / FILES["nodes"], nodes, digits=6)
        write_json(folder / FILES["result"], result)
        cosines = np.concatenate([of_original.cosine for of_original, _ in matchings.values()])
        write_replication_page(folder / FILES["page"], nodes, cosines, result)
        artifact.finish(result=result, seconds=round(time.perf_counter() - began, 2))


def _matchings(run: Run, other: Run) -> Matchings:
    """The features of both runs' dictionaries matched, site by site, so that only two are in memory."""
    matchings, device, sites = {}, choose_device(run.device), run.experiment.activations.sites
    with progress_bar("matching features", len(sites), "sites") as progress:
        for site in sites:
            decoders = [load_dictionary(each.saes.folder / site, device).W_dec for each in (run, other)]
            matchings[site] = match_features(*decoders)
            progress(1)
    return matchings


def _figures(run: Run, category: str) -> dict[str, Any]:
    """What a circuit's own result says of it, and where it lies."""
    folder = circuit_artifact(run, category).folder
    result = read_json(folder / "result.json")
    return {"circuit": folder.name, **{name: result[name] for name in _FIGURES}}


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
