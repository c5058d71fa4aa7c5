"""One category's circuit beside that of SAEs trained from another seed, or on other prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sfc.circuits.files import load_circuit
from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import write_csv
from sfc.core.progress import progress_bar
from sfc.models.loading import choose_device
from sfc.pages.text import count_text
from sfc.run import Run
from sfc.saes.format import load_dictionary
from sfc.saes.nulls import random_rotation
from sfc.studies.discover.evidence import FIGURES
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

_PUBLISHED = ("faithfulness", "completeness", "completeness_normalised")
_FIGURES = (
    "n_nodes", "n_errors", *FIGURES, "null_agreement", "rotated_agreement", "all_features_recovered",
    *(f"{name}{end}" for name in _PUBLISHED for end in ("", "_low", "_high")), "random_faithfulness", "says",
)  # fmt: skip


def measure(run: Run, other: Run, folder: Path) -> Made:
    """Match the features of two runs' dictionaries and their finished circuits, and write tables into the folder.

    Args:
        other: the same run with SAEs from another seed, or of other prompts.

    Raises:
        UserError: a circuit or a dictionary is corrupt.
    """
    matchings, by_chance = _matchings(run, other)
    circuits = [Finished(DISCOVER.artifact(each).folder) for each in (run, other)]
    original, replication = (load_circuit(circuit.files["circuit"]) for circuit in circuits)
    nodes = matched_nodes(original, replication, matchings)
    sites = site_counts(nodes, matchings).join(by_chance)
    cosines = np.concatenate([of_original.cosine for of_original, _ in matchings.values()])
    write_csv(folder / "nodes.csv", nodes, digits=6)
    write_csv(folder / "cosines.csv", cosine_counts(nodes, cosines), digits=6)
    figures = {
        name: {
            "sae_seed": each.experiment.sae_seed,
            "half": each.experiment.saes.half,
            "circuit": circuit.folder.name,
            **{figure: circuit.result.get(figure) for figure in _FIGURES},
            **_rounded({"share_with_partner": share_with_partner(nodes, name)}),
        }
        for name, each, circuit in zip((ORIGINAL, REPLICATION), (run, other), circuits, strict=True)
    }
    agreement = _rounded(circuit_agreement(nodes, sites))
    return Made(
        {
            "preset": run.experiment.name,
            "category": circuits[0].result["category"],
            "method": DiscoveryOptions.of(run.experiment).method,
            "effect_unit": original.graph["effect_unit"],
            "same_from_cosine": SAME,
            **agreement,
            **figures,
            "sites": sites.round(4).rename_axis("site").reset_index().to_dict("records"),
            "says": in_words(agreement),
        }
    )


def in_words(agreement: Mapping[str, Any]) -> str:
    """What the figures of `circuit_agreement` allow to say."""
    known = (
        f"Of all features {agreement['matched_share']:.1%} have a partner in the other dictionaries (where these are"
        f" turned at random, {agreement['matched_share_chance']:.1%})"
    )
    shared = f"the circuits share {count_text(agreement['n_shared'], 'node')}, Jaccard {agreement['jaccard']:.2f}"
    matched = agreement["matched_jaccard"]
    among = (
        "no node of theirs is one that both dictionaries have"
        if matched is None
        else f"among nodes that both dictionaries have {matched:.2f} ({agreement['matched_chance']:.2f})"
    )
    return f"{known}; {shared} (by chance {agreement['chance']:.2f}); {among}"


def _matchings(run: Run, other: Run) -> tuple[Matchings, pd.DataFrame]:
    """The features of both runs' dictionaries matched, site by site, so that only two are in memory.

    And what there is by chance: a row per site, with `matched_chance` and `median_cosine_chance`, where the other
    dictionary is turned by a random rotation.
    """
    matchings, device, sites, by_chance = {}, choose_device(run.device), run.experiment.activations.sites, {}
    with progress_bar("matching features", len(sites), "sites") as progress:
        for site in sites:
            first, second = (load_dictionary(each.saes.folder / site, device) for each in (run, other))
            matchings[site] = match_features(first.W_dec, second.W_dec)
            turned = second.W_dec @ random_rotation(second, run.experiment.seed).t()
            of_first, _ = match_features(first.W_dec, turned)
            by_chance[site] = {
                "matched_chance": int((of_first.same >= 0).sum()),
                "median_cosine_chance": float(np.median(of_first.cosine)),
            }
            progress(1)
    return matchings, pd.DataFrame.from_dict(by_chance, orient="index")


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
