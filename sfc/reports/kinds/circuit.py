"""Circuits with their evaluation, and the autoencoders that they are made of."""

from collections.abc import Mapping
from typing import Any

import networkx as nx
import pandas as pd

from sfc.artifacts import read_json
from sfc.reports.blocks import Block, Figure, Formula, Paragraph, Table, cell, interval_cell
from sfc.reports.found import Found
from sfc.reports.kinds.kind import Kind, records_table
from sfc.viewer.curve import curve_figure
from sfc.viewer.graph import circuit_figure, strongest_nodes
from sfc.viewer.layers import layers_figure
from sfc.viewer.text import tokens_text

_NODES, _TOKENS = 20, 5
_FIGURES = {
    "nodes": "n_nodes",
    "edges": "n_edges",
    "faithfulness": "faithfulness",
    "completeness, as published": "completeness",
    "completeness, normalised": "completeness_normalised",
    "faithfulness of random circuits": "random_faithfulness",
    "F(M), nats": "f_model",
    "F(C), nats": "f_circuit",
    "F(M\\C), nats": "f_complement",
    "F(0), nats": "f_empty",
    "error share": "error_share",
    "replies that refuse": "refused_model",
    "replies that refuse, the circuit alone": "refused_circuit",
    "replies that refuse, without the circuit": "refused_complement",
    "p, against random circuits": "p_value",
    "faithfulness of the last site alone": "last_site_faithfulness",
    "CPR": "cpr",
    "CPR, sizes on a logarithmic axis": "cpr_log",
    "CMD": "cmd",
    "CMD, sizes on a logarithmic axis": "cmd_log",
}
_CURVE = {
    "nodes": "size",
    "faithfulness": "faithfulness",
    "from": "faithfulness_low",
    "to": "faithfulness_high",
    "on discovery prompts": "discovery_faithfulness",
    "completeness, normalised": "completeness_normalised",
    "random circuits": "random_faithfulness",
}


def _summary(found: Found) -> list[tuple[str, str]]:
    names = ("nodes", "faithfulness", "completeness, normalised", "faithfulness of random circuits")
    return [(name, cell(found.result.get(_FIGURES[name]))) for name in names]


def _blocks(found: Found) -> list[Block]:
    graph = nx.node_link_graph(read_json(found.folder / "circuit.json"), edges="edges")
    curve, result = found.table("curve.csv"), found.result
    figures = [(name, cell(result[field]), _ends(result, field)) for name, field in _FIGURES.items() if field in result]
    blocks: list[Block] = [
        Paragraph(_about(graph)),
        Table("The reported circuit, test prompts", ("figure", "value", "95 %"), figures),
        *_sites(result),
        Figure(circuit_figure(graph)),
        Figure(curve_figure(curve, len(graph)), _curve_table(curve)),
        Figure(layers_figure(graph), _layers_table(graph)),
        _nodes_table(graph),
    ]
    return [*blocks, *_audit(graph)]


def _ends(result: Mapping[str, Any], field: str) -> str:
    low, high = result.get(f"{field}_low"), result.get(f"{field}_high")
    return "" if low is None or high is None else interval_cell(low, high)


def _sites(result: Mapping[str, Any]) -> list[Block]:
    """What each site is worth alone, where that was measured."""
    alone, nodes = result.get("single_site_faithfulness", {}), result.get("nodes_per_site", {})
    rows = [(site, cell(nodes.get(site)), cell(value)) for site, value in alone.items()]
    columns = ("site", "nodes of the circuit", "faithfulness of as many nodes there")
    return [Table("One site alone", columns, rows)] if rows else []


def _about(graph: nx.DiGraph) -> str:
    facts = graph.graph
    return (
        f"Found by {facts.get('method', 'a method not named')} on {facts.get('population', '')} prompts; ablated nodes "
        f"are set to {facts.get('reference', 'their reference')}; edges by {facts.get('edges', 'a method not named')}. "
        "All figures are from the test split, which discovery never saw."
    )


def _curve_table(curve: pd.DataFrame) -> Table:
    columns = {title: field for title, field in _CURVE.items() if field in curve}
    table = records_table("Evaluation by circuit size", columns, curve.to_dict("records"))  # pyright: ignore
    bands = [interval_cell(row["random_low"], row["random_high"]) for row in curve.to_dict("records")]
    rows = [[*row, band] for row, band in zip(table.rows, bands, strict=True)]
    return Table(table.title, [*table.columns, "of random circuits, from to"], rows)


