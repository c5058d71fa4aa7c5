"""One category's circuit beside that of SAEs trained from another seed."""

from pathlib import Path

import numpy as np

from sfc.circuits.files import load_circuit
from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import write_csv
from sfc.core.progress import progress_bar
from sfc.models.loading import choose_device
from sfc.run import Run
from sfc.saes.format import load_dictionary
from sfc.studies.discover.study import DISCOVER
from sfc.studies.replicate.matching import (
    SAME,
    Matchings,
    circuit_agreement,
    cosine_counts,
    match_features,
    matched_nodes,
    share_with_partner,
    site_counts,
)
from sfc.studies.replicate.options import ORIGINAL, REPLICATION
from sfc.studies.study import Finished, Made

_MEASURED = ("faithfulness", "completeness", "completeness_normalised")
_FIGURES = ("n_nodes", *(f"{name}{end}" for name in _MEASURED for end in ("", "_low", "_high")), "random_faithfulness")


def measure(run: Run, other: Run, folder: Path) -> Made:
    """Match the features of two runs' dictionaries and their finished circuits, and write tables into the folder.

    Args:
        other: the same run with SAEs from another seed.

    Raises:
        UserError: a circuit or a dictionary is corrupt.
    """
    matchings = _matchings(run, other)
    circuits = [Finished(DISCOVER.artifact(each).folder) for each in (run, other)]
    original, replication = (load_circuit(circuit.files["circuit"]) for circuit in circuits)
    nodes = matched_nodes(original, replication, matchings)
    sites = site_counts(nodes, matchings)
    cosines = np.concatenate([of_original.cosine for of_original, _ in matchings.values()])
    write_csv(folder / "nodes.csv", nodes, digits=6)
    write_csv(folder / "cosines.csv", cosine_counts(nodes, cosines), digits=6)
    figures = {
        name: {
            "sae_seed": each.experiment.sae_seed,
            "circuit": circuit.folder.name,
            **{figure: circuit.result[figure] for figure in _FIGURES},
            **_rounded({"share_with_partner": share_with_partner(nodes, name)}),
        }
        for name, each, circuit in zip((ORIGINAL, REPLICATION), (run, other), circuits, strict=True)
    }
    return Made(
        {
            "preset": run.experiment.name,
            "category": circuits[0].result["category"],
            "method": DiscoveryOptions.of(run.experiment).method,
            "effect_unit": original.graph["effect_unit"],
            "same_from_cosine": SAME,
            **_rounded(circuit_agreement(nodes, sites)),
            **figures,
            "sites": sites.round(4).rename_axis("site").reset_index().to_dict("records"),
        }
    )


def _matchings(run: Run, other: Run) -> Matchings:
    """The features of both runs' dictionaries matched, site by site, so that only two are in memory."""
    matchings, device, sites = {}, choose_device(run.device), run.experiment.activations.sites
    with progress_bar("matching features", len(sites), "sites") as progress:
        for site in sites:
            decoders = [load_dictionary(each.saes.folder / site, device).W_dec for each in (run, other)]
            matchings[site] = match_features(*decoders)
            progress(1)
    return matchings


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
