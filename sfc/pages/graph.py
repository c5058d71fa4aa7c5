"""The picture of a circuit: layers from left to right, a node for each feature, a line for each edge.

A column is a site of the experiment, from the first layer to the last. Nodes are coloured by the side that a feature
fires on where its card says so, else by the sign of the effect. Below the picture stand the counts of nodes per layer.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.features.labels import caption, explained
from sfc.pages.placement import Placement, edge_hovers, edge_legend, edge_signs_of, edge_traces, place
from sfc.pages.style import (
    BAND,
    BLUE,
    INK,
    LINE,
    QUIET,
    VERMILION,
    Sign,
    axis,
    remark,
    sign_of,
    signs,
    styled_figure,
    words_of,
)
from sfc.pages.text import count_text, hover_text, number_text, tokens_text

_SITE = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
_TOKENS = 8
_SYMBOLS = {"feature": "circle", "error": "diamond"}
# Plotly draws a diamond this much wider than a circle of the same size, so that they look equally large.
_EXTENTS = {"feature": 1.0, "error": 1.3}
_MARGIN = {"l": 12, "r": 12, "t": 76, "b": 46}
_HEIGHT = 430
_MOST_LABELS = 16


class Columns(NamedTuple):
    """The sites from left to right, and what is written under them."""

    sites: list[str]
    labels: list[str]
    title: str

    def number(self, site: str) -> int:
        """Which column a site is, counted from 0."""
        return self.sites.index(site)


def columns_of(graph: nx.DiGraph) -> Columns:
    """All sites of the experiment (`graph.graph["sites"]`), even empty ones; then any others the nodes name."""
    sites = list(graph.graph.get("sites", ()))
    layer_of_site = {data["site"]: data["layer"] for _, data in graph.nodes(data=True)}
    sites += sorted(layer_of_site.keys() - set(sites), key=lambda site: (layer_of_site[site], site))
    return columns_of_sites(sites)


def columns_of_sites(sites: list[str]) -> Columns:
    """A column for each site, labelled with its layer alone where all sites are of one kind."""
    matches = [_SITE.fullmatch(site) for site in sites]
    kinds = {match[2] for match in matches if match}
    if len(kinds) == 1 and all(matches):
        return Columns(sites, [match[1] for match in matches if match], f"layer ({kinds.pop()})")
    labels = [
        f"{match[1]}<br>{match[2]}" if match else hover_text(site) for match, site in zip(matches, sites, strict=True)
    ]
    return Columns(sites, labels, "layer and site")


class Group(NamedTuple):
    """Nodes of one colour."""

    key: str
    words: str
    colour: str


def groups_of(graph: nx.DiGraph, cards: Mapping[str, Any]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups there may be, and each node's key among them.

    Args:
        cards: the cards of features by node (see `sfc.features.cards`); with none, nodes are grouped by sign.
    """
    if cards:
        keys = {
            name: "error" if _kind(data) == "error" else cards[name]["fires_on"] if name in cards else "unknown"
            for name, data in graph.nodes(data=True)
        }
        return _sides(words_of(graph)), keys
    by_sign = signs(graph)
    place = {1: " (above the line)", -1: " (below)", 0: ""}
    groups = tuple(Group(str(sign.number), sign.words + place[sign.number], sign.colour) for sign in by_sign)
    return groups, {name: str(sign_of(data["effect"])) for name, data in graph.nodes(data=True)}


def _sides(words: Words) -> tuple[Group, ...]:
    return (
        Group(words.positive, f"fires on {words.positive} prompts", VERMILION),
        Group(words.negative, f"fires on {words.negative} prompts", BLUE),
        Group("shared", "fires on both", "#949ba4"),
        Group("error", "error node", INK),
        Group("unknown", "not looked at", QUIET),
    )


