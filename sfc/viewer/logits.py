"""The page of a direct logit attribution: heads by layer, layers by part, and the strongest components as a table."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.patching.head_roles import COMPLIANCE, GUARDRAIL
from sfc.viewer.style import INK, axis, styled_figure
from sfc.viewer.text import hover_text, number_text

_RAISES, _LOWERS = "#d55e00", "#0072b2"
_SCALE = [[0, _LOWERS], [0.5, "#ffffff"], [1, _RAISES]]
_LISTED = 20
_HEIGHT = 1500
_MARKS = {GUARDRAIL: "G", COMPLIANCE: "C"}


def logits_figure(components: pd.DataFrame, layers: pd.DataFrame, title: str, subtitle: str) -> go.Figure:
    """Two heat maps of the heads (toxic prompts; toxic - safe), bars of attention and MLPs, and a table.

    Args:
        components: as `component_table` gives it.
        layers: the same of the attribution joined `by_layer`.
        title, subtitle: shown as text, whatever markup they hold.
    """
    figure = make_subplots(
        rows=3,
        cols=2,
        specs=[[{}, {}], [{"colspan": 2}, None], [{"type": "table", "colspan": 2}, None]],
        subplot_titles=(
            "Heads, toxic prompts",
            "Heads, toxic − safe",
            "Layers",
            "",
        ),
        row_heights=[0.36, 0.22, 0.42],
        vertical_spacing=0.07,
        horizontal_spacing=0.12,
        figure=styled_figure(f"{hover_text(title)}<br><sup>{hover_text(subtitle)}</sup>", _HEIGHT),
    )
    heads = components[components["kind"] == "head"]
    for column, quantity in enumerate(("toxic_mean", "difference"), start=1):
        figure.add_trace(_heat_map(heads, quantity, 0.44 if column == 1 else 1.0), 1, column)
        figure.update_xaxes(
            axis("head", dtick=max(1, int(heads["head"].max()) // 8), showgrid=False), row=1, col=column
        )
        figure.update_yaxes(axis("layer", showgrid=False), row=1, col=column)
    for kind, colour in (("attention", "#009e73"), ("mlp", "#cc79a7")):
        for trace in _layer_traces(layers[layers["kind"] == kind], kind, colour):
            figure.add_trace(trace, 2, 1)
    figure.update_xaxes(axis("layer", showgrid=False), row=2, col=1)
    figure.update_yaxes(axis("contribution (nats)", zeroline=True, zerolinecolor=INK), row=2, col=1)
    figure.add_trace(_table(components), 3, 1)
    return figure.update_layout(
        barmode="group",
        scattermode="group",
        margin={"t": 120},
        legend={"y": 0.625, "x": 1, "xanchor": "right"},
        showlegend=True,
    )


def _heat_map(heads: pd.DataFrame, quantity: str, bar_x: float) -> go.Heatmap:
    """Layers upwards, heads to the right; the colour's zero is white, and one extreme head may not fade the others."""

    def grid(column: str) -> Any:
        return heads.pivot(index="layer", columns="head", values=column)

    values = grid(quantity).to_numpy(dtype=float)
    facts = np.stack(
        [grid(c).to_numpy() for c in ("toxic_mean", "toxic_low", "toxic_high", "safe_mean", "q_value")], -1
    )
    most = float(np.quantile(np.abs(values), 0.995)) or 1.0
    return go.Heatmap(
        z=values.tolist(),
        x=grid(quantity).columns.tolist(),
        y=grid(quantity).index.tolist(),
        text=grid("role").map(lambda role: _MARKS.get(role, "")).to_numpy().tolist(),
        texttemplate="%{text}",
        textfont={"size": 9},
        customdata=np.concatenate([facts, grid("role").to_numpy()[..., None]], -1).tolist(),
        zmin=-most,
        zmax=most,
        colorscale=_SCALE,
        colorbar={"title": "nats", "x": bar_x, "y": 0.845, "len": 0.33, "thickness": 12},
        hovertemplate="head %{y}.%{x}: <b>%{customdata[5]}</b><br>toxic %{customdata[0]:.4f} "
        "(%{customdata[1]:.4f} to %{customdata[2]:.4f})<br>safe %{customdata[3]:.4f}, q %{customdata[4]:.2g}"
        "<extra></extra>",
    )


def _layer_traces(rows: pd.DataFrame, kind: str, colour: str) -> tuple[go.Bar, go.Scatter]:
    x = rows["layer"].astype(int).tolist()
    hover = f"{kind} of layer %{{x}}: <b>%{{y:.3f}}</b> nats<extra>%{{fullData.name}}</extra>"
    bars = go.Bar(
        x=x,
        y=rows["toxic_mean"].tolist(),
        error_y={
            "type": "data",
            "array": (rows["toxic_high"] - rows["toxic_mean"]).tolist(),
            "arrayminus": (rows["toxic_mean"] - rows["toxic_low"]).tolist(),
            "thickness": 1,
            "width": 2,
        },
        marker_color=colour,
        offsetgroup=kind,
        name=f"{kind}, toxic",
        hovertemplate=hover,
    )
    dots = go.Scatter(
        x=x,
        y=rows["safe_mean"].tolist(),
        mode="markers",
        offsetgroup=kind,
        marker={"color": "white", "size": 7, "line": {"color": colour, "width": 2}},
        name=f"{kind}, safe",
        hovertemplate=hover,
    )
    return bars, dots


def _table(components: pd.DataFrame) -> go.Table:
    """The components of any kind that differ most between toxic and safe prompts."""
    listed = components.sort_values("difference", key=lambda values: -values.abs(), kind="stable").head(_LISTED)
    intervals = [
        f"{number_text(low, signed=True)} to {number_text(high, signed=True)}"
        for low, high in zip(listed["toxic_low"], listed["toxic_high"], strict=True)
    ]
    columns = {
        "component": listed["component"].tolist(),
        "toxic": [number_text(value, signed=True) for value in listed["toxic_mean"]],
        "95 % interval": intervals,
        "safe": [number_text(value, signed=True) for value in listed["safe_mean"]],
        "toxic − safe": [number_text(value, signed=True) for value in listed["difference"]],
        "q": ["" if pd.isna(value) else number_text(value) for value in listed["q_value"]],
        "role": listed["role"].fillna("").tolist(),
    }
    return go.Table(
        header={"values": list(columns), "align": "left", "fill_color": "#eef1f4"},
        cells={"values": list(columns.values()), "align": "left", "height": 22, "fill_color": "white"},
    )
