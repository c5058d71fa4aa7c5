"""The page of SAE-seed robustness: features that both dictionaries have, effects of the nodes in both circuits."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sfc.core.artifacts import json_records
from sfc.core.sites import short_site
from sfc.pages.blocks import Figure, Formula, Page, Section, Table, cell, figure_cell
from sfc.pages.style import BLUE, LINE, QUIET, VERMILION, axis, remark, styled_figure
from sfc.pages.text import hover_text
from sfc.studies.replicate.options import BOTH, ORIGINAL, REPLICATION
from sfc.studies.study import Finished

_HEIGHT = 420
_COLOURS = {"feature": BLUE, "error": VERMILION}
_COSINES = "Cosine with the nearest feature of the other dictionary"


def page(finished: Finished) -> Page:
    """The page of a finished replication."""
    result, counts = finished.result, finished.table("cosines.csv")
    nodes = finished.table("nodes.csv")
    return Page(
        title=f"SAE-seed robustness · {result['category']} · {result['preset']}",
        sentence=(
            "Is the circuit the same when the SAEs are trained from another seed, on the same activations, prompts and"
            f" splits? Circuits found by {result['method']}; figures are from the test split."
        ),
        summary=[_circuits_table(result), _agreement_table(result)],
        sections=[
            Section("", [Figure("cosines", lambda: cosines_figure(counts, result), _cosines_table(counts))]),
            Section("", [Figure("effects", lambda: effects_figure(nodes, result))]),
            Section("Every site", [_sites_table(result)]),
        ],
        guide=_guide(result),
        findings=[
            ("Jaccard, nodes of both circuits", cell(result["jaccard"])),
            ("by chance", cell(result["chance"])),
        ],
        methods=[
            Formula(
                "The same feature (after Paulo and Belrose 2025)",
                "mutual nearest neighbours by the cosine of decoder directions, of at least"
                f" {result['same_from_cosine']:g}",
            )
        ],
        limits=[
            "A circuit may be as faithful with SAEs from another seed and consist of other features: no single feature"
            " should then be taken for the model's own."
        ],
    )


def cosines_figure(counts: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """How near the nearest feature of the other dictionary is: all features, and those of the original circuit.

    Args:
        counts: as `cosine_counts` gives them.
    """
    figure = styled_figure(_COSINES, _HEIGHT)
    for name, column, colour in (("all features", "features", LINE), ("the circuit's features", "in_circuit", BLUE)):
        total = int(counts[column].sum())
        figure.add_bar(
            x=((counts["low"] + counts["high"]) / 2).tolist(),
            y=(counts[column] / max(total, 1)).tolist(),
            width=float(counts["high"][0]),
            name=f"{name} ({total:,})",
            marker={"color": colour, "opacity": 0.55 if colour == BLUE else 1},
            hovertemplate=f"{name}: <b>%{{y:.1%}}</b> near %{{x:.2f}}<extra></extra>",
        )
    figure.add_vline(result["same_from_cosine"], line={"color": QUIET, "dash": "dot"})
    return figure.update_layout(
        barmode="overlay",
        showlegend=True,
        xaxis=axis("cosine", showgrid=False, range=[0, 1]),
        yaxis=axis("share of features", tickformat=".0%", rangemode="tozero"),
    )


def effects_figure(nodes: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """The effects of the nodes that are in both circuits, in the one and in the other."""
    figure = styled_figure("Effects of the nodes in both circuits", _HEIGHT)
    shared = nodes[nodes["circuit"] == BOTH]
    if shared.empty:
        remark(figure, "No node is in both circuits.")
    else:
        ends = shared[["effect", "replication_effect"]].to_numpy()
        ends = [float(ends.min()), float(ends.max())]
        line = {"color": QUIET, "dash": "dot", "width": 1}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, hoverinfo="skip")
    for kind, of_kind in shared.groupby("kind"):
        pairs = zip(of_kind["node"].map(hover_text), of_kind["partner"].map(hover_text), strict=True)
        figure.add_scatter(
            x=of_kind["effect"].tolist(),
            y=of_kind["replication_effect"].tolist(),
            mode="markers",
            marker={"color": _COLOURS[str(kind)], "size": 6, "opacity": 0.7},
            name=f"{kind} nodes",
            text=[f"{node}, there {partner}" for node, partner in pairs],
            hovertemplate="%{text}<br>%{x:.3g}, there <b>%{y:.3g}</b><extra></extra>",
        )
    unit, (first, second) = hover_text(result["effect_unit"]), _names(result)
    return figure.update_layout(
        showlegend=True,
        xaxis=axis(f"{first}, {unit}", zeroline=True, zerolinecolor=LINE),
        yaxis=axis(f"{second}, {unit}", zeroline=True, zerolinecolor=LINE),
    )


def _names(result: Mapping[str, Any]) -> list[str]:
    """What the two circuits are called."""
    return [f"SAE seed {result[circuit]['sae_seed']}" for circuit in (ORIGINAL, REPLICATION)]


def _circuits_table(result: Mapping[str, Any]) -> Table:
    circuits = [result[name] for name in (ORIGINAL, REPLICATION)]
    figures = {
        "nodes": "n_nodes",
        "faithfulness": "faithfulness",
        "completeness, as published": "completeness",
        "completeness, normalised": "completeness_normalised",
        "faithfulness of random circuits": "random_faithfulness",
        "share of features with a partner": "share_with_partner",
        "circuit": "circuit",
    }
    rows = [[title, *(figure_cell(circuit, name) for circuit in circuits)] for title, name in figures.items()]
    return Table("Both circuits, test prompts", ["figure", *_names(result)], rows)


def _agreement_table(result: Mapping[str, Any]) -> Table:
    rows = [
        ["nodes in both circuits", cell(result["n_shared"]), ""],
        ["Jaccard, all nodes", cell(result["jaccard"]), cell(result["chance"])],
        ["Jaccard, nodes with a partner", cell(result["matched_jaccard"]), cell(result["matched_chance"])],
        ["rank correlation of shared effects", cell(result["rank_correlation"]), ""],
        ["equal signs of shared effects", cell(result["sign_agreement"]), ""],
        ["share of all features with a partner", cell(result["matched_share"]), ""],
    ]
    return Table("How far they agree", ["agreement", "value", "by chance"], rows)


def _cosines_table(counts: pd.DataFrame) -> Table:
    rows = [
        [f"{row['low']:.2f} to {row['high']:.2f}", cell(row["features"]), cell(row["in_circuit"])]
        for row in json_records(counts)
    ]
    return Table(_COSINES, ["cosine", "features", "the circuit's features"], rows)


def _sites_table(result: Mapping[str, Any]) -> Table:
    titles = ["site", "features", "with a partner", "share", "median cosine", *_names(result), "shared nodes"]
    counted = (ORIGINAL, REPLICATION, "shared")
    rows = [
        [
            short_site(row["site"]),
            cell(row["features"]),
            cell(row["matched"]),
            cell(row["matched"] / row["features"]),
            cell(row["median_cosine"]),
            *(cell(row[name]) for name in counted),
        ]
        for row in result["sites"]
    ]
    return Table("", titles, rows)


def _guide(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "**The same feature.** Two features of a site's dictionaries count as the same if each is the other's nearest"
        f" neighbour by the cosine of their decoder directions, and the cosine is at least"
        f" {result['same_from_cosine']:g} (dotted line). The error nodes of a site are the same. Every other node"
        " exists with its own dictionaries only.",
        "**Two questions.** Do both dictionaries have the circuit's features? Compare the share of the circuit's"
        " features with a partner to that of all features. And where both have them, does discovery find them both"
        " times? See Jaccard's index of the nodes with a partner.",
        "**Chance.** What random circuits would give that have as many features at each site and the same error nodes."
        " Each circuit has the size that its own discovery chose; where these differ much, Jaccard's index is small"
        " whatever they share.",
        f"**Effects.** Correlation is Spearman's. Signs are compared for the {result['n_signed']:,} shared nodes whose"
        " effect is not about zero.",
        "**What it does not say.** A circuit may be as faithful as the other and made of other features: then the"
        " behavior is explained in two ways, and no single feature should be taken for the model's own.",
    )
