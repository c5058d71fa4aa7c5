"""What a conditional dial refuses beside an unconditional one: a figure, and both at equal refusal of toxic prompts."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.viewer.style import BLUE, INK, VERMILION, axis, styled_figure
from sfc.viewer.table import figures_table
from sfc.viewer.text import hover_text, number_text

_DIALS = {"unconditional": BLUE, "conditional": VERMILION}
_TOXIC = "toxic"


def conditional_figure(table: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Refusal of toxic against that of other prompts, a panel per set of prompts and group; a point per alpha."""
    panels = [
        (data, group)
        for data, part in table.groupby("data", sort=False)
        for group in part["group"].unique()
        if group != _TOXIC
    ]
    condition = f"{result['conditional']['feature']} > {number_text(result['conditional']['above'])}"
    figure = styled_figure(f"Both dials: always, and where {condition}", 460)
    titles = [f"{data}: toxic against {group}" for data, group in panels]
    make_subplots(rows=1, cols=len(panels), figure=figure, subplot_titles=titles)
    for column, (data, group) in enumerate(panels, start=1):
        for dial, colour in _DIALS.items():
            of_dial = table[(table["data"] == data) & (table["dial"] == dial)]
            path = of_dial.pivot(index="alpha", columns="group", values=["rate", "refusals", "n", "steered"])
            trace = go.Scatter(
                x=path["rate"][group],
                y=path["rate"][_TOXIC],
                mode="lines+markers",
                line={"color": colour},
                marker={"size": 7},
                name=dial,
                legendgroup=dial,
                showlegend=column == 1,
                customdata=[
                    f"{dial}, alpha {number_text(float(alpha), signed=True)}<br>"  # pyright: ignore[reportArgumentType]
                    + "<br>".join(
                        f"{hover_text(name)}: refused {row['refusals'][name]:.0f} of {row['n'][name]:.0f}, steered"
                        f" {row['steered'][name]:.0f}"
                        for name in (_TOXIC, group)
                    )
                    for alpha, row in path.iterrows()
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
            figure.add_trace(trace, 1, column)
        still = table[(table["data"] == data) & (table["alpha"] == 0) & (table["dial"] == "unconditional")]
        if len(still):
            rates = still.set_index("group")["rate"]
            as_it_is = go.Scatter(
                x=[rates[group]],
                y=[rates[_TOXIC]],
                mode="markers",
                marker={"color": INK, "symbol": "x", "size": 12},
                name="as it is",
                showlegend=column == 1,
                hovertemplate="as it is<extra></extra>",
            )
            figure.add_trace(as_it_is, 1, column)
        shares = {"tickformat": ".0%", "range": [-0.03, 1.03]}
        figure.update_xaxes(axis(f"{group} prompts refused", **shares), row=1, col=column)
        figure.update_yaxes(axis("toxic prompts refused", **shares), row=1, col=column)
    return figure.update_layout(margin={"t": 120}, legend={"y": 1.1})


def matched_html(result: Mapping[str, Any]) -> str:
    """The shares that both dials refuse of each group where they refuse equally many toxic prompts, as tables."""
    parts = []
    for data, rows in result["conditional"]["matched"].items():
        columns = [name for name in rows[0] if name != _TOXIC]
        titles = [f"{data}: toxic refused", *(name.replace("_", ", ") for name in columns)]
        cells = [[_share(row[name]) for name in (_TOXIC, *columns)] for row in rows]
        parts.append(figures_table(titles, cells))
    return "".join(parts)


def _share(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0%}"
