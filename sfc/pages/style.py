"""What figures have in common: fonts and colours, axes and heat maps, the signs of effects, trade-offs of edits."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import networkx as nx
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.behaviors.behavior import Words
from sfc.circuits.methods import METHODS
from sfc.pages.text import hover_text

PLOTLY_CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', sans-serif"
INK, QUIET, LINE, BAND = "#1f2933", "#5b6672", "#d9dee4", "#f6f7f9"
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, VERMILION, GREEN, PINK, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
DIVERGING = [[0, BLUE], [0.5, "#ffffff"], [1, VERMILION]]
"""the colour scale of values whose sign matters"""
ROLE_COLOURS = (INK, BLUE, VERMILION, GREEN, PINK, AMBER)
"""of the roles in their order: all, content, suffix, …"""


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis with thin lines and a quiet title."""
    return {
        "title": {"text": title, "font": {"color": QUIET, "size": 13}, "standoff": 8},
        "gridcolor": LINE,
        "linecolor": LINE,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": QUIET, "size": 12},
        **settings,
    }


def styled_figure(title: str, height: int) -> go.Figure:
    """An empty figure with a title at the upper left, room for a legend under it."""
    return go.Figure(
        layout={
            "template": None,
            "height": height,
            "autosize": True,
            "title": {
                "text": title,
                "font": {"size": 14, "color": INK},
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 10},
            },
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hovermode": "closest",
            "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"family": FONT, "size": 12, "color": INK}},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "font": {"size": 12},
                "itemsizing": "constant",
            },
            "margin": {"l": 56, "r": 16, "t": 72, "b": 52},
        }
    )


def heat_map(
    cells: pd.DataFrame, value: str, across: str, columns: Sequence[Any], most: float, unit: str
) -> go.Heatmap:
    """A heat map of values whose sign matters: layers upwards, zero white.

    Args:
        cells: a row per cell: `layer`, the columns named by `value` and `across`, `mark` (what is written into it) and
            `hover` (the text under the mouse, in plotly's markup; see `hover_text`).
        columns: the values of `across`, from left to right.
        most: the absolute value that has the full colour.
    """
    values, marks, hovers = (
        cells.pivot(index="layer", columns=across, values=name)[list(columns)] for name in (value, "mark", "hover")
    )
    return grid(
        [hover_text(column) if isinstance(column, str) else column for column in columns],
        values.index.tolist(),
        values,
        text=marks.to_numpy().tolist(),
        texttemplate="%{text}",
        textfont={"size": 9},
        customdata=hovers.to_numpy().tolist(),
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-most,
        zmid=0,
        zmax=most,
        colorbar={"title": {"text": unit}, "thickness": 12},
    )


def grid(x: Sequence[Any], y: Sequence[Any], values: pd.DataFrame, **settings: Any) -> go.Heatmap:
    """A heat map whose cells stand apart; what is missing is blank."""
    z = values.astype(object).where(values.notna(), None).to_numpy().tolist()
    return go.Heatmap(x=list(x), y=list(y), z=z, xgap=1, ygap=1, **settings)


def shades(colour: str) -> list[list[Any]]:
    """The colour scale of values that have no sign."""
    return [[0, "#ffffff"], [1, colour]]


def error_bars(middle: pd.Series, low: pd.Series, high: pd.Series, width: int = 0) -> dict[str, Any]:
    """Thin bars from `low` to `high`."""
    ends = {"array": (high - middle).tolist(), "arrayminus": (middle - low).tolist()}
    return {"type": "data", **ends, "thickness": 1, "width": width}


def remark(figure: go.Figure, text: str) -> None:
    """Write a sentence across the middle of a figure that has nothing, or not all, to show."""
    figure.add_annotation(
        text=text,
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": 14, "color": QUIET},
        bgcolor="rgba(255,255,255,0.85)",
    )


class Sign(NamedTuple):
    """One of the three signs an effect can have."""

    number: int
    """1, -1 or 0"""
    words: str
    colour: str


# Vermilion and blue of Okabe and Ito's palette: told apart with every kind of colour blindness, and in grey.
_COLOURS = {1: "#d55e00", -1: "#0072b2", 0: "#7a828c"}


def words_of(graph: nx.DiGraph) -> Words:
    """How a circuit's behavior is spoken of; circuits of others do not say, and are taken to be of refusal."""
    return Words(**graph.graph["words"]) if "words" in graph.graph else Words()


def signs(graph: nx.DiGraph) -> tuple[Sign, Sign, Sign]:
    """Positive, negative and zero, in the words of a circuit's method: most are causal, a correlation is not."""
    words, method = words_of(graph), graph.graph.get("method", "")
    own = METHODS[method].signs if method in METHODS else None
    told = own or ("{raises}", "{lowers}", "no effect")
    named = {"raises": words.raises, "lowers": words.lowers, "positive": words.positive, "negative": words.negative}
    positive, negative, zero = (
        Sign(number, text.format(**named), _COLOURS[number]) for number, text in zip((1, -1, 0), told, strict=True)
    )
    return positive, negative, zero


def sign_of(value: float) -> int:
    """1, -1 or 0."""
    return (value > 0) - (value < 0)


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
    x_axis: dict[str, Any]
    y_axis: dict[str, Any]
    traces: Sequence[Any]


def panels_figure(figure: go.Figure, panels: Sequence[Panel], most: int = 0, **settings: Any) -> go.Figure:
    """Panels in the frame that a figure is.

    Args:
        most: in a row; 0: all are in one.
        settings: of plotly's `make_subplots`.
    """
    columns = min(len(panels), most) if most else len(panels)
    titles = [panel.title for panel in panels]
    make_subplots(-(-len(panels) // columns), columns, figure=figure, subplot_titles=titles, **settings)
    for number, panel in enumerate(panels):
        row, col = number // columns + 1, number % columns + 1
        figure.add_traces(list(panel.traces), rows=[row] * len(panel.traces), cols=[col] * len(panel.traces))
        figure.update_xaxes(panel.x_axis, row=row, col=col)
        figure.update_yaxes(panel.y_axis, row=row, col=col)
    return figure


def shares_figure(title: str, panels: Sequence[Panel], height: int = 480) -> go.Figure:
    """Shares against shares; a name that several traces have stands once in the legend."""
    named: set[str] = set()
    for trace in (trace for panel in panels for trace in panel.traces):
        name = str(trace.name)
        trace.update(legendgroup=name, showlegend=name not in named)
        named.add(name)
    figure = panels_figure(styled_figure(title, height), panels)
    return figure.update_layout(margin={"t": 130}, legend={"y": 1.1})


def cost_figure(traces: Sequence[go.Scatter], x_axis: dict[str, Any]) -> go.Figure:
    """How far the cross-entropy of ordinary replies rises under edits."""
    figure = styled_figure("What it costs: cross-entropy of ordinary replies", 380)
    rise = axis("rise", tickformat="+.0%", zeroline=True)
    return figure.add_traces(list(traces)).update_layout(margin={"t": 100}, xaxis=x_axis, yaxis=rise)


def share_axis(title: str) -> dict[str, Any]:
    """An axis from nothing to all."""
    return axis(title, tickformat=".0%", range=[-0.03, 1.03])
