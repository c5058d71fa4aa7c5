"""How many nodes of a circuit lie in each layer."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import networkx as nx
import plotly.graph_objects as go

from sfc.viewer.columns import columns_of
from sfc.viewer.groups import groups_of
from sfc.viewer.style import axis, styled_figure

_HEIGHT = 430
_MOST_LABELS = 16


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