def _layers_table(graph: nx.DiGraph) -> Table:
    layers = pd.Series([data["layer"] for _, data in graph.nodes(data=True)], dtype=int).value_counts().sort_index()
    return Table("Nodes per layer", ("layer", "nodes"), [(str(layer), cell(int(n))) for layer, n in layers.items()])


def _nodes_table(graph: nx.DiGraph) -> Table:
    rows = []
    for name in strongest_nodes(graph, _NODES):
        node = graph.nodes[name]
        tokens = [tokens_text(node.get(side, ()), _TOKENS) for side in ("raises", "lowers")]
        rows.append((name, cell(node["effect"]), cell(node.get("absolute_effect")), *tokens))
    columns = ("node", f"effect ({graph.graph.get('effect_unit', '')})", "mean |effect|", "raises", "lowers")
    return Table("The nodes with the largest |effect|", columns, rows)


def _audit(graph: nx.DiGraph) -> list[Block]:
    audit = graph.graph.get("audit") or {}
    rows = [
        (name, *(cell(audit[group][field]) for field in ("n_nodes", "rank_correlation", "sign_agreement")))
        for group, name in (("top", "strongest nodes"), ("random", "random active nodes"))
        if group in audit
    ]
    columns = ("nodes", "n", "rank correlation", "same sign")
    return [Table("Effects held against exact ones, one node at a time", columns, rows)] if rows else []


def _limits(found: Found) -> list[str]:
    result, where = found.result, f"The circuit of {found.result.get('category')} ({found.result.get('method')})"
    limits = []
    if result.get("faithfulness") is None:
        limits.append(f"{where}: F(M) - F(0) is too small to divide by, so that nothing is said of its faithfulness.")
    if (share := result.get("error_share")) is not None:
        limits.append(
            f"{where}: {cell(share)} of the absolute effects flow through what the autoencoders miss, which no feature"
            " explains."
        )
    return limits


CIRCUIT = Kind(
    title=lambda found: f"Circuit: {found.result['category']}, {found.result['method']}",
    summary=_summary,
    blocks=_blocks,
    limits=_limits,
    methods=(
        Formula(
            "Refusal score s (Arditi et al. 2024)",
            "logsumexp(log p over R) - logsumexp(log p over all others), R"
            " the tokens that open a refusal, at the last prompt position",
        ),
        Formula(
            "Ablation",
            "x <- x_hat(f_ref) + sum over kept features (f_i - f_ref_i) d_i + error, f_ref the mean"
            " over reference prompts at the same place of the template",
        ),
        Formula("Effect of a feature by attribution", "sum over positions (ds/dx . d_i)(f_i - f_ref_i)"),
        Formula(
            "F(M), F(C), F(M\\C), F(0)",
            "mean s of the full model; with all but the circuit ablated; with the"
            " circuit ablated; with everything ablated",
        ),
        Formula("Faithfulness (Marks et al. 2024)", "(F(C) - F(0)) / (F(M) - F(0))"),
        Formula(
            "CPR, CMD (Mueller et al. 2025)",
            "area under the curve of faithfulness by size, nodes ranked by effect; area between it and 1, by |effect|",
        ),
        Formula("Completeness, normalised", "(F(M\\C) - F(0)) / (F(M) - F(0)); as published, F(M\\C) / F(M)"),
    ),
)

_QUALITY = {
    "site": "site", "variance unexplained": "fvu", "cosine": "cosine", "L0": "l0", "dead": "dead_share",
    "loss recovered": "loss_recovered", "score recovered": "score_recovered",
}  # fmt: skip


def _quality(found: Found) -> Table:
    quality = found.table("quality.csv")
    of_all = quality[quality["role"] == "all"].to_dict("records")
    return records_table("Held-out rows", _QUALITY, of_all)  # pyright: ignore[reportArgumentType]


SAES = Kind(
    title=lambda found: "Sparse autoencoders",
    summary=lambda found: [("variance unexplained", cell(found.manifest.get("variance_unexplained")))],
    blocks=lambda found: [_quality(found)],
    methods=(
        Formula("Variance unexplained", "sum |x - x_hat|^2 / sum |x - mean x|^2, over held-out rows"),
        Formula("Recovered", "share of what ablating the site to its mean costs that the reconstruction wins back"),
    ),
)
