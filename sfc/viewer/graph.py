"""The picture of a circuit: layers from left to right, a node for each feature, a line for each edge."""

from collections.abc import Iterator, Sequence
from typing import Any

import networkx as nx
import plotly.graph_objects as go

from sfc.viewer.columns import Columns, columns_of
from sfc.viewer.edges import edge_hovers, edge_legend, edge_traces
from sfc.viewer.placement import Placement, place
from sfc.viewer.signs import Sign, sign_of, signs
from sfc.viewer.style import BAND, LINE, QUIET, axis, remark, styled_figure
from sfc.viewer.text import count_text, hover_text, number_text, tokens_text

_TOKENS = 8
_SYMBOLS = {"feature": "circle", "error": "diamond"}
# Plotly draws a diamond this much wider than a circle of the same size, so that they look equally large.
_EXTENTS = {"feature": 1.0, "error": 1.3}
_MARGIN = {"l": 12, "r": 12, "t": 76, "b": 46}


def circuit_figure(graph: nx.DiGraph, max_nodes: int = 300) -> go.Figure:
    """A circuit as an interactive figure.

    Columns are the sites of the experiment. Positive nodes stand above a common line, negative ones below it, the
    strongest next to it; a node's area is its |effect|, its colour the sign, diamonds are errors.

    Args:
        max_nodes: with more nodes than this, the strongest are drawn, and the title says so.
    """
    columns, all_signs = columns_of(graph), signs(graph.graph.get("method", ""))
    drawn = strongest_nodes(graph, max_nodes)
    placement = place(
        [columns.number(graph.nodes[name]["site"]) for name in drawn],
        [graph.nodes[name]["effect"] for name in drawn],
        [_EXTENTS[_kind(graph.nodes[name])] for name in drawn],
        max(1, len(columns.sites)),
    )
    height = round(placement.top - placement.bottom) + _MARGIN["t"] + _MARGIN["b"]
    figure = styled_figure(_title(graph, len(drawn)), height)
    _draw_columns(figure, columns, placement)
    positions = dict(zip(drawn, zip(placement.x, placement.y, strict=True), strict=True))
    figure.add_traces(list(edge_traces(graph, positions, all_signs)))
    figure.add_traces(list(edge_hovers(graph, positions, all_signs)))
    figure.add_traces(list(_node_traces(graph, drawn, placement, all_signs)))
    figure.add_traces(list(edge_legend(graph.subgraph(drawn), all_signs)))
    if placement.labelled and drawn:
        figure.add_trace(_labels(drawn, placement))
    if not drawn:
        remark(figure, "The circuit has no nodes.")
    return figure


def strongest_nodes(graph: nx.DiGraph, most: int) -> list[str]:
    """The names of the nodes with the largest |effect|, strongest first."""
    nodes = graph.nodes
    return sorted(graph, key=lambda name: (-abs(nodes[name]["effect"]), nodes[name].get("rank", 0), name))[:most]


def _title(graph: nx.DiGraph, n_drawn: int) -> str:
    if n_drawn == len(graph):
        return f"{count_text(len(graph), 'node')}, {count_text(graph.number_of_edges(), 'edge')}"
    return f"{n_drawn:,} of {count_text(len(graph), 'node')} drawn: those with the largest |effect|"


def _draw_columns(figure: go.Figure, columns: Columns, placement: Placement) -> None:
    """A pale band behind every other column, the base line, and the layers under the columns."""
    for number in range(0, len(columns.sites), 2):
        figure.add_vrect(number - 0.5, number + 0.5, fillcolor=BAND, line_width=0, layer="below")
    figure.add_hline(0, line={"color": LINE, "width": 1}, layer="below")
    figure.update_layout(
        margin=_MARGIN,
        xaxis=axis(
            columns.title,
            range=[-0.5, max(1, len(columns.sites)) - 0.5],
            tickvals=list(range(len(columns.sites))),
            ticktext=columns.labels,
            showgrid=False,
        ),
        yaxis={"visible": False, "range": [placement.bottom, placement.top]},
    )


def _node_traces(
    graph: nx.DiGraph, drawn: Sequence[str], placement: Placement, all_signs: Sequence[Sign]
) -> Iterator[go.Scatter]:
    """A trace per kind of node and sign, so that the legend can switch them, and the entry of the error nodes."""
    nodes, unit = graph.nodes, graph.graph.get("effect_unit", "")
    for kind, symbol in _SYMBOLS.items():
        for sign in all_signs:
            members = [
                number
                for number, name in enumerate(drawn)
                if (_kind(nodes[name]), sign_of(nodes[name]["effect"])) == (kind, sign.number)
            ]
            if members:
                yield go.Scatter(
                    x=[placement.x[number] for number in members],
                    y=[placement.y[number] for number in members],
                    mode="markers",
                    marker={
                        "size": [placement.extent[number] / _EXTENTS[kind] for number in members],
                        "color": sign.colour,
                        "symbol": symbol,
                        "opacity": 1,
                        "line": {"width": 1, "color": "white"},
                    },
                    ids=[drawn[number] for number in members],
                    hovertext=[_hover(drawn[number], nodes[drawn[number]], sign, unit) for number in members],
                    hoverinfo="text",
                    hoverlabel={"bordercolor": sign.colour},
                    name=sign.words + {1: " (above the line)", -1: " (below)", 0: ""}[sign.number],
                    legendgroup="errors" if kind == "error" else f"nodes {sign.number}",
                    showlegend=kind != "error",
                )
    if any(_kind(nodes[name]) == "error" for name in drawn):
        yield go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"symbol": "diamond", "color": QUIET, "size": 10},
            name="error node: what the SAE misses",
            legendgroup="errors",
        )


def _kind(node: dict[str, Any]) -> str:
    return "error" if node["kind"] == "error" else "feature"


def _hover(name: str, node: dict[str, Any], sign: Sign, unit: str) -> str:
    """Everything that is known about a node, escaped, a line each."""
    rank = f" · rank {node['rank'] + 1:,}" if "rank" in node else ""
    lines = [
        f"<b>{hover_text(name)}</b>",
        f"layer {node['layer']}{rank}",
        f"effect {number_text(node['effect'], signed=True)} {hover_text(unit)}",
        f"<i>{sign.words}</i>",
    ]
    figures = {"absolute_effect": "mean |effect|", "p_value": "p", "q_value": "q"}
    lines += [f"{label} {number_text(node[key])}" for key, label in figures.items() if key in node]
    for key in ("raises", "lowers"):
        if node.get(key):
            lines.append(f"{key} {hover_text(tokens_text(node[key], _TOKENS))}")
    return "<br>".join(lines)


def _labels(drawn: Sequence[str], placement: Placement) -> go.Scatter:
    """The last part of each node's name under its marker; site and layer are the column's."""
    return go.Scatter(
        x=placement.x,
        y=[y - extent / 2 - 8 for y, extent in zip(placement.y, placement.extent, strict=True)],
        mode="text",
        text=[hover_text(name.rpartition("/")[2][:10]) for name in drawn],
        textfont={"size": 10, "color": QUIET, "shadow": "0 0 2px white, 0 0 2px white, 0 0 3px white"},
        hoverinfo="skip",
        showlegend=False,
    )
