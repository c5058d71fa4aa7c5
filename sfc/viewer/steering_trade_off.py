"""Figures of what a dial costs: refusal of unsafe prompts against refusal of safe ones, and by type of prompt."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.viewer.style import BLUE, GREEN, INK, QUIET, VERMILION, axis, remark, styled_figure
from sfc.viewer.text import hover_text, number_text


def alpha_title(result: Mapping[str, Any]) -> str:
    """What a dial's alpha is, for an axis."""
    if result["edit"] == "project-out":
        return "alpha: share of the component that is removed"
    unit = "of the mean residual norm" if result["units"] == "norm" else "of the direction's own length"
    return f"alpha: {'component set to' if result['edit'] == 'clamp' else 'added'}, in units {unit}"


def trade_off_figure(points: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """A point per alpha, joined in their order, with Wilson intervals; grey: random directions at the chosen alphas."""
    figure = styled_figure("XSTest: refusal of unsafe against refusal of safe prompts", 520)
    own = points["direction"] == result["direction"]
    curve, chance = points[own].sort_values("alpha"), points[~own]
    for rows, name, mode, colour in (
        (chance, "random", "markers", QUIET),
        (curve, "the dial", "lines+markers+text", BLUE),
    ):
        trace = go.Scatter(
            x=rows["safe"],
            y=rows["unsafe"],
            mode=mode,
            marker={"color": colour, "size": 8, "opacity": 0.5 if name == "random" else 1},
            text=[number_text(alpha, signed=True) for alpha in rows["alpha"]] if name == "the dial" else None,
            textposition="top left",
            name=name,
            customdata=[
                f"{hover_text(row['direction'])}, alpha {number_text(row['alpha'], signed=True)}<br>"
                f"unsafe {row['unsafe']:.0%} of {row['n_unsafe']}, safe {row['safe']:.0%} of {row['n_safe']}"
                for row in rows.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
        if name == "the dial":
            for side, ends in (("safe", "error_x"), ("unsafe", "error_y")):
                high, low = rows[f"{side}_high"] - rows[side], rows[side] - rows[f"{side}_low"]
                trace.update({ends: {"type": "data", "array": high, "arrayminus": low, "thickness": 0.7, "width": 0}})
        figure.add_trace(trace)
    for name, colour, symbol, point in (
        ("as it is", INK, "x", result["xstest"]["unsteered"]),
        ("best defensive point", GREEN, "star", result["xstest"]["best_defence"]),
    ):
        if point is not None:
            marker = {"color": colour, "symbol": symbol, "size": 14}
            figure.add_trace(
                go.Scatter(x=[point["safe"]], y=[point["unsafe"]], mode="markers", marker=marker, name=name)
            )
    if result["xstest"]["best_defence"] is None:
        remark(figure, "no alpha raises the refusal of unsafe prompts and not that of safe ones")
    shares = {"tickformat": ".0%", "range": [-0.03, 1.03]}
    return figure.update_layout(
        xaxis=axis("safe prompts refused", **shares), yaxis=axis("unsafe prompts refused", **shares)
    )


def types_figure(rates: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Share refused, per type of prompt and alpha: a heat map for safe types and one for unsafe ones."""
    labels = [label for label in ("safe", "toxic") if label in set(rates["label"])]
    height = 130 + 26 * int(rates.groupby("label")["category"].nunique().max())
    figure = styled_figure("XSTest: refused, by type of prompt", height)
    titles = [{"safe": "safe", "toxic": "unsafe"}[label] for label in labels]
    make_subplots(rows=1, cols=len(labels), figure=figure, subplot_titles=titles, horizontal_spacing=0.22)
    for column, label in enumerate(labels, start=1):
        cells = rates[rates["label"] == label].pivot(index="category", columns="alpha", values="rate")
        counts = rates[rates["label"] == label].pivot(index="category", columns="alpha", values="refusals")
        heat_map = go.Heatmap(
            x=[number_text(float(alpha), signed=True) for alpha in cells.columns],
            y=[hover_text(str(kind)) for kind in cells.index],
            z=cells.to_numpy().tolist(),
            customdata=counts.to_numpy().tolist(),
            hovertemplate="%{y}, alpha %{x}: <b>%{z:.0%}</b> (%{customdata})<extra></extra>",
            colorscale=[[0, "#ffffff"], [1, VERMILION]],
            zmin=0,
            zmax=1,
            showscale=column == len(labels),
            colorbar={"thickness": 10, "tickformat": ".0%"},
            xgap=1,
            ygap=1,
        )
        figure.add_trace(heat_map, 1, column)
        figure.update_xaxes(axis(alpha_title(result), showgrid=False, type="category"), row=1, col=column)
        figure.update_yaxes(axis("", showgrid=False, type="category"), row=1, col=column)
    return figure.update_layout(margin={"l": 190, "t": 84})
