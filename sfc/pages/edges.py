"""The edges of a circuit as traces: a trace has one width, so edges go into a few classes of weight."""

from collections.abc import Iterator, Mapping

import networkx as nx
import plotly.graph_objects as go

from sfc.pages.style import QUIET, Sign, sign_of
from sfc.pages.text import hover_text, number_text

_SIGNS = (
    Sign(1, "edge, positive", "#3d7a5a"),
    Sign(-1, "edge, negative", "#a2418f"),
    Sign(0, "edge without weight", QUIET),
)
_CLASSES = ((0.1, 0.7, 0.16), (0.25, 1.2, 0.3), (0.5, 2.0, 0.42), (1.0, 3.4, 0.55))
"""(largest share of the greatest weight, width in pixels, opacity), weakest first"""


def edge_signs_of(graph: nx.DiGraph) -> tuple[Sign, ...]:
    """The signs that the circuit's edges have, in colours that no node has."""
    present = {sign_of(weight) for *_, weight in graph.edges(data="weight", default=0.0)}
    return tuple(sign for sign in _SIGNS if sign.number in present)


def edge_traces(
    graph: nx.DiGraph, positions: Mapping[str, tuple[float, float]], signs: tuple[Sign, ...]
) -> Iterator[go.Scatter]:
    """One trace per sign and class of weight, weak ones first; only edges between nodes that have a position."""
    edges = _drawn(graph, positions)
    greatest = max((abs(weight) for *_, weight in edges), default=0) or 1
    classed = [(ends, sign_of(weight), _class(abs(weight) / greatest)) for *ends, weight in edges]
    for number, (_, width, opacity) in enumerate(_CLASSES):
        for sign in signs:
            lines = [ends for ends, of_sign, of_class in classed if (of_sign, of_class) == (sign.number, number)]
            if lines:
                yield go.Scatter(
                    x=[x for start, end in lines for x in (positions[start][0], positions[end][0], None)],
                    y=[y for start, end in lines for y in (positions[start][1], positions[end][1], None)],
                    meta={"part": "edges"},
                    customdata=[end for ends in lines for end in (*ends, None)],
                    mode="lines",
                    line={"width": width, "color": sign.colour},
                    opacity=opacity,
                    hoverinfo="skip",
                    legendgroup=f"edges {sign.number}",
                    showlegend=False,
                )


def edge_hovers(
    graph: nx.DiGraph, positions: Mapping[str, tuple[float, float]], signs: tuple[Sign, ...]
) -> Iterator[go.Scatter]:
    """Invisible markers half-way along the edges, which say what an edge joins and weighs: a line has no hover text."""
    unit = hover_text(str(graph.graph.get("edge_weight", "")))
    for sign in signs:
        edges = [edge for edge in _drawn(graph, positions) if sign_of(edge[2]) == sign.number]
        if edges:
            yield go.Scatter(
                x=[(positions[source][0] + positions[target][0]) / 2 for source, target, _ in edges],
                y=[(positions[source][1] + positions[target][1]) / 2 for source, target, _ in edges],
                mode="markers",
                marker={"size": 8, "color": sign.colour, "opacity": 0},
                meta={"part": "edge hovers"},
                customdata=[[source, target] for source, target, _ in edges],
                hovertext=[
                    f"<b>{hover_text(source)}</b> → <b>{hover_text(target)}</b>"
                    f"<br>{number_text(weight, signed=True)} {unit}"
                    for source, target, weight in edges
                ],
                hoverinfo="text",
                legendgroup=f"edges {sign.number}",
                showlegend=False,
            )


def edge_legend(signs: tuple[Sign, ...]) -> Iterator[go.Scatter]:
    """An entry for each sign; clicking on it shows and hides its edges."""
    for sign in signs:
        yield go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"width": 2, "color": sign.colour},
            opacity=0.6,
            name=sign.words,
            legendgroup=f"edges {sign.number}",
        )


def _class(share: float) -> int:
    return next(number for number, (most, _, _) in enumerate(_CLASSES) if share <= most)


def _drawn(graph: nx.DiGraph, positions: Mapping[str, tuple[float, float]]) -> list[tuple[str, str, float]]:
    """Source, target and weight of the edges whose ends have a position, sorted."""
    return [
        (source, target, weight)
        for source, target, weight in sorted(graph.edges(data="weight", default=0.0))
        if source in positions and target in positions
    ]
