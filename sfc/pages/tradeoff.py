"""Figures of what edits of a model do and cost: the share of prompts that show a behavior, and ordinary text's loss."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.pages.style import axis, styled_figure


def points(
    x: Iterable[Any], y: Iterable[Any], name: str, colour: str, hovers: Iterable[str], **settings: Any
) -> go.Scatter:
    """Points with a text under the mouse each.

    Args:
        hovers: in plotly's markup (see `sfc.pages.text.hover_text`).
        settings: of the trace, such as `mode="lines+markers"` or `marker_opacity=0.4`.
    """
    trace = go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="markers",
        line={"color": colour},
        marker={"color": colour, "size": 8},
        customdata=list(hovers),
        hovertemplate="%{customdata}<extra></extra>",
    )
    return trace.update(settings)


def mark(x: float, y: float, name: str, colour: str, symbol: str) -> go.Scatter:
    """One point that stands out."""
    return points([x], [y], name, colour, [name], marker={"symbol": symbol, "size": 15, "line": {"width": 2}})


class Panel(NamedTuple):
    """One of several figures side by side."""

    title: str
    x_title: str
    y_title: str
    traces: Sequence[go.Scatter]


def shares_figure(title: str, panels: Sequence[Panel], height: int = 480) -> go.Figure:
    """Shares against shares; a name that several traces have stands once in the legend."""
    figure = styled_figure(title, height)
    make_subplots(rows=1, cols=len(panels), figure=figure, subplot_titles=[panel.title for panel in panels])
    named: set[str] = set()
    for column, panel in enumerate(panels, start=1):
        for trace in panel.traces:
            name = str(trace.name)
            figure.add_trace(trace.update(legendgroup=name, showlegend=name not in named), 1, column)
            named.add(name)
        figure.update_xaxes(share_axis(panel.x_title), row=1, col=column)
        figure.update_yaxes(share_axis(panel.y_title), row=1, col=column)
    return figure.update_layout(margin={"t": 130}, legend={"y": 1.1})


def cost_figure(traces: Sequence[go.Scatter], x_axis: dict[str, Any]) -> go.Figure:
    """How far the cross-entropy of ordinary replies rises under edits."""
    figure = styled_figure("What it costs: cross-entropy of ordinary replies", 380)
    rise = axis("rise", tickformat="+.0%", zeroline=True)
    return figure.add_traces(list(traces)).update_layout(margin={"t": 100}, xaxis=x_axis, yaxis=rise)


def share_axis(title: str) -> dict[str, Any]:
    """An axis from nothing to all."""
    return axis(title, tickformat=".0%", range=[-0.03, 1.03])