def circuit_figure(
    graph: nx.DiGraph,
    max_nodes: int = 300,
    cards: Mapping[str, Any] | None = None,
    marked: Collection[str] = (),
) -> go.Figure:
    """A circuit as an interactive figure.

    Columns are the sites of the experiment. Positive nodes stand above a common line, negative ones below it, the
    strongest next to it; a node's area is its |effect|, its colour the side that it fires on, or without cards the
    sign; diamonds are errors. `meta.part` and `customdata` of the traces say to `circuit.js` which nodes they show.

    Args:
        cards: the cards of its features by node (see `sfc.features.cards`).
        marked: nodes that are ringed: those that another circuit has as well.
        max_nodes: with more nodes than this, the strongest are drawn, and the title says so.
    """
    columns, edge_signs = columns_of(graph), edge_signs_of(graph)
    groups, group_of_node = groups_of(graph, cards or {})
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
    if drawn:
        _name_sides(figure, signs(graph))
    positions = dict(zip(drawn, zip(placement.x, placement.y, strict=True), strict=True))
    figure.add_traces(list(edge_traces(graph, positions, edge_signs)))
    figure.add_traces(list(edge_hovers(graph, positions, edge_signs)))
    for group in groups:
        members = [number for number, name in enumerate(drawn) if group_of_node[name] == group.key]
        figure.add_traces(list(_node_traces(graph, drawn, members, placement, group, cards or {})))
    if ringed := [number for number, name in enumerate(drawn) if name in set(marked)]:
        figure.add_trace(_rings(drawn, ringed, placement))
    figure.add_traces(list(_node_legend(graph, drawn, groups, group_of_node)))
    figure.add_traces(list(edge_legend(edge_signs_of(graph.subgraph(drawn)))))
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


def _name_sides(figure: go.Figure, by_sign: tuple[Sign, Sign, Sign]) -> None:
    """Say at the left what it means to stand above the line, and below it."""
    for sign, y, anchor in ((by_sign[0], 1, "top"), (by_sign[1], 0, "bottom")):
        arrow = "▲" if sign.number > 0 else "▼"
        figure.add_annotation(
            text=f"{arrow} {sign.words}",
            x=0,
            y=y,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor=anchor,
            showarrow=False,
            font={"size": 11, "color": QUIET},
            bgcolor="rgba(255,255,255,0.7)",
        )


def _node_traces(
    graph: nx.DiGraph,
    drawn: Sequence[str],
    members: Sequence[int],
    placement: Placement,
    group: Group,
    cards: Mapping[str, Any],
) -> Iterator[go.Scatter]:
    """A trace for the features of a group and one for its error nodes, so that the legend can switch them."""
    for kind, symbol in _SYMBOLS.items():
        of_kind = [number for number in members if _kind(graph.nodes[drawn[number]]) == kind]
        if of_kind:
            names = [drawn[number] for number in of_kind]
            yield go.Scatter(
                x=[placement.x[number] for number in of_kind],
                y=[placement.y[number] for number in of_kind],
                mode="markers",
                marker={
                    "size": [placement.extent[number] / _EXTENTS[kind] for number in of_kind],
                    "color": group.colour,
                    "symbol": symbol,
                    "opacity": [1.0] * len(of_kind),
                    "line": {"width": 1, "color": "white"},
                },
                ids=names,
                meta={"part": "nodes"},
                customdata=names,
                hovertext=[_hover(name, graph, cards) for name in names],
                hoverinfo="text",
                hoverlabel={"bordercolor": group.colour},
                legendgroup="errors" if kind == "error" else f"nodes {group.key}",
                showlegend=False,
            )


def _rings(drawn: Sequence[str], members: Sequence[int], placement: Placement) -> go.Scatter:
    """Rings around nodes; what they surround stays in reach of the pointer."""
    return go.Scatter(
        x=[placement.x[number] for number in members],
        y=[placement.y[number] for number in members],
        mode="markers",
        marker={
            "size": [placement.extent[number] + 3 for number in members],
            "symbol": "circle-open",
            "color": INK,
            "line": {"width": 2},
        },
        meta={"part": "rings"},
        customdata=[drawn[number] for number in members],
        hoverinfo="skip",
        name="in both circuits",
    )


