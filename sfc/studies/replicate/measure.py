"""One category's circuit beside that of SAEs trained from another seed, or on other prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from sfc.circuits.files import load_circuit
from sfc.circuits.methods.exact import agreement
from sfc.circuits.nodes import FEATURE
from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import write_csv
from sfc.core.progress import progress_bar
from sfc.core.sites import short_site
from sfc.models.loading import choose_device
from sfc.pages.text import count_text
from sfc.run import Run
from sfc.saes.format import load_dictionary
from sfc.saes.nulls import random_rotation
from sfc.saes.quality import SAME, Matching, match_features
from sfc.session import Session
from sfc.studies.discover import DISCOVER
from sfc.studies.discover.evidence import FIGURES
from sfc.studies.replicate import BOTH, ORIGINAL, REPLICATION, Replicate
from sfc.studies.study import Finished, Made

_BINS = np.linspace(0, 1, 21)
Matchings = Mapping[str, tuple[Matching, Matching]]
"""by site, as `match_features` gives them for the dictionaries of the original and of the replication"""


def matched_nodes(original: nx.DiGraph, replication: nx.DiGraph, matchings: Matchings) -> pd.DataFrame:
    """Every node of either circuit, what is the same node in one row. Error nodes of a site are the same.

    Returns:
        A table with columns `site`, `kind`, `node` (its name in the original's dictionaries, if they have it),
        `partner` (in the replication's), `cosine` (of a feature with the nearest one), `circuit` (`BOTH`, `ORIGINAL`
        or `REPLICATION`), `effect` and `replication_effect`, each where the node is in that circuit.
    """
    rows = []
    for name, data in original.nodes(data=True):
        partner, cosine = _partner(name, data, matchings[data["site"]][0])
        circuit = BOTH if partner in replication else ORIGINAL
        again = replication.nodes[partner]["effect"] if circuit == BOTH else None
        rows.append((data["site"], data["kind"], name, partner, cosine, circuit, data["effect"], again))
    told = {partner for _, _, _, partner, *_ in rows}
    for name, data in replication.nodes(data=True):
        if name not in told:
            partner, cosine = _partner(name, data, matchings[data["site"]][1])
            rows.append((data["site"], data["kind"], partner, name, cosine, REPLICATION, None, data["effect"]))
    columns = ["site", "kind", "node", "partner", "cosine", "circuit", "effect", "replication_effect"]
    return pd.DataFrame(rows, columns=columns).astype({"cosine": float, "effect": float, "replication_effect": float})


def site_counts(nodes: pd.DataFrame, matchings: Matchings) -> pd.DataFrame:
    """By site, in the index: `features` of a dictionary, those `matched` by the other's, the `median_cosine` of all
    with their nearest, and how many nodes are in the `original` circuit, in the `replication` and `shared`.
    """
    rows = {}
    for site, (of_original, _) in matchings.items():
        circuit = nodes["circuit"][nodes["site"] == site]
        rows[site] = {
            "features": len(of_original.same),
            "matched": int((of_original.same >= 0).sum()),
            "median_cosine": float(np.median(of_original.cosine)),
            "original": int((circuit != REPLICATION).sum()),
            "replication": int((circuit != ORIGINAL).sum()),
            "shared": int((circuit == BOTH).sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def cosine_counts(nodes: pd.DataFrame, cosines: Float[np.ndarray, " features"]) -> pd.DataFrame:
    """How near the nearest feature of the other dictionaries is, in bins of equal width.

    Args:
        nodes: as `matched_nodes` gives them.
        cosines: of all features of the original's dictionaries with the nearest of the replication's.

    Returns:
        A table with columns `low` and `high`, the ends of a bin, `features`, how many of all are in it (negative
        cosines are in the first bin), and `in_circuit`, how many of the original circuit.
    """
    in_circuit = nodes["cosine"][nodes["circuit"] != REPLICATION].dropna().to_numpy()
    counts = {
        name: np.histogram(np.clip(values, 0, 1), _BINS)[0]
        for name, values in (("features", cosines), ("in_circuit", in_circuit))
    }
    return pd.DataFrame({"low": _BINS[:-1], "high": _BINS[1:], **counts})


def circuit_agreement(nodes: pd.DataFrame, sites: pd.DataFrame) -> dict[str, float | None]:
    """How far two circuits agree.

    Args:
        nodes: as `matched_nodes` gives them.
        sites: as `site_counts` gives them, with `matched_chance`, how many features match by chance.

    Returns:
        `n_shared`; `jaccard` of all nodes and `chance`, that of random circuits with as many features at each site and
        the same error nodes; `matched_jaccard` and `matched_chance`, of the nodes alone that both dictionaries have,
        None where no node of the circuits is such; `matched_share` of all features and `matched_share_chance`; and of
        the shared nodes' effects `rank_correlation`, `sign_agreement` and `n_signed`, as the approximation check has
        them.
    """
    features = pd.DataFrame({"size": sites["features"], "matched": sites["matched"]})
    errors = pd.DataFrame({"size": 1, "matched": 1}, index=sites.index)
    groups = pd.concat({"feature": features, "error": errors})
    known, shared = nodes.dropna(subset=["node", "partner"]), nodes[nodes["circuit"] == BOTH]
    effects = agreement(shared["replication_effect"].to_numpy(), shared["effect"].to_numpy())
    return {
        "n_shared": len(shared),
        "jaccard": _jaccard(nodes),
        "chance": _chance(nodes, groups),
        "matched_jaccard": _jaccard(known) if len(known) else None,
        "matched_chance": _chance(known, groups.assign(size=groups["matched"])) if len(known) else None,
        "matched_share": float(sites["matched"].sum() / sites["features"].sum()),
        "matched_share_chance": float(sites["matched_chance"].sum() / sites["features"].sum()),
        "rank_correlation": effects.rank_correlation,
        "sign_agreement": effects.sign_agreement,
        "n_signed": effects.n_signed,
    }


def share_with_partner(nodes: pd.DataFrame, circuit: str) -> float | None:
    """The share of the features of a circuit, `ORIGINAL` or `REPLICATION`, that the other's dictionaries have too."""
    features = nodes[(nodes["kind"] == "feature") & nodes["circuit"].isin([BOTH, circuit])]
    return float(features[["node", "partner"]].notna().all(axis=1).mean()) if len(features) else None


def chance_agreement(
    first: Int[np.ndarray, " groups"],
    second: Int[np.ndarray, " groups"],
    matched: Int[np.ndarray, " groups"],
    sizes: Int[np.ndarray, " groups"],
) -> float:
    """Jaccard's index to be expected of two random circuits with so many nodes of each group, one of them at least.

    `matched` of a group's `sizes` nodes are the same in both dictionaries. Such a node is in the one circuit with
    probability first / size and in the other, independently, with second / size, so that
    matched first second / size^2 shared nodes are to be expected. The index is that of the expected numbers.
    """
    shared = float((matched * first * second / np.maximum(sizes, 1) ** 2).sum())  # a group may have no nodes
    return shared / (float((first + second).sum()) - shared)


def _jaccard(nodes: pd.DataFrame) -> float:
    return float((nodes["circuit"] == BOTH).mean())


def _chance(nodes: pd.DataFrame, groups: pd.DataFrame) -> float:
    """By chance, of circuits with as many of these nodes in each group; an error node is a group of its own."""
    first, second = (
        nodes[nodes["circuit"] != other].groupby(["kind", "site"]).size().reindex(groups.index, fill_value=0)
        for other in (REPLICATION, ORIGINAL)
    )
    return chance_agreement(*(each.to_numpy() for each in (first, second, groups["matched"], groups["size"])))


def _partner(name: str, data: Mapping[str, Any], matching: Matching) -> tuple[str | None, float | None]:
    """The name of the same node in the other dictionaries, and a feature's cosine with the nearest there."""
    if data["kind"] != FEATURE:
        return name, None
    feature = int(name.rpartition("/F")[2])
    same = int(matching.same[feature])
    return f"{short_site(data['site'])}/F{same}" if same >= 0 else None, float(matching.cosine[feature])


_PUBLISHED = ("faithfulness", "completeness", "completeness_normalised")
_FIGURES = (
    "n_nodes", "n_errors", *FIGURES, "null_agreement", "rotated_agreement", "all_features_recovered",
    *(f"{name}{end}" for name in _PUBLISHED for end in ("", "_low", "_high")), "random_faithfulness", "says",
)  # fmt: skip


def measure(study: Replicate, session: Session, folder: Path) -> Made:
    """Match the features of two runs' dictionaries and their finished circuits, and write tables into the folder.

    Raises:
        UserError: a circuit or a dictionary is corrupt.
    """
    run, other = study.both(session.run)
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
            turned = second.W_dec.float() @ random_rotation(second, run.experiment.seed).t()
            of_first, _ = match_features(first.W_dec, turned)
            by_chance[site] = {
                "matched_chance": int((of_first.same >= 0).sum()),
                "median_cosine_chance": float(np.median(of_first.cosine)),
            }
            progress(1)
    return matchings, pd.DataFrame.from_dict(by_chance, orient="index")


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
