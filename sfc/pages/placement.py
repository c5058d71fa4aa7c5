"""Where the nodes of a circuit stand, in pixels, so that no two of them overlap, and the edges between them as traces.

Each column is a diverging stack: nodes with a positive effect are piled up above a common base line, the others hang
below it, the strongest next to the line. So the sign can be read without the colour, and the height of a stack shows
how much of the circuit its layer holds. A row of a stack holds one node, or as many small ones as a width allows,
which is the same for all columns and no larger than it takes to make the highest stack fit. A trace has one width, so
edges go into a few classes of weight.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import networkx as nx
import plotly.graph_objects as go

from sfc.pages.style import QUIET, Sign, sign_of
from sfc.pages.text import hover_text, number_text

PLOT_WIDTH = 1000
"""the narrowest plotting area in pixels; on a wider one everything stands further apart"""
_PLOT_HEIGHT = 480
_FILL = 0.86
"""the share of a column's width that a row may take up"""
_LARGEST, _SMALLEST = 30, 7
"""extents in pixels"""
_NARROWEST_LABELLED = 56
_SHRINKAGES = (1.0, 0.75, 0.5, 0.35)
_ROW_WIDTHS = (0.0, 0.4, 0.6, 0.8, 1.0)


class Placement(NamedTuple):
    """What the nodes look like, in the order in which they were given."""

    x: list[float]
    """in columns, 0 for the middle of the first"""
    y: list[float]
    """in pixels above the base line"""
    extent: list[float]
    """width and height of the marker in pixels"""
    top: float
    bottom: float
    labelled: bool
    """whether there is room for a line of text under every node"""


class _Style(NamedTuple):
    largest: float
    row_width: float
    gap: float
    labelled: bool


def place(columns: Sequence[int], effects: Sequence[float], breadths: Sequence[float], n_columns: int) -> Placement:
    """Place nodes with these effects in these columns, in the roomiest style in which they fit.

    Where none fits, the figure becomes as high as the tightest one needs.

    Args:
        breadths: how much wider than a circle each node's symbol is.
    """
    stacks: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for node in sorted(range(len(effects)), key=lambda node: -abs(effects[node])):
        stacks[columns[node], effects[node] >= 0].append(node)
    strongest = max((abs(effect) for effect in effects), default=0) or 1
    # The area, not the diameter, is what the eye compares.
    shares = [(abs(effect) / strongest) ** 0.5 for effect in effects]
    column_width = PLOT_WIDTH / n_columns

    def placed(style: _Style) -> Placement:
        extents = [
            breadth * max(min(_SMALLEST, style.largest), share * style.largest)
            for share, breadth in zip(shares, breadths, strict=True)
        ]
        return _stacked(stacks, extents, style, column_width)

    styles = _styles(column_width, max(breadths, default=1))
    fitting = (placement for placement in map(placed, styles) if placement.top - placement.bottom <= _PLOT_HEIGHT)
    return next(fitting, None) or placed(styles[-1])


def _styles(column_width: float, broadest: float) -> list[_Style]:
    """From roomy to tight."""
    widest = _FILL * column_width
    largest = min(_LARGEST, widest / broadest)
    labelled = [_Style(largest, 0, 20, True)] if column_width >= _NARROWEST_LABELLED else []
    spaced = [_Style(largest, 0, 12, False), _Style(largest, 0, 6, False)]
    packed = [
        _Style(max(shrinkage * largest, min(_SMALLEST, largest)), width * widest, 4, False)
        for shrinkage in _SHRINKAGES
        for width in _ROW_WIDTHS
    ]
    return labelled + spaced + packed


def _stacked(
    stacks: dict[tuple[int, bool], list[int]], extents: list[float], style: _Style, column_width: float
) -> Placement:
    x, y, top, bottom = [0.0] * len(extents), [0.0] * len(extents), 44.0, -44.0
    for (column, is_upper), stack in stacks.items():
        height = style.gap / 2 + 4
        direction = 1 if is_upper else -1
        for row in _rows(stack, extents, style):
            row_height = max(extents[node] for node in row)
            left = -(sum(extents[node] for node in row) + style.gap * (len(row) - 1)) / 2
            # The strongest in the middle of the row.
            for node in row[::2][::-1] + row[1::2]:
                x[node] = column + (left + extents[node] / 2) / column_width
                y[node] = direction * (height + row_height / 2)
                left += extents[node] + style.gap
            height += row_height + style.gap
        top, bottom = max(top, direction * height), min(bottom, direction * height)
    return Placement(x, y, extents, top, bottom, style.labelled)


def _rows(stack: list[int], extents: list[float], style: _Style) -> Iterator[list[int]]:
    row: list[int] = []
    width = 0.0
    for node in stack:
        if row and width + style.gap + extents[node] > style.row_width:
            yield row
            row, width = [], 0.0
        width += extents[node] + (style.gap if row else 0)
        row.append(node)
    if row:
        yield row


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