def _node_legend(
    graph: nx.DiGraph, drawn: Sequence[str], groups: Sequence[Group], group_of_node: Mapping[str, str]
) -> Iterator[go.Scatter]:
    """An entry for each group of features that is drawn, and one for the error nodes."""
    of_features = {group_of_node[name] for name in drawn if _kind(graph.nodes[name]) == "feature"}
    entries = [("circle", g.colour, g.words, f"nodes {g.key}") for g in groups if g.key in of_features]
    if any(_kind(graph.nodes[name]) == "error" for name in drawn):
        kinds = {graph.nodes[name]["kind"] for name in drawn}
        words = "error node" if "skip" not in kinds else "error node or skip connection"
        entries.append(("diamond", INK, words, "errors"))
    for symbol, colour, words, legendgroup in entries:
        marker = {"symbol": symbol, "color": colour, "size": 10}
        yield go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=words, legendgroup=legendgroup)


def _kind(node: dict[str, Any]) -> str:
    return "error" if node["kind"] in ("error", "skip") else "feature"


def _hover(name: str, graph: nx.DiGraph, cards: Mapping[str, Any]) -> str:
    """The most important of what is known about a node, escaped, a line each."""
    node, unit = graph.nodes[name], graph.graph.get("effect_unit", "")
    words = {sign.number: sign.words for sign in signs(graph)}
    rank = f" · rank {node['rank'] + 1:,}" if "rank" in node else ""
    card = cards.get(name)
    label = [hover_text(text) for text in (caption(card), explained(card)) if text] if card else []
    lines = [
        f"<b>{hover_text(name)}</b>",
        *label,
        f"layer {node['layer']}{rank}",
        f"effect {number_text(node['effect'], signed=True)} {hover_text(unit)}",
        f"<i>{words[sign_of(node['effect'])]}</i>",
    ]
    if "effect_low" in node:
        low, high = (number_text(node[key], signed=True) for key in ("effect_low", "effect_high"))
        lines.append(f"95 % interval {low} to {high}")
    figures = {
        "absolute_effect": "mean |effect|", "stability": "share of draws that keep it", "p_value": "p", "q_value": "q",
    }  # fmt: skip
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
        meta={"part": "labels"},
        customdata=list(drawn),
        textfont={"size": 10, "color": QUIET, "shadow": "0 0 2px white, 0 0 2px white, 0 0 3px white"},
        hoverinfo="skip",
        showlegend=False,
    )


def layers_figure(graph: nx.DiGraph, cards: Mapping[str, Any] | None = None) -> go.Figure:
    """Bars per layer, stacked by the groups of `circuit_figure`; all nodes count, drawn in the graph or not."""
    columns = columns_of(graph)
    groups, group_of_node = groups_of(graph, cards or {})
    counts = Counter((data["site"], group_of_node[name]) for name, data in graph.nodes(data=True))
    places = list(range(len(columns.sites)))
    figure = styled_figure("Nodes per layer", _HEIGHT)
    for group in groups:
        of_group = [counts[site, group.key] for site in columns.sites]
        if any(of_group):
            figure.add_trace(
                go.Bar(
                    x=places,
                    y=of_group,
                    marker={"color": group.colour},
                    name=group.words,
                    customdata=columns.labels,
                    hovertemplate=f"layer %{{customdata}}: <b>%{{y:,}}</b><br>{group.words}<extra></extra>",
                )
            )
    step = math.ceil(len(places) / _MOST_LABELS) or 1
    highest = max(Counter(data["site"] for _, data in graph.nodes(data=True)).values(), default=0)
    figure.update_layout(
        barmode="stack",
        bargap=0.25,
        margin={"t": 96},
        legend={"traceorder": "normal"},
        xaxis=axis(
            columns.title, tickvals=places[::step], ticktext=columns.labels[::step], tickangle=0, showgrid=False
        ),
        yaxis=axis("nodes", tickformat=",d", rangemode="tozero", **({"dtick": 1} if highest <= 5 else {})),
        showlegend=True,
    )
    return figure
