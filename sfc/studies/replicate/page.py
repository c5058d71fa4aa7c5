"""The page of a replication: features that both dictionaries have, effects of the nodes that both circuits have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from sfc.core.sites import short_site
from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import BLUE, LINE, QUIET, VERMILION, axis, remark, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import hover_text, number_text
from sfc.studies.replicate.matching import BOTH, ORIGINAL, REPLICATION

_HEIGHT = 420
_BINS = np.linspace(0, 1, 21)
_COLOURS = {"feature": BLUE, "error": VERMILION}


def write_replication_page(
    path: Path, nodes: pd.DataFrame, cosines: Float[np.ndarray, " features"], result: Mapping[str, Any]
) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        nodes: as `matched_nodes` gives them.
        cosines: of all features of the original's dictionaries with the nearest of the replication's.
        result: what `replicate --json` prints.
    """
    title = f"Replication with other SAEs · {result['category']} · {result['preset']}"
    body = f"""{header_html(title, _sentence(result))}
<section class="card scroll"><h2>Both circuits, test prompts</h2>{_circuits_table(result)}</section>
<section class="card">{figure_html("cosines", cosines_figure(nodes, cosines, result))}</section>
<section class="card">{figure_html("effects", effects_figure(nodes, result))}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_guide(result))}</section>
<section class="card scroll"><h2>Every site</h2>{_sites_table(result)}</section>"""
    write_document(path, title, body)


def cosines_figure(
    nodes: pd.DataFrame, cosines: Float[np.ndarray, " features"], result: Mapping[str, Any]
) -> go.Figure:
    """How near the nearest feature of the other dictionary is: all features, and those of the original circuit."""
    figure = styled_figure("Cosine with the nearest feature of the other dictionary", _HEIGHT)
    in_circuit = nodes["cosine"][nodes["circuit"] != REPLICATION].dropna().to_numpy()
    for name, values, colour in (("all features", cosines, LINE), ("the circuit's features", in_circuit, BLUE)):
        counts = np.histogram(np.clip(values, 0, 1), _BINS)[0]
        figure.add_bar(
            x=((_BINS[1:] + _BINS[:-1]) / 2).tolist(),
            y=(counts / max(len(values), 1)).tolist(),
            width=float(_BINS[1]),
            name=f"{name} ({len(values):,})",
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
    """The effect in the original circuit against that in the replication, of the nodes that are in both."""
    figure = styled_figure("Effects of the nodes that both circuits have", _HEIGHT)
    shared = nodes[nodes["circuit"] == BOTH]
    if shared.empty:
        remark(figure, "No node is in both circuits.")
    else:
        ends = shared[["effect", "replication_effect"]].to_numpy()
        ends = [float(ends.min()), float(ends.max())]
        line = {"color": QUIET, "dash": "dot", "width": 1}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, hoverinfo="skip")
    for kind, of_kind in shared.groupby("kind"):
        names = [
            f"{hover_text(node)}, again {hover_text(partner)}"
            for node, partner in zip(of_kind["node"], of_kind["partner"], strict=True)
        ]
        figure.add_scatter(
            x=of_kind["effect"].tolist(),
            y=of_kind["replication_effect"].tolist(),
            mode="markers",
            marker={"color": _COLOURS[str(kind)], "size": 6, "opacity": 0.7},
            name=f"{kind} nodes",
            text=names,
            hovertemplate="%{text}<br>%{x:.3g}, again <b>%{y:.3g}</b><extra></extra>",
        )
    unit = hover_text(result["effect_unit"])
    return figure.update_layout(
        showlegend=True,
        xaxis=axis(f"original, {unit}", zeroline=True, zerolinecolor=LINE),
        yaxis=axis(f"replication, {unit}", zeroline=True, zerolinecolor=LINE),
    )


def _sentence(result: Mapping[str, Any]) -> str:
    return (
        "Does the circuit come back when the SAEs are trained anew, on the same activations, prompts and splits? "
        f"Nodes in both circuits: {result['n_shared']:,}. Jaccard {number_text(result['jaccard'])}, "
        f"{number_text(result['chance'])} by chance; of the nodes alone that both dictionaries have "
        f"{number_text(result['matched_jaccard'])}, {number_text(result['matched_chance'])} by chance."
    )


def _guide(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "<b>The same feature.</b> Features of two dictionaries of a site are the same where each is the nearest to the "
        "other by the cosine of their decoder directions, and the cosine is at least "
        f"{result['same_from_cosine']:g} (dotted line). Error nodes of a site are the same. Every "
        "other node is one that only its own dictionaries have.",
        "<b>Two questions.</b> Do both dictionaries have the circuit's features? See the share with a partner, and "
        f"beside it that of all features, {number_text(result['matched_share'])}. And where they have them, does "
        "discovery find them again? See Jaccard's index of the nodes alone that both have.",
        "<b>Chance.</b> What random circuits would give that have as many features at each site and the same error "
        "nodes. Each circuit has the size that its own discovery chose, and where these differ much, Jaccard's index "
        "is small whatever they share.",
        f"<b>Effects.</b> Of the shared nodes: Spearman's correlation {number_text(result['rank_correlation'])}; equal "
        f"signs in {number_text(result['sign_agreement'])} of {result['n_signed']:,} whose effect is not about zero.",
        "<b>What it does not say.</b> A circuit may be as faithful as the other and made of other features: then the "
        "behaviour is explained twice, and no single feature should be taken for the model's own.",
    )


def _circuits_table(result: Mapping[str, Any]) -> str:
    names = {
        "faithfulness": "faithfulness",
        "completeness, as published": "completeness",
        "completeness, normalised": "completeness_normalised",
    }
    circuits = [result[name] for name in (ORIGINAL, REPLICATION)]
    rows = [
        ("seed of the SAEs", *(str(circuit["sae_seed"]) for circuit in circuits)),
        ("nodes", *(f"{circuit['n_nodes']:,}" for circuit in circuits)),
        *((title, *(_with_interval(circuit, name) for circuit in circuits)) for title, name in names.items()),
        ("faithfulness of random circuits", *(number_text(circuit["random_faithfulness"]) for circuit in circuits)),
        ("features with a partner, share", *(number_text(circuit["share_with_partner"]) for circuit in circuits)),
        ("circuit", *(circuit["circuit"] for circuit in circuits)),
    ]
    return figures_table(("figure", ORIGINAL, REPLICATION), rows)


def _with_interval(circuit: Mapping[str, Any], name: str) -> str:
    low, high = circuit[f"{name}_low"], circuit[f"{name}_high"]
    ends = "" if low is None or high is None else f" ({number_text(low)} to {number_text(high)})"
    return f"{number_text(circuit[name])}{ends}"


def _sites_table(result: Mapping[str, Any]) -> str:
    titles = ("site", "features", "with a partner", "share", "median cosine", ORIGINAL, REPLICATION, "shared nodes")
    rows = [
        (
            short_site(row["site"]),
            f"{row['features']:,}",
            f"{row['matched']:,}",
            number_text(row["matched"] / row["features"]),
            number_text(row["median_cosine"]),
            f"{row[ORIGINAL]:,}",
            f"{row[REPLICATION]:,}",
            f"{row['shared']:,}",
        )
        for row in result["sites"]
    ]
    return figures_table(titles, rows)
